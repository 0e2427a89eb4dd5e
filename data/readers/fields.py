"""Checks of a row's values, and how a message shows a value."""

import re
from collections.abc import Iterable
from typing import Any

from data.conversation import Conversation, DataError, Ledger

SHOWN = 60  # characters of a value in a message: enough to find the row, too few to publish the value
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# noted, not refused: real posts hold form feeds and terminal escapes, and tokenizers accept them
ODD_CHARACTERS = {
    "control characters": re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]"),
    "control characters, left by cp1252 that was read as latin1": re.compile("[\x80-\x84\x86-\x9f]"),
    "mojibake, UTF-8 that was read as cp1252": re.compile(
        "\u00c3(?=[\x80-\xbf])|\u00c2(?=[\xa0-\xbf])|\u00e2(?=\u20ac)"
    ),
    "U+2028 or U+2029, which some tools take for a line end": re.compile("[\u2028\u2029]"),
    "U+FFFD, left by an earlier wrong decoding": re.compile("\ufffd"),
}


def text(value: Any, field: str, where: str) -> str:
    """The value, if it is text that can be trained on. Raises DataError for null, blank, other types, binary data."""
    kind = re.sub(r"\d+", "", field)  # messages[3].content and messages[5].content are one kind
    if not isinstance(value, str):
        if isinstance(value, list):
            remedy = "join its parts into one text; images, audio and other parts can't be trained on"
        elif value is None:
            remedy = "fill it in or leave the row out"
        else:
            remedy = 'write it as text, in quotes: "..."'
        description = "null" if value is None else f"{type_name(value)} {shown(value)}"
        raise DataError(
            where, f"{field}: {description} where text is expected; {remedy}", f"{kind}: {type_name(value)}"
        )
    if not value.strip():
        description = "empty text" if value == "" else f"only white space {shown(value)}"
        raise DataError(where, f"{field}: {description}; fill it in or leave the row out", f"{kind}: empty")
    if "\0" in value:
        problem = f"{field}: NUL (U+0000) at character {value.index(chr(0)) + 1}"
        raise DataError(where, f"{problem}; binary data is no text, remove it", f"{kind}: NUL")
    return value


def without_lone_surrogates(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row. Raises DataError if a key or text in it holds half a character.

    Keys and texts that are not trained on are checked too: they are printed, stored or sent.
    """
    values: list[tuple[str, Any]] = [("", row)]
    for place, value in values:  # the loop extends the list: recursion would fail at nesting that the decoder accepts
        if isinstance(value, dict):
            values += ((f"{place}.{key}", key) for key in value)
            values += ((f"{place}.{key}", item) for key, item in value.items())
        elif isinstance(value, list):
            values += ((f"{place}[{i}]", item) for i, item in enumerate(value))
        elif isinstance(value, str) and not value.isascii() and (broken := LONE_SURROGATE.search(value)):
            name, code = shown_names([place[1:]]), f"lone surrogate U+{ord(broken[0]):04X}"
            remedy = "half of a character was cut off, write the whole one or remove it"
            raise DataError(where, f"{name}: {code} at character {broken.start() + 1}; {remedy}", "lone surrogate")
    return row


def shown(value: Any) -> str:
    """The value for a message: quoted, escaped and cut to SHOWN characters."""
    return _cut(repr(value))


def shown_names(names: Iterable[object], limit: int = SHOWN) -> str:
    """Keys of a row, an id or a library's message for a message: escaped and cut, without quotes."""
    return _cut(", ".join(repr(str(name))[1:-1] for name in names), limit)


def _cut(escaped: str, limit: int = SHOWN) -> str:
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def type_name(value: Any) -> str:
    """The JSON name of the value's type."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "number" if -(2**63) <= value < 2**63 else "number beyond 64 bits"
    return {str: "text", float: "number", list: "list", dict: "object", type(None): "null"}.get(
        type(value), type(value).__name__
    )


def note_odd_characters(conversation: Conversation, ledger: Ledger) -> None:
    """Note in the ledger characters that are rarely intended."""
    for i, message in enumerate(conversation.messages):
        for kind, pattern in ODD_CHARACTERS.items():
            if match := pattern.search(message["content"]):
                place = f"turn {i + 1}, character {match.start() + 1}"
                ledger.note(conversation.where, kind, f"U+{ord(match[0]):04X} in {place}")
