"""Kill a training at random moments, go on with it, and compare what comes out with a training left alone.

python -m tests.faults.kills --count 200 --seed 0
python -m tests.faults.kills --count 200 --seed 0 --processes 2

A real run of 40 steps: several packs a step, shared prefixes, dropout, two epochs, a checkpoint each three steps. Each
kill is SIGKILL or SIGTERM by chance, at any moment from the start of the process on, or within the writing of a
checkpoint. A run is killed up to eight times, then it may finish; it must equal the undisturbed one bit for bit in
weights, optimizer, random state and logged losses, and must never go on from an older checkpoint than the newest one.

With --processes 2 one of both is killed, by chance the main one. The other must end within 60 s and name the reason. Ones
that still wait for the first to come up are ended as torchrun and srun do: by SIGTERM.
"""

import argparse
import contextlib
import math
import os
import random
import re
import shutil
import signal
import socket
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
END_S, PATIENCE_S = 60, 20  # within which the other processes must end; after which a launcher's SIGTERM is sent
REASON = "another process of this training has ended"


class Killer:
    """Counts of what was done and seen; `errors`, what should not be."""

    def __init__(self, recipe: Path, folder: Path, seed: int, processes: int = 1) -> None:
        self.recipe, self.folder, self.draw, self.processes = recipe, folder, random.Random(seed), processes
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.lost, self.longest = 0, 0.0
        self.expected, self.seconds = self._undisturbed()

    def _undisturbed(self) -> tuple[dict[str, object], float]:
        run = self.folder / "undisturbed"
        times = []
        for _ in range(2):  # the first one fills the cache
            shutil.rmtree(run, ignore_errors=True)
            start = time.monotonic()
            for training in self._start(run):
                if training.wait() != 0:
                    raise SystemExit(f"the undisturbed training failed:\n{training.log.read_text()}")
            times.append(time.monotonic() - start)
        return result(run, self.processes), times[-1]

    def _start(self, run: Path) -> list[Command]:
        """All processes of the run's next training, the main one first."""
        going_on = (run / "recipe.yaml").is_file()
        arguments = ["--resume", run] if going_on else [self.recipe, "--set", f"train.output_dir={run}"]
        if self.processes == 1:
            return [Command(["train", *arguments], self.folder / f"{run.name}.log")]
        shared = {"WORLD_SIZE": self.processes, "LOCAL_WORLD_SIZE": self.processes}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        return [
            Command(["train", *arguments], self.folder / f"{run.name}-{i}.log", shared | {"RANK": i, "LOCAL_RANK": i})
            for i in range(self.processes)
        ]

    def run_and_kill(self, number: int, most: int, bar: Bar) -> None:
        run = self.folder / f"run-{number}"
        for _ in range(self.draw.randint(1, min(MOST_KILLS, most))):
            trainings = self._start(run)
            self._kill(trainings, run)
            bar.update(self.counts["killed"])
            if all(training.code == 0 for training in trainings):
                break
        newest = newest_of(run)
        trainings = self._start(run)
        for training in trainings:
            if training.wait() != 0:
                self.errors.append(f"{run}: ended with {training.code}:\n{training.log.read_text()}")
                return
        self._check_resumed(trainings[0], newest)
        found = result(run, self.processes)
        self.counts["runs"] += 1
        if different := [name for name, value in self.expected.items() if found[name] != value]:
            self.errors.append(f"{run}: differs from the undisturbed run in {', '.join(different)}")
            return
        self.counts["equal"] += 1
        shutil.rmtree(run)

    def _kill(self, trainings: list[Command], run: Path) -> None:
        newest, began = newest_of(run), time.time()
        training = self.draw.choice(trainings)
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
        for other in trainings:
            if other is not training:
                self._check_ended(other, code, number, run)
        self._check_resumed(trainings[0], newest)
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

    def _check_ended(self, other: Command, code: int, number: signal.Signals, run: Path) -> None:
        """A process ends soon after the other one, of which `code` is the end, and says why."""
        start, asked = time.monotonic(), False
        while not other.ended() and time.monotonic() - start < END_S:
            if not asked and time.monotonic() - start > PATIENCE_S:
                other.kill(signal.SIGTERM)
                asked = True
            time.sleep(0.02)
        seconds = time.monotonic() - start
        self.longest = max(self.longest, seconds)
        if not other.ended():
            self.errors.append(f"{run}: the other process still runs {END_S} s after {number.name}")
            other.kill(signal.SIGKILL)
        text = other.log.read_text()
        together = other.code == 0 or other.code == code == ExitCode.TERMINATED  # finished, or saved at the same step
        self.counts["ended by the launcher"] += asked
        if not together and not (asked and other.code == -signal.SIGTERM) and REASON not in text:
            self.errors.append(
                f"{run}: the other process ended with {other.code} and no reason on {number.name}:\n{text}"
            )

    def _check_resumed(self, training: Command, newest: Path | None) -> None:
        """It went on from the newest checkpoint, if it came that far."""
        told = re.search(r"resumes from (checkpoint-\d+)", training.log.read_text())
        if told and (newest is None or told[1] != newest.name):
            self.errors.append(f"{training.log}: went on from {told[1]} instead of {newest}")
        self.counts["resumed"] += bool(told)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


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
    parser.add_argument("--processes", type=int, default=1, help="of one training")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further run after so many")
    count, seed, processes, seconds = vars(parser.parse_args()).values()
    end = time.monotonic() + seconds
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="graft-kills-") as scratch:
        folder = Path(scratch)
        recipe = make_in_fork(folder)
        os.environ["GRAFT_CACHE"] = str(folder / "cache")
        killer = Killer(recipe, folder, seed, processes)
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
        + (f"; the other process ended within {killer.longest:.1f} s" if processes > 1 else "")
        + (f", {n} times by a launcher's SIGTERM while it started" if (n := seen["ended by the launcher"]) else "")
    )
    if seconds == math.inf and not (seen["resumed"] and seen["in a write"] and seen["equal"] == seen["runs"]):
        killer.errors.append("no run went on, or none was killed while it wrote a checkpoint: nothing is shown")
    if killer.errors:
        sys.exit("\n".join(killer.errors))


if __name__ == "__main__":
    main()
