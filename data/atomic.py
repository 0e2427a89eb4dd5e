"""Write files and folders whole or not at all: under a temporary name, flushed to the disk, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.redact import scrub_values


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to `path` at the end of the block; after an error `path` is unchanged."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write the text as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write the value as indented JSON, with secrets removed from its texts."""
    write_text(path, json.dumps(scrub_values(value), indent=2, ensure_ascii=False) + "\n")


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`, which may exist; after a crash the old or the new folder is whole."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    new.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, is on the disk.

    Later reads of a file come from the disk, not from memory, so that a check of it checks the disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if path.is_file() and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
