"""Asked to stop: signals that end a training at a step's boundary, and the lock that keeps two of them apart."""

import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data.errors import ExitCode
from sft.errors import RunLocked

LOCK = ".lock"
CODES = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGUSR1: ExitCode.USER_SIGNAL,  # what SLURM sends before the time is up: --signal=USR1@120
}


class SaveOnSignal(TrainerCallback):
    """A signal ends the current step, saves a checkpoint and stops; a second Ctrl-C stops at once.

    Only between steps: within one, some of its random numbers are drawn and its gradients are part of a sum.
    """

    def __init__(self) -> None:
        self.asked = 0  # number of the first signal
        self.stopped = 0  # the signal that training was stopped for, the same on every process
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in CODES:
            self.previous[number] = signal.signal(number, self._ask)

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.stopped = self._of_any_process(args.device)
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control

    def _of_any_process(self, device: torch.device) -> int:
        """Processes get the signal at different moments; they must leave at the same step."""
        if PartialState().num_processes == 1:
            return self.asked
        number = torch.tensor(self.asked, device=device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked == number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            # not print: the signal may have come within one
            os.write(1, b"\nstopping after this step; a checkpoint will be saved\n")
            self.asked = number


@contextmanager
def locked(run: Path, main: bool) -> Iterator[None]:
    """The run folder is this process's alone. Only the main process of a run (`main`) takes the lock."""
    with lock_file(run / LOCK, f"{run}: is being trained by") if main else nullcontext():
        yield


@contextmanager
def lock_file(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock until the block ends or the process dies. Raises RunLocked: `busy`, then the process that has it."""
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunLocked(f"{busy} {file.read().strip()}; wait for its end, or stop it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
