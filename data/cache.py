"""Results on disk under a key that names everything they depend on: built once, read from then on.

A folder that exists is whole. Two processes may build the same one; a changed file, recipe, template or code has
another key.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build(temporary folder)` unless it exists. Of two processes that build it, the first wins."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def cache_key(**parts: Any) -> str:
    """sha256, in hex, of the JSON-able parts and of the code that reads and encodes data."""
    text = json.dumps({**parts, "code": _code_version()}, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_digests(files: Sequence[Path]) -> dict[str, str]:
    """sha256 by path. Computed each time: size and date can stay the same while the content changes."""
    return {str(path): file_sha256(path) for path in files}


@cache
def _code_version() -> str:
    """sha256 of every module of the package `data`, whatever its folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
