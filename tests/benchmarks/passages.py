"""What the systems of throughput.py train on: passages of SQuAD with all their questions, the same text for each."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.conversation import Conversation
from data.encode.chat import Example, encode
from data.encode.pack import common_prefix
from data.readers.files import open_bytes
from data.readers.source import FileSource, read_all

Passage = dict[str, Any]  # context, qas
MAX_LENGTH = 8192  # of a question, what the embedded base has positions for


@dataclass(frozen=True)
class Workload:
    """The same conversations for each system: SQuAD's layout for Graft, `rows` (prompt, completion) for the others."""

    squad: Path
    rows: Path
    conversations: list[Conversation]
    examples: list[Example]

    @property
    def questions(self) -> int:
        return len(self.examples)

    @property
    def logical_tokens(self) -> int:
        """Of the examples one by one, without padding."""
        return sum(len(e.ids) for e in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(sum(e.loss_mask) for e in self.examples)

    @property
    def max_length(self) -> int:
        """Nothing is cut; other systems add a line break behind the answer."""
        return max(len(e.ids) for e in self.examples) + 8

    def trees(self, batch: int) -> Iterator[list[Example]]:
        """The examples of one context that fit into a step: what shares a prefix."""
        for _, same in groupby(self.examples, key=lambda e: e.context):
            examples = list(same)
            yield from (examples[i : i + batch] for i in range(0, len(examples), batch))


def read_passages(file: str, seed: int) -> list[Passage]:
    """All passages that have questions, in an order drawn by the seed."""
    with open_bytes(Path(file)) as lines:
        articles = json.load(lines)["data"]
    passages = [p for article in articles for p in article["paragraphs"] if p["qas"]]
    return random.Random(seed).sample(passages, len(passages))


def write_workload(passages: Sequence[Passage], folder: Path, tokenizer: PreTrainedTokenizerBase) -> Workload:
    """Raises DataError where a question is longer than MAX_LENGTH."""
    folder.mkdir(parents=True, exist_ok=True)
    squad, rows = folder / "squad.json", folder / "rows.jsonl"
    article = {"title": "", "paragraphs": list(passages)}
    squad.write_text(json.dumps({"version": "v2.0", "data": [article]}), encoding="utf-8")
    conversations = read_all(FileSource(str(squad), "squad_v2"), "squad_v2")
    with rows.open("w", encoding="utf-8") as file:
        for c in conversations:
            file.write(json.dumps({"prompt": list(c.prompt), "completion": [c.messages[-1]]}) + "\n")
    return Workload(squad, rows, conversations, [encode(c, tokenizer, MAX_LENGTH) for c in conversations])


def tree_tokens(tree: Sequence[Example]) -> tuple[int, int]:
    """Tokens of a tree of prefixes, each prefix once, and how many pairs of token and ancestor (itself too) it has."""
    tokens = pairs = 0
    previous: list[int] = []
    for ids in sorted(e.ids for e in tree):
        shared = common_prefix(previous, ids)
        tokens += len(ids) - shared
        pairs += (len(ids) * (len(ids) + 1) - shared * (shared + 1)) // 2
        previous = ids
    return tokens, pairs


def first_questions(passages: Sequence[Passage], count: int) -> list[Passage]:
    """Whole passages, the last one cut, with `count` questions together."""
    chosen: list[Passage] = []
    for passage in passages:
        if count <= 0:
            break
        chosen.append(passage | {"qas": passage["qas"][:count]})
        count -= len(chosen[-1]["qas"])
    return chosen


def with_questions(passage: Passage, count: int) -> Passage:
    """Exactly `count` questions: the passage's own in turn, those that come again with a number in front."""
    own = passage["qas"]
    qas = []
    for k in range(count):
        turn, qa = k // len(own), own[k % len(own)]
        again = {"id": f"{qa['id']}-{turn}", "question": f"({turn + 1}) {qa['question']}"} if turn else {}
        qas.append(qa | again)
    return passage | {"qas": qas}


def with_length(passages: Sequence[Passage], tokens: int, tokenizer: PreTrainedTokenizerBase) -> Passage | None:
    """The passages joined and cut to `tokens` tokens, with those questions whose answers are left; None without any."""
    context = "\n".join(p["context"] for p in passages)
    offsets = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) < tokens:
        return None
    context = context[: offsets[tokens - 1][1]]
    first = passages[0]
    room = min(len(context), len(first["context"]))
    left = [q for q in first["qas"] if all(a["answer_start"] + len(a["text"]) <= room for a in q["answers"])]
    return {"context": context, "qas": left} if left else None
