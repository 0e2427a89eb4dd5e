"""SQuAD v1/v2 -> conversations: instruction, then passage, then question; the answer is the shortest gold span."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.chat import Conversation, DataError

UNANSWERABLE = "unanswerable"
INSTRUCTION_V1 = "Answer with the shortest quote from the passage."
INSTRUCTION_V2 = INSTRUCTION_V1[:-1] + f", or with: {UNANSWERABLE}"


def read_squad(path: Path, version: int = 2) -> list[Conversation]:
    """Every question of a SQuAD file (.json or .json.gz), in file order; each passage is one `context`.

    Version 1 has no unanswerable questions and does not mention them in the instruction.
    Raises DataError with file and question id on a missing field or an answer that is not at its offset.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            articles = json.load(file)["data"]
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a SQuAD JSON file: {error}") from error
    except (KeyError, TypeError) as error:
        raise DataError(f'{path}: not a SQuAD JSON file: no top-level "data" list') from error
    conversations = [
        _conversation(path, row, paragraph["context"], version) for paragraph, row in _questions(path, articles)
    ]
    if not conversations:
        raise DataError(f"{path}: holds no question")
    seen: dict[str, str] = {}
    for conversation in conversations:
        if conversation.id in seen:
            raise DataError(f"{conversation.where}: question id occurs twice; ids must be unique to be scored")
        seen[conversation.id] = conversation.where
    return conversations


def read_squad_hub(name: str, split: str, revision: str | None, version: int = 2) -> list[Conversation]:
    """The same from a Hub dataset with the columns id, context, question, answers{text, answer_start}."""
    from datasets import load_dataset

    rows = load_dataset(name, split=split, revision=revision)
    where = f"{name}[{split}]"
    return [
        _conversation(where, {**row, "answers": _hub_answers(row["answers"])}, row["context"], version) for row in rows
    ]


def _hub_answers(answers: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        {"text": text, "answer_start": start}
        for text, start in zip(answers["text"], answers["answer_start"], strict=True)
    ]


def _questions(path: Path, articles: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                if not isinstance(paragraph["context"], str):
                    raise TypeError("context must be text")
                for row in paragraph["qas"]:
                    yield paragraph, row
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not SQuAD's layout (data > paragraphs > context, qas): {error}") from error


def _conversation(source: Path | str, row: dict[str, Any], context: str, version: int) -> Conversation:
    try:
        id, question, spans = str(row["id"]), row["question"], row["answers"]
        where = f"{source}: {id}"
        for span in spans:
            text, start = span["text"], span["answer_start"]
            if context[start : start + len(text)] != text:
                found = context[start : start + len(text)]
                raise DataError(
                    f"{where}: the answer {text!r} is not at answer_start {start} (there is {found!r}); "
                    "correct the offset or the text"
                )
    except (KeyError, TypeError) as error:
        raise DataError(f"{source}: a question without id, question, answers[text, answer_start]: {error}") from error
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: the question is empty")
    texts = tuple(span["text"] for span in spans)
    if not all(text.strip() for text in texts):
        raise DataError(f"{where}: an answer's text is empty; an unanswerable question has no answers")
    if bool(row.get("is_impossible", not texts)) != (not texts):
        raise DataError(f"{where}: is_impossible contradicts its {len(texts)} answers")
    if version == 1 and not texts:
        raise DataError(f"{where}: has no answer; set task: squad_v2 for data with unanswerable questions")
    return Conversation(
        messages=(
            {"role": "system", "content": INSTRUCTION_V2 if version == 2 else INSTRUCTION_V1},
            # the passage before the question: what several questions share is a common prefix and computed once
            {"role": "user", "content": f"Passage: {context}\n\nQuestion: {question.strip()}"},
            {"role": "assistant", "content": min(texts, key=len, default=UNANSWERABLE)},
        ),
        id=id,
        where=where,
        answers=texts,
        context=context,
    )
