"""Checkpoints as folders: written aside, flushed, read again, renamed; which one to go on from; older ones rotate.

A folder named checkpoint-N was whole when it got that name: its manifest.json is written last and holds size and sha256
of every other file. Whatever is not as the manifest says is named, and the checkpoint before it taken.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from data.atomic import flush, replace_folder, write_text
from data.cache import file_sha256
from data.errors import DiskFull, UserError, is_disk_full
from sft.errors import RunError

MANIFEST = "manifest.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")  # loading one may run code that it holds
NAME = r"checkpoint-\d+"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def checkpoints(run: Path) -> list[Path]:
    """Folders named checkpoint-N by ascending N, whole or not."""
    return sorted((p for p in run.glob("checkpoint-*") if re.fullmatch(NAME, p.name)), key=step_of)


def commit_checkpoint(aside: Path, final: Path, facts: dict[str, Any]) -> None:
    """Give a written folder its name, once it is on the disk and was read again. `facts` go to its manifest.

    Raises OSError where what is read is not what was written.
    """
    names = _files(aside)
    # hashed as they lie in memory, then flushed and forgotten: what is read again comes from the disk
    entries = {n: {"bytes": (aside / n).stat().st_size, "sha256": file_sha256(aside / n)} for n in names}
    for name in names:
        flush(aside / name)
    body = {**facts, "files": entries}
    write_text(aside / MANIFEST, json.dumps({**body, "manifest_sha256": _digest(body)}, indent=2) + "\n")
    for folder in {aside, *((aside / name).parent for name in names)}:
        flush(folder)
    if found := damage(aside, pickles=True):
        raise OSError(f"{final} could not be written: {found}; the disk does not return what was written to it")
    replace_folder(aside, final)


def damage(folder: Path, pickles: bool = False) -> str | None:
    """What is wrong with a checkpoint; None where it is whole. `pickles`: they are allowed (FSDP and DeepSpeed)."""
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
    """The newest whole checkpoint, and what is wrong with each newer one. None where the run never saved any, so that
    nothing is lost by its first step. Raises RunError where all are damaged, or the run is finished without any."""
    found = checkpoints(run)
    broken: dict[Path, str] = {}
    for path in reversed(found):
        problem = damage(path, pickles)
        if problem is None:
            return path, broken
        broken[path] = problem
    anew = f"start anew with `graft train {run}/recipe.yaml --set train.output_dir=NEW-FOLDER`"
    if broken:
        lines = "".join(f"\n  {path.name}: {problem}" for path, problem in broken.items())
        raise RunError(f"{run}: no checkpoint is whole, so there is nothing to go on from; {anew}{lines}")
    if not (run / "recipe.yaml").is_file():
        raise RunError(
            f"{run}: is no run folder: recipe.yaml is missing; {anew.replace(f'{run}/recipe.yaml', 'RECIPE')}"
        )
    if (run / "adapter").is_dir() or (run / "model").is_dir():
        raise RunError(f"{run}: is finished and has no checkpoint to go on from; {anew}")
    return None, {}


def remove_leftovers(run: Path) -> None:
    """What a death while writing left behind."""
    for pattern in (".*.new", ".*.old"):
        for path in run.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def set_aside(broken: dict[Path, str]) -> None:
    """Rename damaged checkpoints to damaged-NAME: they stay for whoever wants to look, and never count again."""
    for path in broken:
        kept = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(kept, ignore_errors=True)
        path.rename(kept)


def rotate(run: Path, limit: int | None, keep: Sequence[Path]) -> None:
    """Remove the oldest checkpoints, by number, until `limit` are left; those in `keep`, of which one was just found
    whole, always stay."""
    found = checkpoints(run)
    kept = {path.name for path in keep}
    removable = [path for path in found if path.name not in kept]
    for path in removable[: max(0, len(found) - limit)] if limit else ():
        going = path.with_name(f".{path.name}.old")  # renamed first: a folder that is half removed is no checkpoint
        path.rename(going)
        shutil.rmtree(going)


def check_space(run: Path, model: nn.Module, optim: str) -> None:
    """Raise DiskFull where not even two checkpoints fit: the next is written while the last one stays."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = trained * 4 if hasattr(model, "peft_config") else sum(p.numel() * p.itemsize for p in model.parameters())
    moments = 8 * trained if optim.startswith("adamw_torch") else 0  # AdamW's two, in float32
    needed, free = 2 * (kept + moments), shutil.disk_usage(run).free
    if free < needed:
        raise DiskFull(
            f"{run}: has room for {free / 2**30:.2f} GiB, and two checkpoints take {needed / 2**30:.2f} GiB; "
            "make room, or name another train.output_dir"
        )


@contextmanager
def full_disk_told(run: Path) -> Iterator[None]:
    """A full disk within it becomes DiskFull, which names what is whole and how to go on."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_disk_full(error):
            raise
        whole = checkpoints(run)
        raise DiskFull(
            f"{run}: the disk is full ({str(error).splitlines()[0]}); "
            f"{f'{whole[-1].name} is whole' if whole else 'no checkpoint was saved yet'}. Make room "
            f"(train.save_total_limit keeps fewer checkpoints) and go on with: graft train --resume {run}"
        ) from error


def commit_folder(final: Path, write: Callable[[str], None], main: bool) -> None:
    """`final`, written by every process's `write` into a folder aside that the main process then renames."""
    aside = final.with_name(f".{final.name}.new")
    write(str(aside))
    PartialState().wait_for_everyone()
    if main:
        for path in aside.rglob("*"):
            flush(path)
        replace_folder(aside, final)
    PartialState().wait_for_everyone()


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() and path.relative_to(folder).as_posix() != MANIFEST
    )


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
