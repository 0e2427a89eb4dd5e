"""One large JSON text, element by element: a list of rows, or the list under a key of an object.

Not ijson, which reads "\\ud800" as "?", keeps the last of two equal keys and tells no line, all in silence.
"""

import codecs
import json
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from data.conversation import DataError
from data.readers.fields import LONE_SURROGATE, shown
from data.readers.files import LINE_LIMIT, Row, Rows, not_utf8, open_bytes
from data.readers.jsonl import checked_object, decode, explained

CHUNK = 2**18  # bytes


class JsonStream:
    """One JSON text, read piece by piece: holds an element and a chunk in memory, whatever the size of the file."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self.chunks = codecs.iterdecode(iter(partial(file.read, CHUNK), b""), "utf-8-sig", "surrogateescape")
        self.text, self.at, self.line = "", 0, 1

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.line += self.text[self.at] == "\n"
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take(self, *marks: str) -> str:
        """Goes past one of the marks. Raises DataError where something else stands."""
        found = self.peek()
        if found not in marks:
            stands = shown(self.text[self.at : self.at + 20]) if found else "the end of the file"
            wanted = " or ".join(mark or "the end of the file" for mark in marks)
            raise DataError(self.where, f"{stands} where {wanted} is expected", "not JSON")
        self.at += 1
        return found

    def value(self) -> tuple[Any, list[DataError]]:
        """The value that begins here, and its flaws. Raises DataError where it is malformed: nothing can follow."""
        self.peek()
        while True:
            try:
                value, end, flaws = decode(self.text, self.at, self.where)
                if end < len(self.text) or not self._more():  # 12 at the end of a chunk may go on as 123
                    break
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > LINE_LIMIT or not self._more():
                    element = json.JSONDecodeError(error.msg, self.text[self.at :], error.pos - self.at)
                    raise explained(element, f"{self.path}:{self.line + element.lineno - 1}") from error
        if byte := LONE_SURROGATE.search(self.text, self.at, end):
            line = self.line + self.text.count("\n", self.at, byte.start())
            flaws.append(not_utf8(ord(byte[0]) - 0xDC00, f"{self.path}:{line}"))
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        return value, flaws

    def elements(self) -> Iterator[tuple[str, Any, list[DataError]]]:
        """Where it begins ("file:line"), value and flaws of each element of the list that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        mark = ","
        while mark == ",":
            if self.peek() == "]":
                raise DataError(self.where, "trailing comma after the last element; remove it", "trailing comma")
            where = self.where
            yield where, *self.value()
            mark = self.take(",", "]")

    def find_list(self, key: str) -> Row | None:
        """Goes to the list under `key` in the object that begins here: the members before it; None without such."""
        before: Row = {}
        self.take("{")
        while self.peek() == '"':
            name, _ = self.value()
            self.take(":")
            if name == key and self.peek() == "[":
                return before
            before[name], _ = self.value()
            if self.take(",", "}") == "}":
                break
        return None

    def _more(self) -> bool:
        """Appends as much as is held, so that a long element is scanned a few times only; False at the end."""
        pieces, held = [self.text[self.at :]], len(self.text) - self.at
        grown = 0
        while grown <= held and (chunk := next(self.chunks, "")):
            pieces.append(chunk)
            grown += len(chunk)
        if grown:
            self.text, self.at = "".join(pieces), 0
        return grown > 0


def read_list(path: Path) -> Rows:
    """Rows of a file that holds one JSON list of objects."""
    with open_bytes(path) as file:
        stream = JsonStream(path, file)
        for where, value, flaws in stream.elements():
            try:
                yield where, checked_object(value, flaws, where)
            except DataError as error:
                yield where, error
        stream.take("")
