"""Write files and folders whole or not at all: under a temporary name, flushed to the disk, then renamed.

A folder may come from a stranger, and any name in it may be a link to a file of the user. So a temporary name is drawn
at random and must be free, nothing is opened through a link, and only names of this scheme are ever cleaned up.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from data.errors import UserError
from data.redact import scrub_values
from data.terminal import print

CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# not to wait for the reader of a FIFO: what is no file is refused once it is open
APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def hidden_name(path: Path, ending: str = "new") -> Path:
    """A random name beside `path`: .NAME.12345678.new"""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def is_hidden_name(path: Path, names: str) -> bool:
    """Whether `hidden_name` made it of one of `names`, a regular expression."""
    return bool(re.fullmatch(rf"\.({names})\.[0-9a-f]{{8}}\.(new|old)", path.name))


def new_folder(path: Path) -> Path:
    """A new, empty folder under a hidden name beside `path`."""
    folder = hidden_name(path)
    folder.mkdir()
    return folder


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A new file beside `path`, renamed to `path` at the end of the block; after an error `path` is unchanged. Files
    that killed processes left behind for `path` are removed: nobody holds their lock any more."""
    with suppress(OSError):  # a folder that can't be listed can be written to
        for left in path.parent.iterdir():
            if is_hidden_name(left, re.escape(path.name)) and stat.S_ISREG(left.lstat().st_mode):
                _remove_left(left)
    temporary, descriptor = _new_locked(path)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _new_locked(path: Path) -> tuple[Path, int]:
    """A new file under a hidden name beside `path`, and its descriptor, which holds its lock until it is closed."""
    while True:
        temporary = hidden_name(path)
        descriptor = os.open(temporary, CREATE, 0o666)
        with suppress(OSError):  # without locks on this disk no leftover is removed
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another process took it for a leftover before it was locked


def _remove_left(file: Path) -> None:
    """Remove a file unless its writer holds its lock."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write the text as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write the value as indented JSON, with secrets removed from its texts."""
    write_text(path, json.dumps(scrub_values(value), indent=2, ensure_ascii=False) + "\n")


def open_new(path: Path) -> TextIO:
    """An empty log under a name of Graft's, in place of an earlier one; of a link only the link is replaced."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, CREATE, 0o666), "w", encoding="utf-8")


def open_to_append(path: Path) -> TextIO:
    """A log or lock, made if it does not exist, to read and to append to. Raises UserError if it is a link, has a
    second name, or is no regular file: what is written would land elsewhere."""
    problem = UserError(f"{path}: is a link, has another name too (a hard link) or is no regular file; remove it")
    try:
        descriptor = os.open(path, APPEND, 0o666)
    except OSError as error:
        raise problem if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO) else error from None
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
        os.close(descriptor)
        raise problem
    return os.fdopen(descriptor, "a+", encoding="utf-8")


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`, which may exist; after a crash the old or the new folder is whole."""
    old = hidden_name(final, "old")
    if os.path.lexists(final):
        final.rename(old)
    new.rename(final)
    flush(final.parent)
    remove(old)


def discard(path: Path) -> None:
    """Remove a folder as `remove` does, under a hidden name: a half-removed folder must not keep its own."""
    old = hidden_name(path, "old")
    try:
        path.rename(old)
    except OSError as error:
        _not_removed(path, error.strerror)
    else:
        remove(old)


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link, whose target stays. A warning if that fails: an immutable
    file, or one that NFS keeps open, is in nobody's way."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        _not_removed(path, error.strerror)


@cache  # one warning for each path
def _not_removed(path: Path, reason: str) -> None:
    print(f"warning: {path} can't be removed ({reason}); remove it by hand", file=sys.stderr, flush=True)


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
