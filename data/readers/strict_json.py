"""Strict JSON: one object a line, or one text that holds a list; every defect has its line and a remedy.

The standard decoder silently accepts duplicate keys and NaN, which are refused here. ijson accepts them too, reads
"\\ud800" as "?" and reports no line.
"""

import json
import re
import sys
from collections.abc import Iterator
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, Literal

from data.conversation import DataError, Ledger
from data.readers.fields import LONE_SURROGATE, shown, type_name, without_lone_surrogates
from data.readers.files import LINE_LIMIT, Row, Rows, not_utf8, open_bytes, read_lines, row_or_defect

CHUNK = 2**18  # characters
SPACE = re.compile(r"[ \t\r\n]*")


def read_jsonl(path: Path, ledger: Ledger) -> Rows:
    """Rows of a file with one JSON object a line; blank lines are skipped, but count as lines."""
    first = True
    for number, line in read_lines(path, ledger):
        where = f"{path}:{number}"
        if isinstance(line, DataError):
            yield where, line
        elif line.strip():
            if first:
                _refuse_other_layouts(line.split(), where)
            first = False
            yield where, row_or_defect(parse_object, line, where)


def _refuse_other_layouts(words: list[bytes], where: str) -> None:
    """Raise one DataError for a file in another layout, which would otherwise give one for each line."""
    start = b"".join(words[:2])[:2]
    if start in (b"[", b"[{"):
        remedy = "name the file .json, or rewrite it: jq -c '.[]'"
        raise DataError(where, f"a JSON list where one object a line is expected; {remedy}", "JSON list in .jsonl")
    if start == b"{":
        problem = "pretty-printed JSON where one object a line is expected; rewrite it: jq -c ."
        raise DataError(where, problem, "pretty-printed JSON")


def json_layout(path: Path) -> Literal["list", "articles", "lines"]:
    """The layout of a .json file: a list of rows, an object with a list under "data", or one object a line."""
    with open_bytes(path) as file:
        text = JsonText(path, file)
        try:
            if text.peek() == "[":
                return "list"
            return "lines" if text.find_list("data") is None else "articles"
        except DataError:  # read_jsonl reports the defect
            return "lines"


def read_list(path: Path) -> Rows:
    """Rows of a file that holds one JSON list of objects."""
    with open_bytes(path) as file:
        for where, value, flaw in JsonText(path, file).elements(""):
            yield where, row_or_defect(checked_object, value, flaw, where)


class JsonText:
    """One JSON text, decoded value by value: one value and one chunk are in memory, for files of any size."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file = path, TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        self.text, self.at, self.line = "", 0, 1

    def elements(self, *after: str) -> Iterator[tuple[str, Any, DataError | None]]:
        """Place ("file:line"), value and flaw of each element of the list that begins here. One of the marks `after`
        must follow the list; "" is the end of the text."""
        self.take("[")
        mark = self.take("]") if self.peek() == "]" else ","
        while mark == ",":
            if self.peek() == "]":
                raise DataError(self.where, "trailing comma after the last element; remove it", "trailing comma")
            where = self.where
            yield where, *self.value()
            mark = self.take(",", "]")
        self.take(*after)

    def find_list(self, key: str) -> Row | None:
        """Go to the list under `key` in the object that begins here. Returns the members before it, else None."""
        before: Row = {}
        mark = self.take("{")
        while mark != "}" and self.peek() == '"':
            name, _ = self.value()
            self.take(":")
            if name == key and self.peek() == "[":
                return before
            before[name], _ = self.value()
            mark = self.take(",", "}")
        return None

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the text."""
        while True:
            space = SPACE.match(self.text, self.at)
            self._go_to(space.end() if space else self.at)
            if self.at < len(self.text) or not self._read_more():
                return self.text[self.at : self.at + 1]

    def take(self, *marks: str) -> str:
        """Go past one of the marks and return it. Raises DataError if another character comes next."""
        mark = self.peek()
        if mark not in marks:
            next_text = shown(self.text[self.at : self.at + 20]) if mark else "the end of the file"
            wanted = " or ".join(mark or "the end of the file" for mark in marks)
            raise DataError(self.where, f"{next_text} where {wanted} is expected", "not JSON")
        self.at += 1
        return mark

    def value(self) -> tuple[Any, DataError | None]:
        """The value that begins here, and its flaw. Raises DataError if it is malformed: the rest can't be read."""
        self.peek()
        while True:
            try:
                value, end, flaw = decode(self.text, self.at, self.where)
                if end < len(self.text) or not self._read_more():  # 12 at the end of a chunk may continue as 123
                    break
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > LINE_LIMIT or not self._read_more():
                    element = json.JSONDecodeError(error.msg, self.text[self.at :], error.pos - self.at)
                    raise malformed(element, f"{self.path}:{self.line + element.lineno - 1}") from error
        if byte := LONE_SURROGATE.search(self.text, self.at, end):
            line = self.line + self.text.count("\n", self.at, byte.start())
            flaw = flaw or not_utf8(self.text[self.at : end], f"{self.path}:{line}")
        self._go_to(end)
        return value, flaw

    def _go_to(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _read_more(self) -> bool:
        """Read as much as is in memory, so that a long value is scanned only a few times; False at the end."""
        if chunk := self.file.read(max(CHUNK, len(self.text) - self.at)):
            self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)


def parse_object(line: bytes, where: str) -> Row:
    """The line's object. Raises DataError if the line is not exactly one object."""
    try:
        text = line.decode().strip(" \t\r\n")
    except UnicodeDecodeError as error:
        raise not_utf8(line, where, f"byte {error.start + 1} of the line: ") from error
    try:
        value, end, flaw = decode(text, 0, where)
    except json.JSONDecodeError as error:
        raise malformed(error, where) from error
    if rest := text[end:].lstrip():
        if rest[0] == "{":
            raise DataError(where, "two objects on one line; put each on its own", "two objects on a line")
        problem = f"{shown(rest)} after the object, which ends at column {end}; remove it"
        raise DataError(where, problem, "text after the object")
    return checked_object(value, flaw, where)


def checked_object(value: Any, flaw: DataError | None, where: str) -> Row:
    """The value, if it is an object without a flaw; raises DataError otherwise."""
    if flaw:
        raise flaw
    if not isinstance(value, dict):
        problem = f"{type_name(value)} {shown(value)} where an object is expected, like {{...}}"
        raise DataError(where, problem, "not an object")
    return without_lone_surrogates(value, where)


def decode(text: str, start: int, where: str) -> tuple[Any, int, DataError | None]:
    """The JSON value at `start`, its end, and its first flaw: what the decoder accepts although JSON forbids it.

    Raises json.JSONDecodeError if the value is malformed or not complete, and DataError if it can't be decoded.
    """
    flaws: list[DataError] = []

    def unique_keys(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            duplicate = next(key for key in keys if keys.count(key) > 1)
            flaws.append(DataError(where, f"key {shown(duplicate)} occurs twice; keep one", "duplicate keys"))
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
    except ValueError as error:  # Python's limit on digits
        problem = f"a number of more than {sys.get_int_max_str_digits()} digits; write it as text"
        raise DataError(where, problem, "number too long") from error
    return value, end, flaws[0] if flaws else None


def malformed(error: json.JSONDecodeError, where: str) -> DataError:
    """The decoder's error in the user's terms: the likely mistake and its remedy."""
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
