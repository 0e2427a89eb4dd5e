"""A training to break off and go on with, and what must be equal afterwards."""

import json
import os
import random
from pathlib import Path

from safetensors import safe_open

from sft.runs.checkpoint import (
    checkpoints,
)
from sft.runs.metrics import read_metrics
from tests.helpers.builders import write_recipe
from tests.helpers.places import SAMPLES


def recipe_of(
    folder: Path,
    base: Path,
    steps: int = 20,
    share: bool = True,
    dropout: float = 0.1,
    loraplus: float | None = None,
    **train: object,
) -> Path:
    """Several packs a step, dropout, 4 steps an epoch, and a loss that is logged each third step."""
    settings = {
        "examples_per_step": 6, "learning_rate": 1e-2, "max_steps": steps, "logging_steps": 3, "save_strategy": "steps",
        "save_steps": steps, "output_dir": str(folder / "run"), **train,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    data = {"train": str(SAMPLES / "squad_train.json"), "max_contexts": 4, "pack_tokens": 512, "share_prefixes": share}
    tune = {"method": "lora", "r": 4, "lora_dropout": dropout, "target_modules": "all-linear"}
    tune |= {"loraplus_lr_ratio": loraplus}
    sections = {"tune": tune, "data": data, "train": settings}
    return write_recipe(folder / "r.yaml", base, **{key: json.dumps(value) for key, value in sections.items()})


def everything(run: Path) -> dict[str, object]:
    """What must be equal: weights, and optimizer, scheduler, random state of the last checkpoint, and logged rows."""
    found: dict[str, object] = {"adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes()}
    for path in sorted(checkpoints(run)[-1].glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            found[path.name] = file.metadata(), {k: file.get_tensor(k).tobytes() for k in sorted(file.keys())}
    clock = ("seconds", "tokens_per_s", "peak_memory_gib")
    found["rows"] = [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(run)]
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(len(content))] ^= 4
    path.write_bytes(content)


HARM = {"truncated": lambda p: os.truncate(p, p.stat().st_size // 2), "flipped": flip, "deleted": lambda p: p.unlink()}


def signal_at(monkeypatch, step: int, number: int, times: int = 1) -> None:
    """A real signal to this process within the step after `step`."""
    from sft.training.trainer import PackTrainer

    original = PackTrainer.training_step

    def stop(self, *args):
        if self.state.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(PackTrainer, "training_step", stop)
