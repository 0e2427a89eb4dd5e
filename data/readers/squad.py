"""SQuAD v1/v2 -> conversations: instruction, then passage, then question; the answer is the shortest gold span."""

from pathlib import Path
from typing import Any

from data.conversation import Conversation, DataError
from data.readers.fields import shown, shown_names, text, type_name, without_lone_surrogates
from data.readers.files import Row, Rows, open_bytes, row_or_defect
from data.readers.strict_json import JsonText

UNANSWERABLE = "unanswerable"
INSTRUCTION_V1 = "Answer with the shortest quote from the passage."
INSTRUCTION_V2 = INSTRUCTION_V1[:-1] + f", or with: {UNANSWERABLE}"


def read_articles(path: Path) -> Rows:
    """Questions of a SQuAD file as rows in the Hub's layout; one article is in memory at a time.

    "version" is read only if it precedes "data", as it does in the files of version 2.
    """
    with open_bytes(path) as file:
        articles = JsonText(path, file)
        before = articles.find_list("data") or {}
        common = {"version": before["version"]} if "version" in before else {}
        for where, article, flaw in articles.elements(",", "}"):
            if flaw:  # the decoder does not name the question
                flaw = DataError(flaw.where, f"{flaw.problem} (no question of its article is used)", flaw.kind)
            for place, row in _questions(path, where, article, common):
                yield place, flaw or row


def _questions(path: Path, where: str, article: Any, common: Row) -> Rows:
    for i, paragraph in enumerate(_list(article, "paragraphs")):
        place = f"paragraphs[{i}]"
        if isinstance(paragraph, DataError):
            yield where, DataError(where, f"article: {paragraph.problem}", paragraph.kind)
            continue
        for j, question in enumerate(_list(paragraph, "qas")):
            if isinstance(question, DataError):
                yield where, DataError(where, f"{place}: {question.problem}", question.kind)
            elif not isinstance(question, dict) or question.get("id") in (None, ""):
                problem = f"{place}.qas[{j}]: {shown(question)} has no id; give every question its own"
                yield where, DataError(where, problem, "question without id")
            elif "context" not in paragraph:
                yield where, DataError(where, f"{place}: no context, only {shown_names(paragraph)}", "no context")
            else:
                name = f"{path}: {shown_names([question['id']])}"
                row = common | {"context": paragraph["context"]} | question
                yield name, row_or_defect(without_lone_surrogates, row, name)


def _list(parent: Any, key: str) -> list[Any]:
    """The list under the key; if it is missing, a list with one DataError without a place."""
    if isinstance(parent, dict) and isinstance(parent.get(key), list):
        return parent[key]
    content = f"keys {shown_names(parent)}" if isinstance(parent, dict) else f"{type_name(parent)} {shown(parent)}"
    layout = "SQuAD's layout is data > paragraphs > context, qas"
    return [DataError("", f'{content}, no list under "{key}"; {layout}', f"no list of {key}")]


def squad_version(row: Row, format: str | None, task: str) -> int:
    """1 or 2, from the recipe's format or task, so that training and evaluation use the same prompt; else from the
    file."""
    for name in (format, task):
        if name in ("squad_v1", "squad_v2"):
            return int(name[-1])
    says_2 = str(row.get("version", "")).lower().startswith(("v2", "2"))
    return 2 if says_2 or row.get("is_impossible") is not None else 1


def squad_conversation(row: Row, version: int, where: str) -> Conversation:
    """The question with its passage. Raises DataError for a blank field and for an answer that is not at its offset.

    Rows may have no id. An id may not be null: then other rows have ids, by which answers are scored.
    """
    if "id" in row and row["id"] in (None, ""):
        value = "null" if row["id"] is None else "empty text"
        raise DataError(where, f"id: {value}; give every question its own, or leave the key out of all", "id: none")
    context, question = text(row["context"], "context", where), text(row["question"], "question", where).strip()
    spans = _answers(row["answers"], context, where)
    texts = tuple(answer for answer, _ in spans)
    if row.get("is_impossible") is not None and bool(row["is_impossible"]) != (not texts):
        problem = (
            f"is_impossible: {shown(row['is_impossible'])} contradicts the number of answers, {len(texts)}; correct one"
        )
        raise DataError(where, problem, "is_impossible contradicts answers")
    if version == 1 and not texts:
        remedy = "set task: squad_v2 (or format: squad_v2) for data with unanswerable questions"
        raise DataError(where, f"answers: has no answer; {remedy}", "no answer in version 1")
    return Conversation(
        messages=(
            {"role": "system", "content": INSTRUCTION_V2 if version == 2 else INSTRUCTION_V1},
            # the passage first: questions about one passage share it as a prefix, which is computed once
            {"role": "user", "content": f"Passage: {context}\n\nQuestion: {question}"},
            {"role": "assistant", "content": min(texts, key=len, default=UNANSWERABLE)},
        ),
        id=where,
        where=where,
        answers=texts,
        context=context,
        question=question,
        starts=tuple(start for _, start in spans),
    )


def _answers(answers: Any, context: str, where: str) -> list[tuple[str, int]]:
    """Text and verified offset of each gold span, from a list of spans or from the Hub's lists of texts and offsets."""
    try:
        if isinstance(answers, dict):
            spans = list(zip(answers["text"], answers["answer_start"], strict=True))
        else:
            spans = [(span["text"], span["answer_start"]) for span in answers]
    except (KeyError, TypeError, ValueError) as error:
        layout = '[{"text": ..., "answer_start": ...}]'
        raise DataError(where, f"answers: {shown(answers)} where {layout} is expected", "answers: layout") from error
    for i, (answer, start) in enumerate(spans):
        text(answer, f"answers[{i}].text", where)
        if not isinstance(start, int) or isinstance(start, bool):
            problem = f"answers[{i}].answer_start: {type_name(start)} {shown(start)}"
            raise DataError(where, f"{problem} where a whole number is expected", "answer_start: not a number")
        text_at_start = context[max(start, 0) : max(start, 0) + len(answer)]
        if start < 0 or text_at_start != answer:
            problem = (
                f"answers[{i}]: {shown(answer)} is not at answer_start {start} (the passage has {shown(text_at_start)})"
            )
            raise DataError(where, f"{problem}; correct the offset or the text", "answer not at its offset")
    return spans
