"""Fill the disk at ten points of a training and of an export; make room, go on, and compare with an undisturbed training.

python -m tests.faults.disk training export      as root: each point is a small tmpfs, enlarged afterwards
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"

from data.errors import ExitCode
from sft.runs.checkpoint import checkpoints, damage, step_of
from sft.runs.metrics import read_metrics
from tests.faults.training import SAVE_STEPS, Command, make_in_fork, result

POINTS = 10
MIB = 2**20


@contextmanager
def disk(at: Path, size: int) -> Iterator[None]:
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True)


def grow(at: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={500 * MIB}", at], check=True)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fails(command: Command, what: str) -> str:
    """What it printed. It must end with the code of a full disk and say so, without a traceback."""
    code, said = command.wait(), command.log.read_text()
    if code != ExitCode.DISK_FULL or "Traceback" in said or "error: " not in said:
        sys.exit(f"{what}: ended with {code}:\n{said}")
    return next(line for line in said.splitlines() if line.startswith("error: "))


def succeeds(command: Command, what: str) -> None:
    if command.wait() != 0:
        sys.exit(f"{what}: ended with {command.code}:\n{command.log.read_text()}")


def fill_training(folder: Path, recipe: Path, undisturbed: Path, size: int) -> str:
    at, log = folder / f"disk-{size}", folder / "log"
    run = at / "run"
    with disk(at, size):
        said = fails(Command(["train", recipe, "--set", f"train.output_dir={run}"], log), f"training in {size} bytes")
        for checkpoint in checkpoints(run):
            if problem := damage(checkpoint):
                sys.exit(f"{checkpoint}: {problem}")
        kept = [checkpoint.name for checkpoint in checkpoints(run)]
        rows = read_metrics(run)
        least = (rows[-1]["step"] // SAVE_STEPS - 1) * SAVE_STEPS if rows else 0  # the one before the one that failed
        if least > 0 and (not kept or step_of(checkpoints(run)[-1]) < least):
            sys.exit(f"{run}: the last good checkpoint, of step {least} or later, is gone; there are {kept}")
        grow(at)
        again = ["--resume", run] if (run / "recipe.yaml").is_file() else [recipe, "--set", f"train.output_dir={run}"]
        succeeds(Command(["train", *again], log), f"going on after {size} bytes")
        if result(run) != result(undisturbed):
            sys.exit(f"{run}: differs from the undisturbed run")
    return f"{size / MIB:5.1f} MiB  kept {kept[-1] if kept else 'nothing, as nothing fitted':28s} {said[:150]}"


def fill_export(folder: Path, run: Path, size: int) -> str:
    at, log = folder / f"export-disk-{size}", folder / "log"
    before = result(run)
    export = ["export", run, "--out", at / "export", "--data", "data/samples/squad_dev.json", "--allow-mismatch"]
    with disk(at, size):
        said = fails(Command(export, log), f"export into {size} bytes")
        if list(at.iterdir()) or result(run) != before:
            sys.exit(f"{at}: something is left of a failed export: {list(at.iterdir())}")
        grow(at)
        succeeds(Command(export, log), f"export after {size} bytes")
    return f"{size / MIB:5.1f} MiB  {said[:150]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="training, export; left out: both")
    what = parser.parse_args().what or ["training", "export"]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="graft-disk-") as scratch:
        folder = Path(scratch)
        recipe, run = make_in_fork(folder), folder / "undisturbed"
        os.environ["GRAFT_CACHE"] = str(folder / "cache")
        succeeds(Command(["train", recipe, "--set", f"train.output_dir={run}"], folder / "log"), "undisturbed")
        exported = folder / "exported"
        succeeds(Command(["export", run, "--out", exported, "--allow-mismatch"], folder / "log"), "export")
        for name, needed, fill in (
            ("training", bytes_of(run), lambda size: fill_training(folder, recipe, run, size)),
            ("export", bytes_of(exported), lambda size: fill_export(folder, run, size)),
        ):
            if name not in what:
                continue
            print(f"{name}, which takes {needed / MIB:.1f} MiB:")
            for point in range(1, POINTS + 1):
                print(" ", fill(needed * point // (POINTS + 1) // 4096 * 4096), flush=True)
    print(
        f"{len(what) * POINTS} of {len(what) * POINTS}: exit code {ExitCode.DISK_FULL:d}, what was whole stayed, and with "
        "room all ended well"
    )


if __name__ == "__main__":
    main()
