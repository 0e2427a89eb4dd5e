"""Results on disk, built once under a key that names everything they depend on.

A folder that exists is whole. Two processes may build the same folder. A changed file, recipe, template or code
changes the key.
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
    """`folder`; if it does not exist, `build(temporary folder)` fills it. The first of two processes wins."""
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
