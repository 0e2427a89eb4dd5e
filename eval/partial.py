"""Answers of an evaluation that may break off, in a file beside its results: asked again, it goes on.

The first line says what was asked, each further one holds an answer. A line without its end was cut by a crash.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data.conversation import Conversation
from eval.predict import Prediction

NAME = "answers.partial.jsonl"
SERVED = ("text", "new_tokens", "finished", "asked")  # of a prediction, what a server tells


class Partial:
    """`found` has the answers by number that an earlier start with the same key left; `add` appends one.

    A file of another key (server, model, questions, max_new_tokens) is begun anew.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.found: dict[int, Prediction] = {}
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        if lines and json.loads(lines[0]) == {"key": key}:
            rows: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]
            self.found = {row.pop("number"): Prediction(**row) for row in rows}
            print(f"{len(self.found)} answers are there from before it broke off ({path})", file=sys.stderr, flush=True)
        else:
            lines = [json.dumps({"key": key})]
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.new")  # without a cut line, and never less than what is there
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        aside.replace(path)
        self.file, self.kept = path.open("a", encoding="utf-8"), len(lines) - 1

    def add(self, number: int, prediction: Prediction) -> None:
        row = {"number": number} | {name: getattr(prediction, name) for name in SERVED}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        self.kept += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if kind and self.kept:
            told = f"{self.kept} answers are kept in {self.path}; the same command goes on from there"
            print(told, file=sys.stderr, flush=True)


def key_of(url: str, model: str, conversations: Sequence[Conversation], max_new_tokens: int) -> str:
    """sha256 of all that an answer depends on."""
    asked = [url, model, max_new_tokens, [list(c.prompt) for c in conversations]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
