"""metrics.jsonl (a row for each logged step) and the plot of the loss."""

import json
from pathlib import Path
from typing import Any

from data.atomic import atomic_path, write_text
from data.terminal import print
from sft.errors import RunError


def rewind_metrics(run: Path, step: int) -> None:
    """Drop the rows after the step that a run resumes from, and those that a power cut damaged, with a warning."""
    path, rows, damaged = run / "metrics.jsonl", [], 0
    for line in _lines(path):
        try:
            row = json.loads(line.decode())
            rows += [row] if row["step"] <= step else []
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        print(f"warning: {path}: {damaged} damaged lines are removed; the run itself is not affected", flush=True)
    write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            rows.append(json.loads(line.decode()))
        except ValueError as error:
            raise RunError(f"{path}:{number}: is damaged: {error}; remove this line and those after it") from error
    return rows


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file; a crash cuts the last one. None if there is no file."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def plot_loss(run: Path) -> None:
    """Write loss.png: training loss of each step, its running mean, and the held-out loss if there is one."""
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if not train:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    window = max(1, len(losses) // 20)
    means = [sum(losses[max(0, i - window) : i]) / min(i, window) for i in range(1, len(losses) + 1)]
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window} steps")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token (nats)", title=run.name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(run / "loss.png") as new:
        figure.savefig(new, dpi=130, format="png")
