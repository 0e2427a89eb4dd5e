"""What a stranger's folder may hold: plain files and folders, and links that stay inside it."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path


def first_stray(folder: Path, depth: int | None = None, linked: str = "", only: str = ".*") -> str | None:
    """The first file that is a link out of the folder, or neither file, folder nor link, with the remedy; else None.

    Reading a link would copy a private file into what Graft writes, opening a FIFO or a device may never end. The Hub
    cache's own links, from snapshots/ to blobs/ of one repository, may stay. depth: levels of folders to look into.
    linked, only: regular expressions of names at the top: may be links to folders, which may hold no strays either;
    are looked at.
    """
    root = Path(os.path.realpath(folder))
    for path in _entries(root, depth):
        name = path.relative_to(root)
        if not re.fullmatch(only, name.parts[0], re.DOTALL):
            continue
        try:
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode):
                if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                    return f"{name} is no regular file; remove it, or name another folder"
                continue
            target = Path(os.path.realpath(path))
            if len(name.parts) == 1 and re.fullmatch(linked, name.name) and target.is_dir():
                if stray := first_stray(target):
                    return f"{name}/{stray}"
            elif not target.is_relative_to(root) and not _is_blob(target, root):
                return f"{name} is a link to {target}, outside the folder; remove it, or put the file itself there"
        except FileNotFoundError:  # removed since the folder was listed, by a run that is still training
            continue
    return None


def _entries(root: Path, depth: int | None) -> Iterator[Path]:
    """All entries below a folder, sorted; links are not followed."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        yield from (Path(folder, name) for name in sorted((*folders, *files)))
        if depth is not None and len(Path(folder).relative_to(root).parts) >= depth:
            folders.clear()


def _is_blob(target: Path, root: Path) -> bool:
    """Whether a snapshot of the Hub cache, models--OWNER--NAME/snapshots/COMMIT, may link to this file."""
    repository = root.parent.parent
    in_hub = root.parent.name == "snapshots" and repository.name.startswith("models--")
    return in_hub and target.parent == repository / "blobs" and target.is_file()
