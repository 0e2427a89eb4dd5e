"""Kill a training at random moments, go on with it, and compare what comes out with a training left alone.

python -m tests.faults.kills --count 200 --seed 0

A real run of 40 steps: several packs a step, shared prefixes, dropout, two epochs, a checkpoint each three steps. Each
kill is SIGKILL or SIGTERM by chance, at any moment from the start of the process on, or within the writing of a
checkpoint. A run is killed up to eight times, then it may finish; it must equal the undisturbed one bit for bit in
weights, optimizer, random state and logged losses, and must never go on from an older checkpoint than the newest one.
"""

import argparse
import contextlib
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # this process must have no pool of threads, which a fork would lack

from data.errors import ExitCode
from data.progress import Bar
from sft.runs.checkpoint import checkpoints, step_of
from sft.runs.metrics import read_metrics
from tests.faults.training import SAVE_STEPS, Command, make_in_fork, result

MOST_KILLS = 8  # of one run
WRITE_S = 0.05  # about what writing a checkpoint takes


class Killer:
    """Counts of what was done and seen; `errors`, what should not be."""

    def __init__(self, recipe: Path, folder: Path, seed: int) -> None:
        self.recipe, self.folder, self.draw = recipe, folder, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.lost = 0
        self.expected, self.seconds = self._undisturbed()

    def _undisturbed(self) -> tuple[dict[str, object], float]:
        run = self.folder / "undisturbed"
        times = []
        for _ in range(2):  # the first one fills the cache
            shutil.rmtree(run, ignore_errors=True)
            start = time.monotonic()
            training = self._start(run)
            if training.wait() != 0:
                raise SystemExit(f"the undisturbed training failed:\n{training.log.read_text()}")
            times.append(time.monotonic() - start)
        return result(run), times[-1]

    def _start(self, run: Path) -> Command:
        going_on = (run / "recipe.yaml").is_file()
        arguments = ["--resume", run] if going_on else [self.recipe, "--set", f"train.output_dir={run}"]
        return Command(["train", *arguments], self.folder / f"{run.name}.log")

    def run_and_kill(self, number: int, most: int, bar: Bar) -> None:
        run = self.folder / f"run-{number}"
        for _ in range(self.draw.randint(1, min(MOST_KILLS, most))):
            training = self._start(run)
            self._kill(training, run)
            bar.update(self.counts["killed"])
            if training.code == 0:
                break
        training = self._start(run)
        newest = newest_of(run)
        if training.wait() != 0:
            self.errors.append(f"{run}: ended with {training.code}:\n{training.log.read_text()}")
            return
        self._check_resumed(training, newest)
        found = result(run)
        self.counts["runs"] += 1
        if different := [name for name, value in self.expected.items() if found[name] != value]:
            self.errors.append(f"{run}: differs from the undisturbed run in {', '.join(different)}")
            return
        self.counts["equal"] += 1
        shutil.rmtree(run)

    def _kill(self, training: Command, run: Path) -> None:
        newest, began = newest_of(run), time.time()
        if self.draw.random() < 0.5:
            wait_for_write(training, run, self.draw.randint(1, 4))
            time.sleep(self.draw.uniform(0, WRITE_S))
        else:
            end = time.monotonic() + self.draw.uniform(0, self.seconds)
            while not training.ended() and time.monotonic() < end:
                time.sleep(0.002)
        number = self.draw.choice((signal.SIGKILL, signal.SIGTERM))
        within = writing(run, began)
        training.kill(number)
        code = training.wait()
        self._check_resumed(training, newest)
        if code == 0:
            self.counts["past its last step"] += 1
            return
        if code not in (-signal.SIGKILL, -signal.SIGTERM, ExitCode.TERMINATED):
            self.errors.append(f"{run}: ended with {code} on {number.name}:\n{training.log.read_text()}")
        self.counts["killed"] += 1
        self.counts[number.name] += 1
        self.counts["in a write"] += writing(run, began) if number == signal.SIGKILL else within
        if rows := read_metrics(run):
            newest = newest_of(run)
            lost = rows[-1]["step"] - (step_of(newest) if newest else 0)
            self.lost = max(self.lost, lost)
            if lost > SAVE_STEPS:
                self.errors.append(f"{run}: {lost} steps lost, with a checkpoint each {SAVE_STEPS}")

    def _check_resumed(self, training: Command, newest: Path | None) -> None:
        """It went on from the newest checkpoint, if it came that far."""
        told = re.search(r"resumes from (checkpoint-\d+)", training.log.read_text())
        if told and (newest is None or told[1] != newest.name):
            self.errors.append(f"{training.log}: went on from {told[1]} instead of {newest}")
        self.counts["resumed"] += bool(told)


def newest_of(run: Path) -> Path | None:
    found = checkpoints(run)
    return found[-1] if found else None


def writing(run: Path, since: float = 0) -> bool:
    """Whether a checkpoint is half written; `since`: not what an earlier kill has left."""
    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
        return any(path.stat().st_mtime >= since for path in run.glob(".checkpoint-*.new"))
    return False


def wait_for_write(training: Command, run: Path, nth: int) -> None:
    """Until the nth checkpoint from now on begins to be written, or the training ends."""
    for _ in range(nth):
        while writing(run) and not training.ended():
            time.sleep(0.0005)
        while not writing(run) and not training.ended():
            time.sleep(0.0005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further run after so many")
    count, seed, seconds = vars(parser.parse_args()).values()
    end = time.monotonic() + seconds
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="graft-kills-") as scratch:
        folder = Path(scratch)
        recipe = make_in_fork(folder)
        os.environ["GRAFT_CACHE"] = str(folder / "cache")
        killer = Killer(recipe, folder, seed)
        bar = Bar("kills", count)
        number = 0
        while killer.counts["killed"] < count and not killer.errors and time.monotonic() < end:
            killer.run_and_kill(number, count - killer.counts["killed"], bar)
            number += 1
        bar.close()
    seen = killer.counts
    print(
        f"{seen['killed']} kills ({seen['SIGKILL']} KILL, {seen['SIGTERM']} TERM; {seen['in a write']} while a checkpoint "
        f"was written), {seen['resumed']} times resumed; {seen['equal']} of {seen['runs']} runs equal the undisturbed one "
        f"bit for bit; at most {killer.lost} logged steps lost (a checkpoint each {SAVE_STEPS}); seed {seed}"
    )
    if seconds == math.inf and not (seen["resumed"] and seen["in a write"] and seen["equal"] == seen["runs"]):
        killer.errors.append("no run went on, or none was killed while it wrote a checkpoint: nothing is shown")
    if killer.errors:
        sys.exit("\n".join(killer.errors))


if __name__ == "__main__":
    main()
