"""The cost of a training and of a system: time, processor time, memory, disk."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.cache import text_sha256
from data.conversation import Conversation
from data.progress import quiet
from eval.prediction import Prediction
from sft.recipe.baseline_schema import AnyRecipe, BaselineRecipe

COST = "cost.json"
TIMED = 16  # questions timed one by one


class Stopwatch:
    """Wall and processor seconds of this process since the stopwatch was created."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def cost(self, weights: Path, trainable: int, parameters: int, before: float | None = None) -> dict[str, Any]:
        """The record of a training. train_cpu_seconds: of all threads, a proxy for energy. disk_mib: of its weights.

        before: seconds of a resumed run up to its checkpoint; its processor time until then is unknown.
        """
        files = [f for f in weights.rglob("*") if f.is_file()]
        return {
            "parameters": parameters,
            "trainable_parameters": trainable,
            "train_seconds": round((before or 0.0) + time.monotonic() - self.wall, 1),
            "train_cpu_seconds": None if before else round(time.process_time() - self.cpu, 1),
            "train_peak_memory_gib": round(peak_memory_gib(), 2),
            "disk_mib": round(sum(f.stat().st_size for f in files) / 2**20, 2),
        }


def system_of(run: Path, recipe: AnyRecipe, base: bool = False) -> dict[str, Any]:
    """What a comparison shows of a run, or of its untrained base, beside its scores.

    recipe_sha256 leaves out the seed, the folder and how the run is scored, so that runs that differ only in them count
    as repetitions. It leaves out keys at their default too, so that a new key changes no digest.
    """
    settings = recipe.model_dump(mode="json", exclude_defaults=True)
    for key in ("seed", "output_dir", "report_to"):
        settings.get("train", {}).pop(key, None)
    expected = settings.pop("eval", {}).get("unanswerable_share")  # it sets the run's no-answer threshold
    cost = json.loads((run / COST).read_text()) if (run / COST).is_file() else {}
    if base:
        cost = {"parameters": cost.get("parameters"), "trainable_parameters": 0, "train_seconds": 0}
        return {"method": "untuned", "base": recipe.model.base, "seed": None, "recipe_sha256": None, **cost}
    floor = isinstance(recipe, BaselineRecipe) and recipe.is_floor
    return {
        "method": recipe.model.base if floor else recipe.tune.method,
        "base": (isinstance(recipe, BaselineRecipe) and recipe.model.embedder) or recipe.model.base,
        "seed": recipe.train.seed,
        "recipe_sha256": text_sha256(json.dumps([settings, expected], sort_keys=True)),
        **cost,
    }


def latency_ms(
    answer: Callable[[Sequence[Conversation]], Sequence[Prediction]], conversations: Sequence[Conversation]
) -> dict[str, float]:
    """Milliseconds for a single question: p50 and p95 of TIMED questions spread over all, after a warm-up."""
    step = max(1, len(conversations) // TIMED)
    chosen = conversations[::step][:TIMED]
    times = []
    with quiet():
        answer(chosen[:1])
        for conversation in chosen:
            start = time.perf_counter()
            answer([conversation])
            times.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times, (50, 95))
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2), "n": len(times)}


def peak_memory_gib() -> float:
    """Peak memory of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
