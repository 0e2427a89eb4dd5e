"""Instruction rows in jsonl -> conversations. Three layouts, told apart by their keys:

messages:          {"messages": [{"role": ..., "content": ...}, ...]}
alpaca:            {"instruction": ..., "input": ... (optional), "output": ..., "system": ... (optional)}
prompt-completion: {"prompt": ..., "completion": ...}
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.chat import Conversation, DataError, Message

ROLES = ("system", "user", "assistant")
LAYOUTS = 'need "messages", or "instruction" and "output", or "prompt" and "completion"'


def read_jsonl(path: Path) -> list[Conversation]:
    """Every row of a .jsonl or .jsonl.gz file. Raises DataError naming file:line, what was found and what to do."""
    conversations = []
    for number, row in _rows(path):
        where = f"{path}:{number}"
        messages = _messages(row, where)
        conversations.append(
            Conversation(
                messages=tuple(messages),
                id=str(row.get("id", number)),
                where=where,
                answers=(messages[-1]["content"],),
                context="\n".join(m["content"] for m in messages[:-1]),
            )
        )
    if not conversations:
        raise DataError(f"{path}: holds no row")
    return conversations


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and objects; blank lines are allowed and counted as lines."""
    for number, raw in _lines(path):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            row = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=_no_constant) if line else None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}") from error
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a JSON object: {error}") from error
        if line and not isinstance(row, dict):
            raise DataError(f"{path}:{number}: {type(row).__name__} where one JSON object a line is expected")
        if row is not None:
            yield number, row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from enumerate(file, start=1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: broken gzip file: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _messages(row: dict[str, Any], where: str) -> list[Message]:
    if "messages" in row:
        return _checked_turns(row["messages"], where)
    if "instruction" in row and "output" in row:
        prompt = _text(row, "instruction", where)
        if row.get("input") not in (None, ""):
            prompt += "\n\n" + _text(row, "input", where)
        system = [_turn("system", _text(row, "system", where))] if row.get("system") else []
        return [*system, _turn("user", prompt), _turn("assistant", _text(row, "output", where))]
    if "prompt" in row and "completion" in row:
        return [
            _turn("user", _text(row, "prompt", where)),
            _turn("assistant", _text(row, "completion", where)),
        ]
    raise DataError(f"{where}: keys {sorted(row)}; {LAYOUTS}")


def _checked_turns(turns: Any, where: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: messages must be a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise DataError(f"{where}: messages[{i}]: role must be one of {', '.join(ROLES)}")
        messages.append(_turn(turn["role"], _text(turn, "content", f"{where}: messages[{i}]")))
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last turn is {messages[-1]['role']}'s; a row must end with the assistant's answer"
        )
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise DataError(
            f"{where}: after the system turn, user and assistant must take turns; found {', '.join(spoken)}"
        )
    return messages


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} must be non-empty text, found {json.dumps(value)[:60]}")
    return value
