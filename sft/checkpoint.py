"""Checkpoints: which one to go on from, and saving one when the user interrupts."""

import re
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.run import RunError


def last_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint; trainer_state.json is written last. Raises RunError where there is none."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    for path in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        if (path / "trainer_state.json").is_file():
            return path
    raise RunError(
        f"{run}: no checkpoint to resume from; start anew with "
        f"`graft train {run}/recipe.yaml --set train.output_dir=NEW-FOLDER`"
    )


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C or SIGTERM ends the current step, saves a checkpoint and stops; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._ask)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._any_process(args.device):
            self.stopped = True
            control.should_save = control.should_training_stop = True
        return control

    def _any_process(self, device: torch.device) -> bool:
        """Processes get the signal at different moments; they must leave at the same step."""
        if PartialState().num_processes == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; a checkpoint will be saved", flush=True)
