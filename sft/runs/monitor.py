"""Progress of a training on the screen, in metrics.jsonl and in trackers."""

import json
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from data.atomic import open_to_append
from data.errors import is_disk_full
from data.progress import Bar
from data.terminal import print
from sft.runs.cost import peak_memory_gib

# a spike is SPIKE_SIGMA standard deviations above the mean of the last rows (OLMo-core's SkipStepOptimizer)
SPIKE_SIGMA, SPIKE_ROWS, SPIKE_FEWEST = 6.0, 128, 64


class Spikes:
    """Values of the last rows, and how far a new one is above them."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = deque(values, SPIKE_ROWS)

    def add(self, value: float) -> float | None:
        """Standard deviations above the mean of the rows before; None if it is no spike."""
        before = list(self.values)
        self.values.append(value)
        if len(before) < SPIKE_FEWEST:
            return None
        above, deviation = value - statistics.fmean(before), statistics.pstdev(before)
        return above / deviation if deviation and above > SPIKE_SIGMA * deviation else None


def trackers(names: Sequence[str], run: Path, step: int) -> list[TrainerCallback]:
    """transformers' callbacks for train.report_to.

    TensorBoard's files go to RUN/tensorboard, and rows of an earlier try after `step` are purged; the others read their
    settings from the environment.
    """
    from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

    others = [kind() for kind in get_reporting_integration_callbacks([n for n in names if n != "tensorboard"])]
    if "tensorboard" not in names:
        return others
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)), *others]


class Monitor(TrainerCallback):
    """Writes a row of metrics.jsonl for every logged step, flushed at once; main process only."""

    def __init__(self, run: Path, steps_per_epoch: int, rows: Sequence[dict[str, Any]] = ()) -> None:
        """rows: those of metrics.jsonl, if the run is resumed."""
        self.run, self.steps_per_epoch = run, steps_per_epoch
        train = [row for row in rows if "loss" in row]
        self.last: dict[str, Any] = train[-1] if train else {}
        self.spikes = {key: Spikes([r[key] for r in train if key in r]) for key in ("loss", "grad_norm")}
        self.note = ""
        self.counted: tuple[float, int] = (0.0, 0)
        self.open = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar = Bar("train", state.max_steps, state.global_step)
        self.file = open_to_append(self.run / "metrics.jsonl")
        now = time.monotonic()
        self.start = now - self.last.get("seconds", 0.0)
        self.counted = (now, self.last.get("executed_tokens", 0))
        self.open = True
        self.hook, threading.excepthook = threading.excepthook, self._in_thread

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
            row |= self._spikes(row)
        row["peak_memory_gib"] = round(peak_memory_gib(), 2)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def _spikes(self, row: dict[str, Any]) -> dict[str, float]:
        """loss_spike, grad_norm_spike: standard deviations above the rows before; prints a warning for each."""
        row_spikes = {}
        for key, spikes in self.spikes.items():
            sigma = spikes.add(row[key]) if key in row else None
            if sigma:
                row_spikes[f"{key}_spike"] = round(sigma, 1)
                print(
                    f"warning: step {row['step']}: {key} {row[key]:.4g} is {sigma:.1f} sigma above the rows before it"
                )
        return row_spikes

    def _in_thread(self, args: Any) -> None:
        """Print no traceback for a full disk: TensorBoard raises it again at its next write."""
        if not is_disk_full(args.exc_value):
            self.hook(args)

    def close(self) -> None:
        """Call it after an error too: it removes the progress bar."""
        if self.open:
            self.open = False
            threading.excepthook = self.hook
            self.bar.close()
            self.file.close()
