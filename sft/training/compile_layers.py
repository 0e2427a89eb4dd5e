"""Compile the decoder layers one by one, if the run is long enough to gain by it.

One graph, with any length, serves all layers: compiling takes seconds instead of the minutes of a whole model.
"""

import atexit
import os
import shlex
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from sft.models.resolve import cache_dir
from sft.models.speed import matmul_flops_per_s
from sft.training.flops import attention_flops, training_flops
from sft.training.plan import StepPlan

SAMPLED = 100
# SmolLM2-135M on 2 CPU cores: throughput.py --batch 24 --passages 60 --systems graft,graft-compiled,...
COMPILE_SECONDS = 15.0
SAVED = {torch.float32: 0.0, torch.bfloat16: 0.17}  # share of the training time; in float32 the products take all of it
EFFICIENCY = {torch.float32: 0.6, torch.bfloat16: 0.33}  # share of the matrix products' rate that whole steps reach


def training_seconds(
    model: PreTrainedModel, plan: StepPlan, checkpointing: bool, device: torch.device, dtype: torch.dtype
) -> float:
    """Estimated seconds of the whole plan without compilation, from at most SAMPLED steps."""
    chosen = range(0, len(plan.steps), -(-len(plan.steps) // SAMPLED))
    packs = [pack for step in chosen for pack in plan.packs(step)]
    tokens, trained = sum(len(p.input_ids) for p in packs), sum(len(p.target) for p in packs)
    pairs = sum(position + 1 for p in packs for position in p.position_ids)
    flops = training_flops(model, tokens, trained, checkpointing) + attention_flops(model, pairs)
    flops *= len(plan.steps) / len(chosen)
    return flops / (EFFICIENCY.get(dtype, 0.3) * matmul_flops_per_s(device, dtype))


def compile_pays(
    seconds: float, device: torch.device, dtype: torch.dtype, obstacle: str | None = None
) -> tuple[bool, str]:
    """Whether a training of this length gains by compiling on this machine, and the reason."""
    if device.type != "cpu" or dtype not in SAVED:
        return False, "layers not compiled: the gain was measured on CPUs only; train.compile_layers: true does it"
    saved = seconds * SAVED[dtype]
    why = f"compiling the layers takes about {COMPILE_SECONDS:.0f} s and saves about {saved:.0f} s of {seconds:.0f} s"
    if saved <= COMPILE_SECONDS:
        return False, f"{why}: left out"
    if obstacle:
        return False, f"{why}: left out, because {obstacle}"
    return True, why


def missing_compiler() -> str | None:
    """Why layers can't be compiled for the CPU; None if they can."""
    wanted = os.environ.get("CXX", "g++")
    if shutil.which(shlex.split(wanted)[0]):
        return None
    return f"the C++ compiler {wanted} is missing; install it, or name another in CXX"


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's repeated layers; none if the architecture names none."""
    names = set(cast(Any, model)._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def keep_kernels_private() -> None:
    """Compiled kernels are code that the next run loads: PyTorch keeps them in /tmp, where another user may have made
    the folder first. Here only this user may open it."""
    folder = cache_dir() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError:  # a cache that can't be written
        folder = Path(mkdtemp(prefix="graft-kernels-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer in place; parameters keep their names."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)
    model.enable_input_require_grads()  # otherwise the first layer, whose input has no gradient, needs its own graph
