"""What a training and a system cost: time, processor time, memory, disk."""

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from data.conversation import Conversation
from data.progress import quiet
from eval.prediction import Prediction
from sft.recipe.baseline_schema import AnyRecipe, BaselineRecipe

COST = "cost.json"
TIMED = 16  # questions that are asked one by one


class Stopwatch:
    """Wall and processor seconds of this process from its making on."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), _cpu_seconds()

    def cost(self, weights: Path, trainable: int, parameters: int, before: float | None = None) -> dict[str, Any]:
        """train_cpu_seconds: of all threads, the proxy for energy. disk_mib: of what the run adds to its base.
        `before`: seconds of a resumed run until its checkpoint; what it took of the processor then is not known."""
        files = [f for f in weights.rglob("*") if f.is_file()]
        return {
            "parameters": parameters,
            "trainable_parameters": trainable,
            "train_seconds": round((before or 0.0) + time.monotonic() - self.wall, 1),
            "train_cpu_seconds": None if before else round(_cpu_seconds() - self.cpu, 1),
            "train_peak_memory_gib": round(peak_memory_gib(), 2),
            "disk_mib": round(sum(f.stat().st_size for f in files) / 2**20, 2),
        }


def _cpu_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def system_of(run: Path, recipe: AnyRecipe, base: bool = False) -> dict[str, Any]:
    """What a comparison says of a run, or of its untrained base, beside its scores. recipe_sha256 leaves out the seed
    and the folder, so that runs which differ in nothing else are told as repetitions."""
    plain = recipe.model_dump(mode="json")
    for key in ("seed", "output_dir", "report_to"):
        plain["train"].pop(key)
    if not plain["model"].get("embedder"):  # a key that came later: without it a recipe is the one that it was
        plain["model"].pop("embedder", None)
    if plain["data"].get("leaks") == "keep":  # likewise
        plain["data"].pop("leaks")
    # what is scored is the comparison's own matter; what the threshold was chosen for is the run's
    expected = plain["eval"].get("unanswerable_share")
    plain["eval"] = {"unanswerable_share": expected} if expected else None
    cost = json.loads((run / COST).read_text()) if (run / COST).is_file() else {}
    if base:
        cost = {"parameters": cost.get("parameters"), "trainable_parameters": 0, "train_seconds": 0}
        return {"method": "untuned", "base": recipe.model.base, "seed": None, "recipe_sha256": None, **cost}
    floor = isinstance(recipe, BaselineRecipe) and recipe.is_floor
    return {
        "method": recipe.model.base if floor else recipe.tune.method,
        "base": (isinstance(recipe, BaselineRecipe) and recipe.model.embedder) or recipe.model.base,
        "seed": recipe.train.seed,
        "recipe_sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest(),
        **cost,
    }


def latency_ms(
    answer: Callable[[Sequence[Conversation]], Sequence[Prediction]], conversations: Sequence[Conversation]
) -> dict[str, float]:
    """Milliseconds that a question takes when it comes alone: p50 and p95 of TIMED ones spread over all, after one to
    warm up."""
    step = max(1, len(conversations) // TIMED)
    chosen = conversations[::step][:TIMED]
    times = []
    with quiet():
        answer(chosen[:1])
        for conversation in chosen:
            start = time.perf_counter()
            answer([conversation])
            times.append(1000 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times, n=20, method="inclusive") if len(times) > 1 else times * 19
    return {"p50": round(cuts[9], 2), "p95": round(cuts[18], 2), "n": len(times)}


def peak_memory_gib() -> float:
    """Of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
