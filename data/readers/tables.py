"""Rows of tables: CSV, Parquet and Hub datasets."""

import csv
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from data.conversation import DataError, Ledger
from data.readers.fields import LONE_SURROGATE, shown, shown_names
from data.readers.files import LINE_LIMIT, Row, Rows, not_utf8, read_lines
from data.readers.tools import CALL_KEYS
from data.readers.tools import ROW_KEYS as TOOL_KEYS

COLUMNS = 1_000  # of a CSV file; each row gets a value for every one
REASON = 200  # characters of a library's message, so that it can list a dataset's configurations


def read_csv(path: Path, ledger: Ledger) -> Rows:
    """Rows of a file with a header line; all cells are text, and missing cells at the end of a row are empty text.

    A row's place is the line in which it begins: quoted cells may hold line breaks.
    """
    csv.field_size_limit(LINE_LIMIT)  # for the whole process; the default is 128 KB
    reader = csv.reader(_texts(path, ledger), strict=True)  # strict: an open quote must not silently swallow the file
    header: list[str] = []
    while True:
        begin = reader.line_num + 1
        where = f"{path}:{begin}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            remedy = 'put cells with commas, quotes or line breaks in quotes, and write a quote in them as ""'
            defect = DataError(where, f"not CSV: {error}; {remedy}", "not CSV")
            # the next row is known to begin at the next line only after an error within one line
            if not header or reader.line_num > begin or str(error) == "unexpected end of data":
                raise defect from error
            yield where, defect
            continue
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if not header:
            header = _checked_header(cells, where)
        elif LONE_SURROGATE.search(row := "".join(cells)):
            yield where, not_utf8(row, where)
        elif not row:  # Excel writes ",," for rows below a table that were once formatted
            ledger.note(where, "row of empty cells, skipped")
        elif len(cells) > len(header):
            problem = f"{len(cells)} cells in a table of {len(header)} columns; put cells with commas in quotes"
            yield where, DataError(where, problem, "too many cells")
        else:
            yield where, dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=True))


def _checked_header(cells: list[str], where: str) -> list[str]:
    """The names of the columns. Raises DataError if they are not usable, since then no row can be read."""
    if LONE_SURROGATE.search(names := "".join(cells)):
        raise not_utf8(names, where, "header: ")
    if len(cells) > COLUMNS:
        problem = f"{len(cells):,} columns, the limit is {COLUMNS:,}; leave out those that hold no text"
        raise DataError(where, problem, "too many columns")
    if duplicates := [cell for cell, count in Counter(cells).items() if count > 1]:
        raise DataError(where, f"column {shown(duplicates[0])} occurs twice; rename one", "two columns of one name")
    if len(cells) == 1 and (mark := next((mark for mark in ";\t" if mark in cells[0]), "")):
        problem = f"columns {shown(cells[0])} are separated by {mark!r}; save it with commas"
        raise DataError(where, problem, "no commas")
    return cells


def _texts(path: Path, ledger: Ledger) -> Iterator[str]:
    for _, line in read_lines(path, ledger):
        if isinstance(line, DataError):
            raise line  # it may be inside a quoted cell, so the next row's begin is unknown
        yield line.decode("utf-8", errors="surrogateescape")


def read_parquet(path: Path) -> Rows:
    """Rows of a Parquet file, batch by batch."""
    return _streamed(str(path), "check that the file is complete", "parquet", data_files=str(path), split="train")


def read_hub(name: str, config: str | None, split: str | None, revision: str | None) -> Rows:
    """Rows of a split of a Hub dataset; the default split is `train`."""
    split = split or "train"
    source = f"{name}[{f'{config}, ' if config else ''}{split}]"
    remedy = "no such path; for a Hub dataset check name, config, split, revision and connection"
    limit = _only_files_of(name, source)
    return _streamed(source, remedy, name, limit, name=config, split=split, revision=revision)


def without_padding(row: Row) -> Row:
    """The row without the nulls that Arrow, whose objects all have the same keys, puts into tools and their calls."""
    turns = {key: row[key] for key in ("messages", "conversations") if isinstance(row.get(key), list)}
    padded = {key: _filled(row[key]) for key in TOOL_KEYS if key in row}
    for key, messages in turns.items():
        padded[key] = [
            {k: _filled(v) if k in CALL_KEYS else v for k, v in m.items()} if isinstance(m, dict) else m
            for m in messages
        ]
    return {**row, **padded}


def _filled(value: Any) -> Any:
    """A JSON value without the keys that are null in it."""
    if isinstance(value, dict):
        return {key: _filled(each) for key, each in value.items() if each is not None}
    return [_filled(each) for each in value] if isinstance(value, list) else value


@contextmanager
def _only_files_of(name: str, source: str) -> Iterator[None]:
    """Refuse files outside the Hub dataset, which its card may name: of another server, or of this machine."""
    from datasets import config, data_files

    resolve = data_files.resolve_pattern
    own = (f"hf://datasets/{name}@", f"{config.HF_ENDPOINT}/datasets/{name}/")

    def checked(pattern: str, base_path: str, *rest: Any, **options: Any) -> list[str]:
        path = data_files.xjoin(base_path, pattern) if data_files.is_relative_path(pattern) else pattern
        if not path.startswith(own) or "::" in path or ".." in path.split("/"):
            problem = (
                f"its card names the file {shown(path)}, which is not of the dataset; name a dataset that holds its "
                "files, or download that file yourself if you trust it"
            )
            raise DataError(source, problem, "file outside the dataset")
        return resolve(pattern, base_path, *rest, **options)

    data_files.resolve_pattern = checked
    try:
        yield
    finally:
        data_files.resolve_pattern = resolve


def _streamed(
    source: str, remedy: str, path: str, limit: AbstractContextManager[None] | None = None, **arguments: Any
) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError
    from pyarrow import ArrowException

    # RuntimeError: a dataset with a script; TypeError: rows without a common type; the last two: a truncated archive
    broken = (
        HTTPError, DatasetsError, ArrowException, OSError, ValueError, TypeError, RuntimeError, EOFError, zlib.error
    )  # fmt: skip
    try:
        with limit or nullcontext():  # the names of files are resolved here, not while rows are read
            rows = load_dataset(path, streaming=True, **arguments)
        # a row's image or sound may be named by any address, and is no text
        for number, row in enumerate(rows.decode(False), start=1):
            yield f"{source}: row {number}", without_padding(row)
    except broken as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if "onfig name is missing" in reason or "BuilderConfig" in reason:
            remedy = "set config"
        raise DataError(source, f"can't be read: {shown_names([reason], REASON)}; {remedy}", "can't be read") from error
