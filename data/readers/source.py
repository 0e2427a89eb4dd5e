"""A source of the recipe -> conversations, one after the other, whatever its format and the size of its files.

A source is a file, a glob, a folder, a Hub dataset `owner/name`, or sklearn:20newsgroups. Its rows' format is told by
their keys.
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
from data.readers.files import BOM, SUFFIXES, Row, Rows, check_encoding, data_suffix, open_bytes
from data.readers.json_stream import read_list
from data.readers.jsonl import read_jsonl
from data.readers.newsgroups import SKLEARN, posts_of, read_post, read_sklearn
from data.readers.raw_text import read_paragraphs
from data.readers.row_formats import check_names, refuse_unseen, renamed, row_conversation
from data.readers.squad import holds_articles, read_articles
from data.readers.tables import read_csv, read_hub, read_parquet

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class SourceLike(Protocol):
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
    """A source outside a recipe."""

    path: str
    format: str | None = None
    split: str | None = None
    config: str | None = None  # of a Hub dataset
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # our name -> the file's


def read_all(source: SourceLike, task: str, on_error: str = "stop", ledger: Ledger | None = None) -> list[Conversation]:
    """All conversations of a source, counted in the ledger. Raises DataError with a line for each kind of defect; with
    on_error skip rows with defects are counted and left out, and only a file that can't be read to its end is an error.
    """
    ledger = ledger or Ledger(source.path)
    conversations = list(track(read_rows(source, task, ledger), f"read {Path(source.path).name}"))
    if ledger.unread or (ledger.defects and on_error == "stop"):
        raise DataError("", "\n".join(ledger.explain()), "defects")
    if ledger.defects:
        print(f"{ledger.defects.total()} rows of {source.path} have defects and are left out", flush=True)
    return conversations


def read_rows(source: SourceLike, task: str, ledger: Ledger) -> Iterator[Conversation]:
    """The source's conversations in order; rows that can't be used are told to the ledger and left out, and so is the
    rest of a file that can't be read on.

    task: squad_v1, squad_v2, newsgroups or instruct; it only decides what rows leave open, see squad_version. Of task
    text a row's text is all that is read.
    Raises DataError where the source itself is wrong: no such file, a setting that it has not, a column in no row.
    """
    check_names(source.format, source.columns, source.path)
    unseen, first = dict(source.columns), Row()
    ids: set[int] = set()  # hashes: some 70 bytes an id, whatever its length
    for where, row in _rows(source, ledger, task == "text"):
        ledger.rows += 1
        if isinstance(row, DataError):
            ledger.defect(row)
            continue
        first = first or row
        if unseen:
            unseen = {ours: theirs for ours, theirs in unseen.items() if theirs not in row}
        try:
            row = renamed(row, source.columns)
            conversation = row_conversation(row, source.format, task, where, ledger)
            conversation = _with_own_id(conversation, row, ids, ledger)
        except DataError as error:
            ledger.defect(error)
            continue
        note_odd_characters(conversation, ledger)
        yield conversation
    if first and not ledger.unread:  # else an unread row may have the column
        refuse_unseen(unseen, first, source.path)


def files_of(source: SourceLike) -> list[Path]:
    """Local files behind a source, sorted; none for Hub datasets and scikit-learn. Raises DataError: nothing there."""
    path = Path(source.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        data_files = sorted(p for p in path.iterdir() if p.is_file() and data_suffix(p) in SUFFIXES)
        if files := data_files or posts_of(path):
            return files
        problem = f"a folder without {', '.join(SUFFIXES)} files, and without subfolders named after newsgroups"
        raise DataError(source.path, f"{problem}; for files further down write {source.path}/**/*.jsonl", "no data")
    if glob.has_magic(source.path):
        if files := sorted(p for p in set(map(Path, glob.glob(source.path, recursive=True))) if p.is_file()):
            return files  # a set: two ** find a file more than once
        raise DataError(source.path, "no file matches; ** stands for any folders, * for any name", "no data")
    if source.path == SKLEARN or is_hub_id(source.path):
        return []
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    remedy = (
        f"did you mean {path.parent / near[0]}?" if near else "give a file, a glob, a folder or a Hub id owner/name"
    )
    raise DataError(source.path, f"no such file; {remedy}", "no data")


def is_hub_id(name: str) -> bool:
    """`owner/name` that is not a path here and has no data file's suffix."""
    path = Path(name)
    return bool(HUB_ID.fullmatch(name)) and not path.exists() and data_suffix(path) not in SUFFIXES


def hub_revision(name: str, revision: str | None) -> str | None:
    """The commit that `revision` of a Hub dataset stands for; None where the Hub can't be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    if revision and COMMIT.fullmatch(revision):
        return revision
    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except (HTTPError, OSError, ValueError):  # no connection or no such dataset: reading it will tell
        return None


def _rows(source: SourceLike, ledger: Ledger, raw: bool) -> Rows:
    """Rows of all files, one after the other, of each up to where it can't be read on."""
    files = files_of(source)
    _refuse_settings(source, files)
    if source.path == SKLEARN:
        yield from _until_broken(SKLEARN, read_sklearn(source.split), ledger)
    elif not files:
        rows = read_hub(source.path, source.config, source.split, source.revision)
        yield from _until_broken(source.path, rows, ledger)
    _note_left_files(Path(source.path), files, ledger)
    for path in files:
        in_group_folder = path.parent.parent == Path(source.path)
        yield from _until_broken(str(path), _file_rows(path, in_group_folder, ledger, raw), ledger)


def _until_broken(name: str, rows: Rows, ledger: Ledger) -> Rows:
    """The rows up to where they can't be read on; the ledger is told how many they were and that the rest is unread."""
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


def _refuse_settings(source: SourceLike, files: list[Path]) -> None:
    """Raises DataError for a setting that this kind of source has not."""
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
        if suffix == ".csv":
            yield from read_csv(path, ledger)
        else:
            yield from (read_jsonl(path, ledger) if suffix == ".jsonl" else _json_rows(path, ledger))


def _json_rows(path: Path, ledger: Ledger) -> Rows:
    """Of a .json file: a list, SQuAD's articles, or what many such files hold, one object a line."""
    with open_bytes(path) as file:
        start = file.peek(1).removeprefix(BOM).lstrip()[:1]
    if start == b"[":
        return read_list(path)
    return read_articles(path) if holds_articles(path) else read_jsonl(path, ledger)


def _note_left_files(folder: Path, files: list[Path], ledger: Ledger) -> None:
    """Says what lies in a folder and in those of its groups and is not read; hidden files of the folder itself go
    without saying.
    """
    if folder.is_dir():
        groups = {path.parent for path in files} - {folder}
        left = {path for path in folder.iterdir() if not path.name.startswith(".")}
        left.update(path for group in groups for path in group.iterdir())
        for path in sorted(left - groups - set(files)):
            ledger.note(str(path), "left unread in the folder")


def _with_own_id(conversation: Conversation, row: Row, ids: set[int], ledger: Ledger) -> Conversation:
    """The conversation under the id that its row has, if it has one and it is the first.

    Raises DataError where a SQuAD question's id occurs twice, since answers are scored by it.
    """
    id = row.get("id")
    if id is None or id == "":
        return conversation
    if hash(str(id)) not in ids:
        ids.add(hash(str(id)))
        return replace(conversation, id=str(id))
    problem = f"id: {shown(id)} occurs before"
    if "answers" in row:
        problem += "; ids must be unique to be scored, remove or rename one"
        raise DataError(conversation.where, problem, "id occurs twice")
    ledger.note(conversation.where, "id of an earlier row", f"{problem}; the row goes by its place")
    return conversation
