"""Signals that end a training between two steps, and the lock that keeps two trainings out of one folder."""

import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data.atomic import open_to_append
from data.errors import ExitCode
from sft.errors import RunLocked

LOCK = ".lock"
CODES: dict[int, ExitCode] = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGUSR1: ExitCode.USER_SIGNAL,  # SLURM sends it before the time is up: --signal=USR1@120
}


class SaveOnSignal(TrainerCallback):
    """Finish the current step, save a checkpoint and stop; a second Ctrl-C stops at once.

    Only between steps: inside one, random numbers are already drawn and gradients are part of a sum.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the first signal
        self.stopped = 0  # the signal that stopped the training, the same on every process

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.stopped = self.received
        if PartialState().num_processes > 1:  # they receive a signal at different moments, and stop at the same step
            self.stopped = int(gather(torch.tensor([self.received], device=args.device)).max())
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control

    def receive(self, number: int, frame: Any) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            # not print: the signal may have interrupted one
            os.write(1, b"\nstopping after this step; a checkpoint will be saved\n")
            self.received = number


@contextmanager
def handle_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle the signals of CODES by `handler` until the end of the block."""
    previous = {number: signal.signal(number, handler) for number in CODES}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


@contextmanager
def locked(run: Path, main: bool) -> Iterator[None]:
    """Hold the run folder's lock until the end of the block; other processes than the main one take none."""
    with lock_file(run / LOCK, f"{run}: is being trained by") if main else nullcontext():
        yield


@contextmanager
def lock_file(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock until the block or the process ends, in any way. Raises RunLocked: `busy` and the holder."""
    with open_to_append(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunLocked(f"{busy} {file.read().strip()}; wait until it ends, or stop it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
