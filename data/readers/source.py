"""A source of the recipe -> conversations, read one by one, so that files of any size fit in memory.

A source is a file, a glob, a folder, a Hub dataset `owner/name`, or sklearn:20newsgroups. The format of a row is
recognised by its keys.
"""

import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

from data.conversation import Conversation, DataError, Ledger
from data.progress import track
from data.readers.fields import note_odd_characters, shown
from data.readers.files import SUFFIXES, Row, Rows, check_encoding, data_suffix
from data.readers.newsgroups import SKLEARN, posts_of, read_post, read_sklearn
from data.readers.prompts import FORMAT, PromptLike, columns_in, templates_of, with_prompt, written_row
from data.readers.raw_text import read_paragraphs
from data.readers.row_formats import check_names, refuse_absent_columns, renamed, row_conversation
from data.readers.squad import read_articles
from data.readers.strict_json import json_layout, read_jsonl, read_list
from data.readers.tables import read_csv, read_hub, read_parquet
from data.terminal import print

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class SourceLike(PromptLike, Protocol):
    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def config(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def columns(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class FileSource:
    """A source that is not part of a recipe."""

    path: str
    format: str | None = None
    split: str | None = None
    config: str | None = None  # configuration of a Hub dataset
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # Graft's key -> the file's column
    system: str | None = None  # see data/readers/prompts.py
    prompt: str | None = None
    completion: str | None = None


def read_all(source: SourceLike, task: str, on_error: str = "stop", ledger: Ledger | None = None) -> list[Conversation]:
    """All conversations of a source, counted in the ledger. Raises DataError with a line for each kind of defect.

    With on_error skip, rows with defects are counted and left out; only a file that can't be read to its end is an
    error.
    """
    ledger = ledger or Ledger(source.path)
    conversations = list(track(read_rows(source, task, ledger), f"read {Path(source.path).name}"))
    if ledger.unread or (ledger.defects and on_error == "stop"):
        raise DataError("", "\n".join(ledger.explain()), "defects")
    if ledger.defects:
        print(f"{ledger.defects.total()} rows of {source.path} have defects and are left out", flush=True)
    return conversations


def read_rows(source: SourceLike, task: str, ledger: Ledger) -> Iterator[Conversation]:
    """The source's conversations in order. Rows with defects, and files that can't be read to their end, go to the
    ledger; nothing is raised for them.

    task: squad_v1, squad_v2, newsgroups or instruct decides only what rows leave open (see squad_version); for text
    only the text of a row is read.
    Raises DataError if the source itself is wrong: no such file, a setting that does not apply, a column in no row.
    """
    check_names(source.format, source.columns, source.path)
    templates, first = templates_of(source), Row()
    format = FORMAT if templates.keys() - {"system"} else source.format
    named = [*((f"columns.{ours}", theirs) for ours, theirs in source.columns.items())]
    absent = {*named, *((key, column) for key, template in templates.items() for column in columns_in(template))}
    ids: set[int] = set()  # hashes: about 70 bytes per id of any length
    for where, row in _rows(source, ledger, task == "text"):
        ledger.rows += 1
        if isinstance(row, DataError):
            ledger.defect(row)
            continue
        first = first or row
        if absent:
            absent = {(key, column) for key, column in absent if column not in row}
        try:
            raw, row = row, renamed(written_row(row, source, where), source.columns)
            conversation = row_conversation(row, format, task, where, ledger)
            conversation = with_prompt(conversation, raw, source, where) if templates else conversation
            conversation = _with_own_id(conversation, row, ids, ledger)
        except DataError as error:
            ledger.defect(error)
            continue
        note_odd_characters(conversation, ledger)
        yield conversation
    if first and not ledger.unread:  # an unread row may have the column
        refuse_absent_columns(absent, first, source.path)


def files_of(source: SourceLike) -> list[Path]:
    """Sorted local files of a source; none for Hub datasets and scikit-learn. Raises DataError if no file exists."""
    path = Path(source.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        data_files = sorted(p for p in path.iterdir() if p.is_file() and data_suffix(p) in SUFFIXES)
        if files := data_files or posts_of(path):
            return files
        problem = f"a folder without {', '.join(SUFFIXES)} files, and without subfolders named after newsgroups"
        raise DataError(
            source.path, f"{problem}; for files in deeper folders write {source.path}/**/*.jsonl", "no data"
        )
    if glob.has_magic(source.path):
        if files := sorted(p for p in set(map(Path, glob.glob(source.path, recursive=True))) if p.is_file()):
            return files  # a set: two ** match a file more than once
        raise DataError(source.path, "no file matches; ** matches any folders, * any name", "no data")
    if source.path == SKLEARN or is_hub_id(source.path):
        return []
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    remedy = (
        f"did you mean {path.parent / near[0]}?" if near else "give a file, a glob, a folder or a Hub id owner/name"
    )
    raise DataError(source.path, f"no such file; {remedy}", "no data")


def is_hub_id(name: str) -> bool:
    """True for `owner/name` that is no local path and has no suffix of a data file."""
    path = Path(name)
    return bool(HUB_ID.fullmatch(name)) and not path.exists() and data_suffix(path) not in SUFFIXES


def hub_revision(name: str, revision: str | None) -> str | None:
    """The current commit of `revision` of a Hub dataset; None if the Hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    if revision and COMMIT.fullmatch(revision):
        return revision
    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except (HTTPError, OSError, ValueError):  # no connection or no such dataset: reading it raises
        return None


def _rows(source: SourceLike, ledger: Ledger, raw: bool) -> Rows:
    """Rows of all files in order. If a file can't be read to its end, the ledger records the place and the number of
    rows before it."""
    files = files_of(source)
    _check_settings(source, files)
    _note_unread_files(Path(source.path), files, ledger)
    if source.path == SKLEARN:
        parts = [(SKLEARN, read_sklearn(source.split))]
    elif not files:
        parts = [(source.path, read_hub(source.path, source.config, source.split, source.revision))]
    else:
        parts = [(str(p), _file_rows(p, p.parent.parent == Path(source.path), ledger, raw)) for p in files]
    for name, rows in parts:
        count = 0
        try:
            for row in rows:
                count += 1
                yield row
        except DataError as error:
            read = f"after {count:,} row{'s' if count > 1 else ''}, the rest is unread" if count else "no row is read"
            ledger.break_off(DataError(error.where, f"{error.problem} ({read})", error.kind))
        else:
            if not count:
                ledger.break_off(DataError(name, "holds no row; give one with data or leave it out", "no row"))


def _check_settings(source: SourceLike, files: list[Path]) -> None:
    """Raise DataError for a setting that this kind of source does not have."""
    if not files and source.path != SKLEARN:
        return
    settings = {"config": source.config, "revision": source.revision} | ({"split": source.split} if files else {})
    for name, value in settings.items():
        if value is not None:
            kind = "a file" if files else SKLEARN
            raise DataError(source.path, f"{name} {value!r}: {kind} has no {name}; leave it out", "setting")


def _file_rows(path: Path, in_group_folder: bool, ledger: Ledger, raw: bool) -> Rows:
    suffix = data_suffix(path)
    if in_group_folder and suffix not in SUFFIXES:
        yield from read_post(path)
    elif suffix == ".parquet":
        yield from read_parquet(path)
    elif raw and suffix == ".txt":
        check_encoding(path, ledger)
        yield from read_paragraphs(path, ledger)
    elif suffix not in SUFFIXES:
        allowed = ", ".join(SUFFIXES)
        raise DataError(str(path), f"suffix {suffix!r}; must be one of {allowed}, or that and .gz", "suffix")
    else:
        check_encoding(path, ledger)
        layout = json_layout(path) if suffix == ".json" else suffix
        if layout == ".csv":
            yield from read_csv(path, ledger)
        elif layout == "list":
            yield from read_list(path)
        elif layout == "articles":
            yield from read_articles(path)
        else:  # .jsonl, and .json files with one object a line
            yield from read_jsonl(path, ledger)


def _note_unread_files(folder: Path, files: list[Path], ledger: Ledger) -> None:
    """Note the files of a folder, and of its group folders, that are not read, except the folder's hidden files."""
    if folder.is_dir():
        groups = {path.parent for path in files} - {folder}
        left = {path for path in folder.iterdir() if not path.name.startswith(".")}
        left.update(path for group in groups for path in group.iterdir())
        for path in sorted(left - groups - set(files)):
            ledger.note(str(path), "left unread in the folder")


def _with_own_id(conversation: Conversation, row: Row, ids: set[int], ledger: Ledger) -> Conversation:
    """The conversation with the id of its row, if the row has one that no earlier row has.

    Raises DataError if the id of a SQuAD question occurs twice, since answers are scored by it.
    """
    id = row.get("id")
    if id is None or id == "":
        return conversation
    if hash(str(id)) not in ids:
        ids.add(hash(str(id)))
        return replace(conversation, id=str(id))
    problem = f"id: {shown(id)} occurs in an earlier row"
    if "answers" in row:
        problem += "; ids must be unique to be scored, remove or rename one"
        raise DataError(conversation.where, problem, "id occurs twice")
    ledger.note(conversation.where, "id of an earlier row", f"{problem}; this row is named by its place")
    return conversation
