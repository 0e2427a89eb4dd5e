"""Answers of an evaluation that may break off, in a file beside its results: asked again, it goes on.

The first line says what was asked, each further one holds an answer. A line without its end was cut by a crash.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data.atomic import write_text
from data.conversation import Conversation
from eval.prediction import Prediction

NAME = "answers.partial.jsonl"
KEPT = ("text", "new_tokens", "finished", "asked")  # of a prediction
Note = Callable[[int, Prediction], None]
Ask = Callable[[Sequence[Conversation], Note], list[Prediction]]


class Partial:
    """`found` has the answers by number that an earlier start with the same key left; `add` appends one.

    A file of another key (server, model, questions, max_new_tokens) is begun anew.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.found: dict[int, Prediction] = {}
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        try:
            if lines and json.loads(lines[0]) == {"key": key}:
                rows: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]
                self.found = {row.pop("number"): Prediction(**row) for row in rows}
                said = f"{len(self.found)} answers are there from before it broke off ({path})"
                print(said, file=sys.stderr, flush=True)
        except (ValueError, TypeError, KeyError) as error:
            self.found = {}
            print(f"{path} is damaged and begun anew: {error}", file=sys.stderr, flush=True)
        if not self.found:
            lines = [json.dumps({"key": key})]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{line}\n" for line in lines))  # without a cut line, never less than what was there
        self.file, self.kept = path.open("a", encoding="utf-8"), len(lines) - 1

    def add(self, number: int, prediction: Prediction) -> None:
        row = {"number": number} | {name: getattr(prediction, name) for name in KEPT}
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


def kept(
    path: Path, system: str, conversations: Sequence[Conversation], max_new_tokens: int, ask: Ask
) -> list[Prediction]:
    """The answers in order; those in the file already are not asked again. system: all that names who answers. The file
    is the caller's to delete."""
    with Partial(path, key_of(system, conversations, max_new_tokens)) as partial:
        missing = [i for i in range(len(conversations)) if i not in partial.found]

        def note(place: int, prediction: Prediction) -> None:
            partial.add(missing[place], prediction)

        new = ask([conversations[i] for i in missing], note) if missing else []
    found = partial.found | dict(zip(missing, new, strict=True))
    return [found[i] for i in range(len(conversations))]


def key_of(system: str, conversations: Sequence[Conversation], max_new_tokens: int) -> str:
    """sha256 of all that an answer depends on."""
    asked = [system, max_new_tokens, [list(c.prompt) for c in conversations]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
