"""Checkpoint folders: committed whole, verified before a run resumes from one, rotated.

A folder is written under a temporary name, flushed, read again and renamed to checkpoint-N. Its manifest.json is
written last and holds size and sha256 of every other file; a folder that differs from its manifest is reported and the
checkpoint before it is used.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from data.atomic import discard, flush, is_hidden_name, new_folder, remove, replace_folder, write_text
from data.cache import file_sha256, text_sha256
from data.errors import DiskFull, UserError, is_disk_full
from data.terminal import quoted
from sft.errors import RunError

MANIFEST = "manifest.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")  # loading one may run code
NAME = r"checkpoint-\d+"
HIDDEN = rf"{NAME}|adapter|model|[a-z_]+\.[a-z]+"  # what is written under a hidden name first


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def checkpoints(run: Path) -> list[Path]:
    """Folders named checkpoint-N by ascending N, whole or not."""
    return sorted((p for p in run.glob("checkpoint-*") if re.fullmatch(NAME, p.name)), key=step_of)


def commit_checkpoint(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    """Rename a written folder to `final` once it is on the disk and reads back unchanged; `facts` go to its manifest.

    Raises OSError if the disk returns other bytes than were written.
    """
    names = _files(temporary)
    # hashed from memory, then flushed and dropped from the page cache: what damage() reads comes from the disk
    entries = {n: {"bytes": (temporary / n).stat().st_size, "sha256": file_sha256(temporary / n)} for n in names}
    for name in names:
        flush(temporary / name)
    body = {**facts, "files": entries}
    write_text(temporary / MANIFEST, json.dumps({**body, "manifest_sha256": _digest(body)}, indent=2) + "\n")
    for folder in {temporary, *((temporary / name).parent for name in names)}:
        flush(folder)
    if problem := damage(temporary, pickles=True):
        raise OSError(f"{final} could not be written: {problem}; the disk does not return what was written to it")
    replace_folder(temporary, final)


def damage(folder: Path, pickles: bool = False) -> str | None:
    """What is wrong with a checkpoint; None if it is whole. `pickles`: allow them, for FSDP and DeepSpeed."""
    try:
        return _damage(folder, pickles)
    except (OSError, RecursionError) as error:  # a bad sector, a link to nowhere, JSON without an end
        return f"it can't be read: {error}"


def _damage(folder: Path, pickles: bool) -> str | None:
    path = folder / MANIFEST
    if not path.is_file():
        return f"it was not finished: {MANIFEST} is missing"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        written = body.pop("manifest_sha256")
        entries = {str(n): (int(e["bytes"]), str(e["sha256"])) for n, e in body["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    if written != _digest(body):
        return f"{MANIFEST} is damaged: it differs from its own sha256"
    if re.fullmatch(NAME, folder.name) and body.get("step") != step_of(folder):
        return f"it was renamed: it holds step {body.get('step')}"
    present = _files(folder)
    for name in sorted({*entries} | {*present}):
        if name not in present:
            return f"{name} is missing"
        if name not in entries:
            return f"{name} does not belong to it"
        if not pickles and name.endswith(PICKLES):
            return f"{name} is a pickle, which is never opened"
        size, sha256 = entries[name]
        if (now := (folder / name).stat().st_size) != size:
            return f"{name} has {now} bytes instead of {size}"
        if file_sha256(folder / name) != sha256:
            return f"{name} is damaged: its sha256 differs from that in {MANIFEST}"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def last_checkpoint(run: Path, pickles: bool = False) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, and what is wrong with each newer one; None if the run never saved any.

    Raises RunError if all are damaged, if the run is finished without any, or if the folder is no run.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(run)):
        problem = damage(path, pickles)
        if problem is None:
            return path, damaged
        damaged[path] = problem
    restart = f"start a new run: graft train {quoted(run / 'recipe.yaml')} --set train.output_dir=NEW-FOLDER"
    if damaged:
        lines = "".join(f"\n  {path.name}: {problem}" for path, problem in damaged.items())
        raise RunError(f"{run}: no checkpoint is whole, so the run can't be resumed; {restart}{lines}")
    if not (run / "recipe.yaml").is_file():
        raise RunError(
            f"{run}: is no run folder: recipe.yaml is missing; {restart.replace(f'{run}/recipe.yaml', 'RECIPE')}"
        )
    if (run / "adapter").is_dir() or (run / "model").is_dir():
        raise RunError(f"{run}: is finished and has no checkpoint to resume from; {restart}")
    return None, {}


def remove_leftovers(run: Path) -> None:
    """Remove half-written files and folders of a crash."""
    for path in sorted(run.iterdir()):
        if is_hidden_name(path, HIDDEN):
            remove(path)


def set_aside(damaged: dict[Path, str]) -> None:
    """Rename damaged checkpoints to damaged-NAME: they stay for inspection and are never resumed from."""
    for path in damaged:
        renamed = path.with_name(f"damaged-{path.name}")
        remove(renamed)
        path.rename(renamed)


def rotate(run: Path, limit: int | None, keep: Sequence[Path]) -> None:
    """Remove the oldest checkpoints, by number, until `limit` are left; never those in `keep`."""
    saved = checkpoints(run)
    names = {path.name for path in keep}
    removable = [path for path in saved if path.name not in names]
    for path in removable[: max(0, len(saved) - limit)] if limit else ():
        discard(path)


def check_space(run: Path, model: nn.Module, optim: str) -> None:
    """Raise DiskFull if two checkpoints don't fit: the next one is written before the last one is removed."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = trained * 4 if hasattr(model, "peft_config") else sum(p.numel() * p.itemsize for p in model.parameters())
    moments = 8 * trained if optim.startswith("adamw_torch") else 0  # AdamW's two, in float32
    needed, free = 2 * (weights + moments), shutil.disk_usage(run).free
    if free < needed:
        raise DiskFull(
            f"{run}: has room for {free / 2**30:.2f} GiB, and two checkpoints take {needed / 2**30:.2f} GiB; "
            "make room, or name another train.output_dir"
        )


@contextmanager
def explain_full_disk(run: Path) -> Iterator[None]:
    """Turn a full disk inside the block into DiskFull, which names the last whole checkpoint and how to resume."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_disk_full(error):
            raise
        whole = checkpoints(run)
        raise DiskFull(
            f"{run}: the disk is full ({str(error).splitlines()[0]}); "
            f"{f'{whole[-1].name} is whole' if whole else 'no checkpoint was saved yet'}. Make room "
            f"(train.save_total_limit keeps fewer checkpoints), then: graft train --resume {quoted(run)}"
        ) from error


def shared_folder(final: Path, main: bool) -> Path:
    """A new, empty folder beside `final` that the main process (`main`) makes and all processes write to."""
    (folder,) = broadcast_object_list([str(new_folder(final)) if main else ""])
    return Path(folder)


def commit_folder(final: Path, write: Callable[[str], None], main: bool) -> None:
    """On every process `write` fills a temporary folder; the main process (`main`) then renames it to `final`."""
    temporary = shared_folder(final, main)
    write(str(temporary))
    PartialState().wait_for_everyone()
    if main:
        for path in temporary.rglob("*"):
            flush(path)
        replace_folder(temporary, final)
    PartialState().wait_for_everyone()


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() and path.relative_to(folder).as_posix() != MANIFEST
    )


def _digest(body: dict[str, Any]) -> str:
    return text_sha256(json.dumps(body, sort_keys=True))
