"""Read a data file as bytes or lines: gzip is detected, sizes are limited, the encoding is checked."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from data.conversation import DataError, Ledger

Row = dict[str, Any]
# What every reader of this package yields: the place of a row, and the row or its defect. A DataError that is yielded
# costs one row; a DataError that is raised ends the file, whose other rows can't be read or counted.
Rows = Iterator[tuple[str, Row | DataError]]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
LONG_LINE = 2**20  # bytes; noted, as most such rows are longer than max_length
LINE_LIMIT = 64 * 2**20  # bytes; a longer line is skipped without being held in memory
# bytes, and times the size of a gzip file: a content above both is no data. JSON packs to 1/3 - 1/20, gzip's bound is
# 1/1032
UNPACKED_LIMIT, UNPACKED_TIMES = 2**24, 200
GZIP, BOM, UTF_16 = b"\x1f\x8b", b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
UTF_32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")  # in cp1252
LONG_RUN = re.compile(rb"[\x80-\xff]{4}")  # more than a Western word has of accented letters in a row


def data_suffix(path: Path) -> str:
    """The suffix in lower case without `.gz`: `.jsonl` for rows.jsonl, rows.JSONL and rows.jsonl.gz."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


class _Unpacked(RawIOBase):
    """The content of a gzip file. Raises DataError if it is too much larger than the file to be data: a gzip bomb."""

    def __init__(self, unpacked: gzip.GzipFile, path: Path) -> None:
        self.unpacked, self.path, self.count = unpacked, path, 0
        self.limit = max(UNPACKED_LIMIT, UNPACKED_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.unpacked.read1(len(buffer))  # readinto would lose the bytes before a broken end
        buffer[: len(piece)] = piece
        self.count += len(piece)
        if self.count > self.limit:
            problem = (
                f"unpacks to more than {self.limit:,} bytes, {UNPACKED_TIMES} times its size; if it is data, unpack it"
            )
            raise DataError(str(self.path), problem, "gzip bomb")
        return len(piece)


@contextmanager
def open_bytes(path: Path) -> Iterator[BufferedReader]:
    """The file's bytes, unpacked if they are gzip's. Raises DataError if the file can't be read to its end."""
    try:
        with path.open("rb") as file:
            if file.peek(2)[:2] != GZIP:
                yield file
                return
            with gzip.open(file) as unpacked:
                yield BufferedReader(_Unpacked(unpacked, path), 2**17)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problem = f"broken gzip file: {error}; copy or pack the file again"
        raise DataError(str(path), problem, "broken gzip file") from error
    except OSError as error:
        raise DataError(
            str(path),
            f"can't be read: {error.strerror or error}; check that the file is complete and that you may read it",
            "can't be read",
        ) from error


def check_encoding(path: Path, ledger: Ledger) -> None:
    """Refuse UTF-16 and UTF-32, and note a UTF-8 byte order mark, which all readers skip."""
    with open_bytes(path) as file:
        head = file.peek(64)[:64]
    if head[:2] in UTF_16 or head[:4] in UTF_32:
        bits, mark = (32, head[:4]) if head[:4] in UTF_32 else (16, head[:2])
        remedy = f"convert it: iconv -f utf-{bits} -t utf-8 {path.name}"
        raise DataError(str(path), f"UTF-{bits} (it begins with {mark.hex(' ').upper()}); {remedy}", f"UTF-{bits}")
    if b"\0" in head:
        order = "be" if head[0] == 0 else "le"
        problem = f"UTF-16 without a byte order mark, or no text (NUL is byte {head.index(0) + 1})"
        raise DataError(str(path), f"{problem}; convert it: iconv -f utf-16{order} -t utf-8 {path.name}", "UTF-16")
    if head.startswith(BOM):
        ledger.note(str(path), "UTF-8 byte order mark", "begins with a UTF-8 byte order mark, skipped")


def read_lines(path: Path, ledger: Ledger) -> Iterator[tuple[int, bytes | DataError]]:
    """Line numbers from 1, and lines with their line ends; a line above LINE_LIMIT yields a defect instead."""
    with open_bytes(path) as file:
        number, crlf = 0, False
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if len(line) > LINE_LIMIT:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONG_LINE)
                problem = f"line of more than {LINE_LIMIT:,} bytes; split the row or leave it out"
                yield number, DataError(f"{path}:{number}", problem, "line beyond the limit")
                continue
            if len(line) > LONG_LINE:
                ledger.note(f"{path}:{number}", "long line", f"line of {len(line):,} bytes")
            if line.endswith(b"\r\n") and not crlf:
                crlf = True
                ledger.note(str(path), "CRLF line ends", f"CRLF line ends from line {number}, read like LF")
            yield number, line


def row_or_defect(check: Callable[..., Row], *values: Any) -> Row | DataError:
    """The result of `check`, or the DataError that it raises."""
    try:
        return check(*values)
    except DataError as error:
        return error


def not_utf8(content: bytes | str, where: str, place: str = "") -> DataError:
    """The defect of a line or value that holds bytes which are not UTF-8, or that was decoded with surrogateescape."""
    raw = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    text = raw.decode(errors="surrogateescape")
    first = next(character for character in text if "\udc80" <= character <= "\udcff")
    problem = f"byte 0x{ord(first) - 0xDC00:02X}, which is not UTF-8; {_remedy(raw, text)}"
    return DataError(where, place + problem, "not UTF-8")


def _remedy(raw: bytes, text: str) -> str:
    """How to convert a text that is not UTF-8. cp1252 is what Windows saves in the West; it has all letters of latin1,
    and quotes, dashes and the euro sign where latin1 has control characters."""
    escaped = sum("\udc80" <= character <= "\udcff" for character in text)
    letters = sum(not character.isascii() for character in text) - escaped
    if letters >= escaped or (letters and not LONG_RUN.search(raw)):
        return "other characters of it are UTF-8, so converting the file would damage those; correct this place"
    if UNDEFINED.search(raw) or LONG_RUN.search(raw):
        return (
            "convert the file from its own encoding: iconv -f ENCODING -t utf-8, with gb18030 for Chinese, cp932 for "
            "Japanese, cp949 for Korean, cp1251 for Russian, macintosh for an old Mac"
        )
    return "convert the file, perhaps: iconv -f cp1252 -t utf-8"
