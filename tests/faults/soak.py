"""Train 2,000 steps of a tiny model, and watch its memory and open files from outside.

python -m tests.faults.soak --steps 2000

Resident memory of the last quarter may exceed that of the second by 2 %, and no file may be left open.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from sft.runs.metrics import read_metrics
from tests.faults.training import make_recipe

MOST_GROWTH = 0.02


def watch(process: subprocess.Popen[bytes], run: Path) -> list[tuple[int, float, int]]:
    """Step, resident MiB, open files, several times a second."""
    seen, trained = [], psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(0.3)
        try:
            rows = read_metrics(run)
            if rows:
                seen.append((rows[-1]["step"], trained.memory_info().rss / 2**20, trained.num_fds()))
        except psutil.Error:
            break
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory(prefix="graft-soak-") as scratch:
        folder = Path(scratch)
        recipe, run = make_recipe(folder), folder / "run"
        os.environ["GRAFT_CACHE"] = str(folder / "cache")
        changes = [f"train.max_steps={steps}", f"train.save_steps={steps // 20}", f"train.output_dir={run}"]
        command = [sys.executable, "-m", "sft.cli", "train", str(recipe)]
        command += [word for change in changes for word in ("--set", change)]
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        seen = watch(process, run)
        if process.wait() != 0:
            sys.exit(f"ended with {process.returncode}")
        quarters = [[s for s in seen if q * steps / 4 < s[0] <= (q + 1) * steps / 4] for q in range(4)]
        memory = [statistics.fmean(s[1] for s in quarter) for quarter in quarters]
        files = [statistics.median(s[2] for s in quarter) for quarter in quarters]  # not those that a save opens
        growth = memory[3] / memory[1] - 1
        print(
            f"{steps} steps in {time.monotonic() - start:.0f} s; resident MiB by quarters "
            f"{', '.join(f'{m:.1f}' for m in memory)}: {growth:+.2%}; open files {files}"
        )
        if growth > MOST_GROWTH or files[3] > files[1]:
            sys.exit(f"memory or files grow: at most {MOST_GROWTH:.0%} are allowed")


if __name__ == "__main__":
    main()
