"""What a user sees of a running training, and what stays of it: progress, metrics.jsonl, TensorBoard."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from data.progress import Bar
from sft.trainer import TrainingDiverged


def peak_memory_gib() -> float:
    """Of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux


class Monitor(TrainerCallback):
    """Main process only. A metrics.jsonl row for every logged step, flushed at once."""

    def __init__(self, run: Path, steps_per_epoch: int, last: dict[str, Any] | None = None) -> None:
        """`last`: the metrics row that a resumed run goes on from."""
        self.run, self.steps_per_epoch, self.last = run, steps_per_epoch, last or {}
        self.note = ""
        self.counted: tuple[float, int] = (0.0, 0)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.bar = Bar("train", state.max_steps, state.global_step)
        self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=state.global_step + 1)
        self.file = (self.run / "metrics.jsonl").open("a", encoding="utf-8")
        now = time.monotonic()
        self.start = now - self.last.get("seconds", 0.0)
        self.counted = (now, self.last.get("executed_tokens", 0))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step, self.note)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" not in logs and "eval_loss" not in logs:
            return
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.global_step / self.steps_per_epoch, 4)}
        row |= {k: v for k, v in logs.items() if k in ("loss", "grad_norm", "learning_rate") or k.startswith("eval_")}
        now = time.monotonic()
        row["seconds"] = round(now - self.start, 3)
        if "loss" in logs:
            then, tokens = self.counted
            row["executed_tokens"], row["examples"] = logs["executed_tokens"], logs["examples"]
            row["tokens_per_s"] = round((logs["executed_tokens"] - tokens) / (now - then), 1)
            self.counted = (now, logs["executed_tokens"])
            self.note = f"loss {logs['loss']:.4f}  {row['tokens_per_s']:.0f} tokens/s"
        row["peak_memory_gib"] = round(peak_memory_gib(), 2)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key, value in row.items():
            if isinstance(value, float):
                self.board.add_scalar(key, value, state.global_step)
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            raise TrainingDiverged(f"the gradient of step {state.global_step} is not finite; lower train.learning_rate")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar.close()
        self.board.close()
        self.file.close()
