"""A file of the answers that an evaluation has so far: after an interruption, the same command resumes from it.

The first line is a hash of what was asked, each further line an answer. A crash may cut the last line.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data.atomic import open_to_append, write_text
from data.conversation import Conversation
from data.terminal import print
from eval.prediction import Prediction

NAME = "answers.partial.jsonl"
KEYS = ("text", "new_tokens", "finished", "asked", "written")  # of a prediction
Note = Callable[[int, Prediction], None]
Ask = Callable[[Sequence[Conversation], Note], list[Prediction]]


def resume_answers(
    path: Path, system: str, conversations: Sequence[Conversation], max_new_tokens: int, ask: Ask, recheck: int = 0
) -> list[Prediction]:
    """The answers in order. Those already in the file are not asked again; each new one is appended as it comes.

    system: everything that identifies who answers. If that can't be known, as of a server, the `recheck` longest of the
    answers are asked again first, and all if one differs. The caller deletes the file once the results are written.
    """
    asked = json.dumps([system, max_new_tokens, [[list(c.prompt), c.template_arguments] for c in conversations]])
    header = json.dumps({"key": hashlib.sha256(asked.encode()).hexdigest()})
    answers = _read(path, header)
    longest = sorted(answers, key=lambda i: -answers[i].new_tokens)[:recheck]
    again = ask([conversations[i] for i in longest], lambda number, answer: None) if longest else []
    if any(new.text != answers[i].text for i, new in zip(longest, again, strict=True)):
        _report(f"{path}: {system} now answers otherwise, so that all questions are asked again")
        answers = {}
    missing = [i for i in range(len(conversations)) if i not in answers]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join([f"{header}\n", *(_line(i, answer) for i, answer in answers.items())]))
    with open_to_append(path) as file:

        def note(place: int, answer: Prediction) -> None:
            answers[missing[place]] = answer
            file.write(_line(missing[place], answer))
            file.flush()

        try:
            new = ask([conversations[i] for i in missing], note) if missing else []
        except BaseException:
            if answers:
                _report(f"{len(answers)} answers are kept in {path}; the same command resumes from them")
            raise
    answers |= dict(zip(missing, new, strict=True))
    return [answers[i] for i in range(len(conversations))]


def _read(path: Path, header: str) -> dict[int, Prediction]:
    """The answers by question number, without damaged ones; none if the file has another header."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    if lines[:1] != [header.encode()]:
        return {}
    answers, damaged = dict[int, Prediction](), 0
    for line in lines[1:]:
        try:
            row = json.loads(line.decode())
            number = row.pop("number")
            answers[number] = Prediction(**row)
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged += 1
    if damaged:
        _report(f"{path}: {damaged} lines are damaged; their questions are asked again")
    _report(f"{len(answers)} answers are read from {path}; only the other questions are asked")
    return answers


def _line(number: int, answer: Prediction) -> str:
    row = {"number": number} | {key: getattr(answer, key) for key in KEYS}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
