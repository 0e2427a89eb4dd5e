"""Recognise a row's format by its keys, and rename the columns that the recipe names."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from data.conversation import ARGUMENTS, Conversation, DataError, Ledger
from data.readers.fields import shown_names
from data.readers.files import Row
from data.readers.instruct import instruct_conversation, refuse_unreadable, unread_keys
from data.readers.newsgroups import newsgroups_conversation
from data.readers.raw_text import text_conversation
from data.readers.squad import squad_conversation, squad_version
from data.readers.tools import ROW_KEYS as TOOL_KEYS

# required and optional keys of each format
SQUAD_KEYS = (("context", "question", "answers"), ("id", "title", "version", "is_impossible", "plausible_answers"))
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("id", "conversations", ARGUMENTS, *TOOL_KEYS)),
    "sharegpt": (("conversations",), ("id", "system", ARGUMENTS, *TOOL_KEYS)),
    "alpaca": (("instruction", "output"), ("id", "input", "system", "history", ARGUMENTS)),
    "prompt_completion": (("prompt", "completion"), ("id", ARGUMENTS)),
    "squad_v1": SQUAD_KEYS,
    "squad_v2": SQUAD_KEYS,
    "newsgroups": (("label", "text"), ("id",)),
}
FORMATS = tuple(KEYS)
NAMES = tuple(dict.fromkeys(key for keys in KEYS.values() for names in keys for key in names))


def row_conversation(row: Row, named: str | None, task: str, where: str, ledger: Ledger) -> Conversation:
    """The row as a conversation; its format is `named`, or recognised if that is None. Raises DataError.

    For task text only the row's text is read.
    """
    if task == "text":
        if named:
            raise DataError(where, f"format {named!r}: task text reads no format; leave it out", "format")
        ledger.formats["text"] += 1
        return text_conversation(row, where)
    format = _format(row, named, where)
    refuse_unreadable(row, "", where, KEYS[format][1])
    if format.startswith("squad"):
        version = squad_version(row, named, task)
        format = f"squad_v{version}"
        conversation = squad_conversation(row, version, where)
    elif format == "newsgroups":
        conversation = newsgroups_conversation(row, where, ledger)
    else:
        conversation = instruct_conversation(row, format, where)
    ledger.formats[format] += 1
    filled = {key for key, value in row.items() if value is not None}
    if unread := [*sorted(filled.difference(*KEYS[format])), *unread_keys(row, format)]:
        ledger.note(where, "keys that are not read", f"keys that are not read: {shown_names(unread)}")
    return conversation


def _format(row: Row, named: str | None, where: str) -> str:
    """The named format, or the one whose keys the row has and fills best. Raises DataError with the missing keys."""
    turns = row.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        row = row | {"messages": turns}
    formats = [named] if named else FORMATS

    def fullness(format: str) -> float:
        required = KEYS[format][0]
        return sum(row[key] is not None for key in required) / len(required)

    def likeness(format: str) -> float:
        required = KEYS[format][0]  # two similar keys (0.8) count less than one equal key
        return sum(1.0 if key in row else 0.4 * bool(get_close_matches(key, row)) for key in required) / len(required)

    if fitting := [format for format in formats if row.keys() >= set(KEYS[format][0])]:
        return max(fitting, key=fullness)  # tables have all columns in all rows; a missing value is null

    nearest = max(formats, key=likeness)
    missing = " and ".join(key for key in KEYS[nearest][0] if key not in row)
    keys = f"the row's keys are {shown_names(row)}"
    remedy = f"add it, or name the column that holds it: columns: {{{missing.split()[0]}: ...}}"
    if named or likeness(nearest):
        nearness = f"format {nearest} needs it" if named else f"the nearest format is {nearest}"
        raise DataError(where, f"{missing}: missing, {keys}; {nearness}: {remedy}", f"{missing}: missing")
    problem = f"{keys}, which fit none of {', '.join(FORMATS)}; name them: columns: {{prompt: ...}}"
    raise DataError(where, problem, "unknown keys")


def check_names(format: str | None, columns: Mapping[str, str], source: str) -> None:
    """Raise DataError if the recipe names a format or a key that does not exist."""
    if format is not None and format not in FORMATS:
        raise DataError(source, f"format {format!r}; must be one of {', '.join(FORMATS)}", "format")
    for ours in columns:
        if ours not in NAMES:
            near = get_close_matches(ours, NAMES, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(NAMES)}"
            raise DataError(source, f"columns: {ours!r} is not a known key; {remedy}", "columns")


def refuse_absent_columns(absent: Iterable[tuple[str, str]], row: Row, source: str) -> None:
    """Raise DataError for a column that a key of the source names and no row has; the message lists the keys of
    `row`."""
    for key, column in sorted(absent):
        near = get_close_matches(column, row, n=1)
        remedy = f"did you mean {shown_names(near)}?" if near else "check the spelling"
        keys = f"the first row's keys are {shown_names(row)}"
        raise DataError(source, f"{key}: no row has a column {column!r}; {keys}; {remedy}", "columns")


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with the columns of the recipe renamed to Graft's keys."""
    theirs = set(columns.values())
    ours = {name: row[column] for name, column in columns.items() if column in row}
    return {key: value for key, value in row.items() if key not in theirs} | ours
