"""Strict JSON, one object a line; every defect told with its line and remedy.

The standard decoder would let pass, or lose in silence, what is refused here: duplicate keys, NaN, deep nesting.
"""

import json
import sys
from pathlib import Path
from typing import Any

from data.conversation import DataError, Ledger
from data.readers.fields import refuse_lone_surrogates, shown, type_name
from data.readers.files import Row, Rows, not_utf8, read_lines


def read_jsonl(path: Path, ledger: Ledger) -> Rows:
    """Rows of a file that holds one JSON object a line; blank lines are allowed and counted as lines."""
    first = True
    for number, line in read_lines(path, ledger):
        where = f"{path}:{number}"
        if isinstance(line, DataError):
            yield where, line
        elif line.strip():
            if first:
                _refuse_other_layouts(line.split(), where)
            first = False
            try:
                yield where, parse_object(line, where)
            except DataError as error:
                yield where, error


def _refuse_other_layouts(words: list[bytes], where: str) -> None:
    """Raises one DataError for a whole file that would otherwise give one for each of its lines."""
    start = b"".join(words[:2])[:2]
    if start in (b"[", b"[{"):
        remedy = "name the file .json, or rewrite it: jq -c '.[]'"
        raise DataError(where, f"a JSON list where one object a line is expected; {remedy}", "JSON list in .jsonl")
    if start == b"{":
        problem = "pretty-printed JSON where one object a line is expected; rewrite it: jq -c ."
        raise DataError(where, problem, "pretty-printed JSON")


def parse_object(line: bytes, where: str) -> Row:
    """The object that the line is. Raises DataError that says what stands in its place."""
    try:
        text = line.decode().strip(" \t\r\n")
    except UnicodeDecodeError as error:
        raise not_utf8(line[error.start], where, f"byte {error.start + 1} of the line: ") from error
    try:
        value, end, flaws = decode(text, 0, where)
    except json.JSONDecodeError as error:
        raise explained(error, where) from error
    if rest := text[end:].lstrip():
        if rest[0] == "{":
            raise DataError(where, "two objects on one line; put each on its own", "two objects on a line")
        problem = f"{shown(rest)} after the object, which ends at column {end}; remove it"
        raise DataError(where, problem, "text after the object")
    return checked_object(value, flaws, where)


def checked_object(value: Any, flaws: list[DataError], where: str) -> Row:
    """The value, if it is an object without flaws; raises the DataError otherwise."""
    if flaws:
        raise flaws[0]
    if not isinstance(value, dict):
        problem = f"{type_name(value)} {shown(value)} where an object is expected, like {{...}}"
        raise DataError(where, problem, "not an object")
    refuse_lone_surrogates(value, where)
    return value


def decode(text: str, start: int, where: str) -> tuple[Any, int, list[DataError]]:
    """The JSON value at `start`, where it ends, and what the decoder takes though JSON forbids it.

    Raises json.JSONDecodeError where it is malformed or goes on after the text, and DataError where it can't be read.
    """
    flaws: list[DataError] = []

    def unique_keys(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            flaws.append(DataError(where, f"key {shown(twice)} occurs twice; keep one", "duplicate keys"))
        return row

    def constant(name: str) -> None:
        problem = f"{name} is not JSON; write null or leave the key out"
        flaws.append(DataError(where, problem, "NaN or Infinity"))

    try:
        value, end = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=constant).raw_decode(text, start)
    except RecursionError as error:
        raise DataError(where, "nested too deeply to be read; a row is a flat object", "nested too deeply") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # Python's guard against quadratic time
        problem = f"a number of more than {sys.get_int_max_str_digits()} digits; write it as text"
        raise DataError(where, problem, "number too long") from error
    return value, end, flaws


def explained(error: json.JSONDecodeError, where: str) -> DataError:
    """What the user did, of which the decoder only sees the end."""
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :]
    if after[:1] in ("}", "]") and before.endswith(","):
        problem, kind = "trailing comma; remove it", "trailing comma"
    elif error.msg.startswith("Unterminated string"):
        problem = "this text has no end; the row is cut off, or a line break in a text is not written \\n"
        kind = "text without end"
    elif error.msg.startswith("Invalid control character"):
        problem = f"raw control character U+{ord(after[0]):04X} inside a text; write \\u{ord(after[0]):04x}"
        kind = "raw control character"
    elif not after.strip():
        problem, kind = "ends inside the object; the row is cut off or goes over several lines", "cut off"
    elif after.startswith("'"):
        problem, kind = "single quotes; JSON wants double quotes, write rows with json.dumps", "single quotes"
    else:
        problem, kind = f"not JSON: {error.msg} at {shown(after[:20])}; write rows with json.dumps", "not JSON"
    return DataError(where, f"column {error.colno}: {problem}", kind)
