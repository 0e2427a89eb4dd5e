"""Tasks: how rows become conversations, and how an answer is scored."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.chat import Conversation, DataError
from data.jsonl import read_jsonl
from data.squad import read_squad, read_squad_hub
from eval.metrics import reference_scores, squad_scores

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Task:
    """`version` moves when its numbers could: the prompt, the reader or the scorer changed."""

    version: int
    read: Callable[[Path], list[Conversation]]
    score: Callable[[Sequence[str], str], dict[str, float]]
    read_hub: Callable[[str, str, str | None], list[Conversation]] | None = None


TASKS = {
    "squad_v2": Task(1, read_squad, squad_scores, read_squad_hub),
    "squad_v1": Task(1, partial(read_squad, version=1), squad_scores, partial(read_squad_hub, version=1)),
    "instruct": Task(1, read_jsonl, reference_scores),
}


def read_conversations(task: str, path: str, split: str = "train", revision: str | None = None) -> list[Conversation]:
    """Conversations of a file, or of a Hub dataset where `path` is no file."""
    if Path(path).is_file():
        return TASKS[task].read(Path(path))
    read_hub = TASKS[task].read_hub
    if read_hub is None or not HUB_ID.fullmatch(path) or Path(path).suffix:
        raise DataError(f"{path}: no such file" + ("; it is a folder" if Path(path).is_dir() else ""))
    try:
        return read_hub(path, split, revision)
    except (OSError, ValueError) as error:  # datasets' own: not found, no such split, no connection
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: no such file here, and not to be had from the Hub: {reason}") from error
