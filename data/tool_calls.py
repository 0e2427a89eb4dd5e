"""Calls of tools in a turn, and the one text form in which answers with calls are logged, compared and scored."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from data.conversation import CALLS, Message

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Call = dict[str, Any]  # name and arguments


def named_calls(message: Mapping[str, Any]) -> list[Call]:
    """Name and arguments of each call of a turn."""
    return [call["function"] for call in message.get(CALLS, ())]


def answer_text(content: str, calls: Iterable[Call]) -> str:
    """The text, and each call as Hermes writes it with its arguments sorted, whatever the chat template's own form."""
    blocks = [f"{OPEN}\n{_json(call)}\n{CLOSE}" for call in calls]
    return "\n".join([content, *blocks] if content else blocks)


def spoken_text(message: Message) -> str:
    """What an assistant's turn says, calls included."""
    return answer_text(str(message["content"]), named_calls(message)) if CALLS in message else str(message["content"])


def calls_in(text: str) -> list[Call | None]:
    """The calls of a text in the form of `answer_text`, None for one that is no call."""
    calls: list[Call | None] = []
    at = text.find(OPEN)
    while at >= 0:
        start = at + len(OPEN)
        call, end = json_value(text, start)
        calls.append(call if is_call(call) else None)
        at = text.find(OPEN, end)
    return calls


def json_value(text: str, start: int) -> tuple[Any, int]:
    """The JSON value after the white space at `start`, and its end; (None, start) if none is there."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


def is_call(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict)


def _json(call: Call) -> str:
    arguments = json.dumps(call["arguments"], ensure_ascii=False, sort_keys=True)
    return f'{{"name": {json.dumps(call["name"], ensure_ascii=False)}, "arguments": {arguments}}}'
