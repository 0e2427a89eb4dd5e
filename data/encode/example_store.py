"""Encoded examples on disk: an Arrow file that is mapped, not read, so that memory stays flat whatever its size.

A store is a folder under a key that names everything its content depends on. It is written aside and renamed: a folder
that exists is whole, two processes may build one at once, and a changed file, recipe, template or code has another key.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, overload

import pyarrow as pa

from data.encode.chat import Example

FILE = "examples.arrow"
ROWS = 4096  # of a record batch
SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("context", pa.string()),
        ("where", pa.string()),
        ("weight", pa.float32()),
    ]
)


class Examples(Sequence[Example]):
    """The examples of a store, read one at a time. `contexts` and `weights` are columns in memory."""

    def __init__(self, folder: Path) -> None:
        self.table = pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()
        self.contexts: list[str] = self.table["context"].to_pylist()
        self.weights: list[float] = [round(w, 6) for w in self.table["weight"].to_pylist()]

    def __len__(self) -> int:
        return len(self.contexts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        ids, mask = (self.table[name][index].values.to_pylist() for name in ("ids", "loss_mask"))
        return Example(ids, mask, self.contexts[index], self.table["where"][index].as_py())


class Writer:
    """Appends examples to a folder's Arrow file."""

    def __init__(self, folder: Path) -> None:
        self.file = pa.ipc.new_file(str(folder / FILE), SCHEMA)
        self.rows: list[dict[str, Any]] = []

    def add(self, example: Example, weight: float = 1.0) -> None:
        self.rows.append(
            {
                "ids": example.ids, "loss_mask": example.loss_mask, "context": example.context,
                "where": example.where, "weight": weight,
            }
        )  # fmt: skip
        if len(self.rows) == ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.file.close()

    def _flush(self) -> None:
        if self.rows:
            self.file.write_batch(pa.RecordBatch.from_pylist(self.rows, SCHEMA))
        self.rows = []


def publish(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, built by `build(aside)` unless it exists. Of two processes that build it the first one's stays."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def cache_key(**parts: Any) -> str:
    """sha256 of the JSON-able parts and of the code that reads and encodes."""
    text = json.dumps({**parts, "code": _code_version()}, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_digests(files: Sequence[Path]) -> dict[str, str]:
    """sha256 by path. Hashed each time: a size and date can stay while the content changes."""
    return {str(path): file_sha256(path) for path in files}


@cache
def _code_version() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
