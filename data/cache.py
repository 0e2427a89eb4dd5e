"""Results on disk, built once under a key that names everything they depend on.

A folder that exists is whole, and the digests in its SHA256SUMS are compared before it is used; a damaged one is built
again. Two processes may build the same folder. A changed file, recipe, template or code changes the key.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from data.atomic import flush
from data.errors import UserError, is_disk_full
from data.inside import first_stray
from data.terminal import print

SUMS = "SHA256SUMS"  # in every folder, in the format of sha256sum(1)
BUILDING = ".building"  # ends the name of a folder that is being filled


class CacheUnwritable(UserError):
    """The cache folder is read-only, or no folder. What is small is then computed again for each run."""


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`; if it does not exist or is damaged, `build(temporary folder)` fills it. The first of two processes
    wins. Raises CacheUnwritable."""
    with ExitStack() as held:
        try:
            problem = _damage(folder) if folder.is_dir() else None
            if folder.is_dir() and problem is None:
                return folder
            if problem:
                print(f"{folder}: {problem}; it is built again", file=sys.stderr, flush=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary, damaged = (held.enter_context(_temporary(folder)) for _ in range(2))
        except OSError as error:
            if is_disk_full(error):
                raise
            raise CacheUnwritable(
                f"{folder.parent}: no cache can be written there: {error.strerror}; set GRAFT_CACHE to a folder that "
                "you may write"
            ) from error
        build(temporary)
        _seal(temporary)
        if folder.is_dir() and _damage(folder):
            with suppress(FileNotFoundError):  # another process replaces it too
                folder.rename(damaged / folder.name)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        flush(folder.parent)
    return folder


def cache_key(**parts: Any) -> str:
    """The first 32 hex digits of the sha256 of the parts (as JSON) and of the code of the package `data`."""
    text = json.dumps({**parts, "code": _code_version()}, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_digests(files: Sequence[Path]) -> dict[str, str]:
    """sha256 of each file, computed each time: a content can change while size and date stay the same."""
    return {str(path): file_sha256(path) for path in files}


@cache
def _code_version() -> str:
    """sha256 of every module of the package `data`, in all its folders."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, removed at the end of the block. It is locked until then: one that nobody has
    locked is of a killed process, and is removed here too."""
    with _lock(folder.parent):
        for left in folder.parent.glob(f".*{BUILDING}"):
            if not left.is_symlink():
                with suppress(OSError), _lock(left, fcntl.LOCK_NB):
                    shutil.rmtree(left)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=BUILDING, dir=folder.parent))
        held = _lock(temporary)
        held.__enter__()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        held.__exit__(None, None, None)


@contextmanager
def _lock(folder: Path, flags: int = 0) -> Iterator[None]:
    """Hold the folder's lock until the block or the process ends, in any way."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)


def _seal(folder: Path) -> None:
    """Write the digests of the folder's files, and return once all is on the disk."""
    paths = sorted(folder.rglob("*"))
    sums = "".join(f"{file_sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in paths if p.is_file())
    (folder / SUMS).write_text(sums, encoding="utf-8")
    for path in (*paths, folder / SUMS, folder):
        flush(path)


def _damage(folder: Path) -> str | None:
    """What is wrong with a folder; None if every file is the one that was written."""
    if stray := first_stray(folder):  # opening a FIFO may never end
        return f"it was changed ({stray.partition(';')[0]})"
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        for digest, _, name in (line.partition("  ") for line in lines):
            state = os.stat(folder / name)
            if _sha256_in(str(folder / name), state.st_ino, state.st_size, state.st_ctime_ns) != digest:
                return f"{name} is damaged: its sha256 differs from that in {SUMS}"
    except (OSError, ValueError) as error:  # a missing file, a bad sector, a damaged name
        return f"it is damaged or of an earlier version: {error}"
    return None if lines else f"{SUMS} is empty"


@cache
def _sha256_in(path: str, *state: int) -> str:
    """sha256 of a file in this state, computed once by a process: a base is looked up several times."""
    return file_sha256(Path(path))
