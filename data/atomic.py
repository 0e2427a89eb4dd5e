"""Files and folders that are whole or not there: written under a temporary name, flushed to the disk, renamed."""

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
    """A temporary path beside `path`; what the block writes there takes its name at the end of the block.

    After an error `path` is what it was before.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, without the secrets that its texts may hold."""
    write_text(path, json.dumps(scrub_values(value), indent=2, ensure_ascii=False) + "\n")


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`, which may exist; a crash in between leaves the old or the new folder whole."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    new.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, is on the disk; a file is then read from there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if path.is_file() and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
