"""First values of a LoRA adapter: those that a run supports, and a plain LoRA of those that change the base.

PiSSA and OLoRA take the first values out of the base's weights, so the trained adapter fits only that changed base,
which nobody has. With W = W' + s B0 A0 it is W' + s B A = W + s (B A - B0 A0), a plain LoRA of twice the rank.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sft.errors import RecipeError

# values of init_lora_weights that change the base, and those that leave it; PiSSA may name iterations: pissa_niter_4
TAKEN = ("pissa", "olora")
LEFT = ("gaussian", "orthogonal", "mica")
ALONE = ("use_dora", "target_parameters", "layer_replication")  # settings that TAKEN does not go with
FIRST = "graft_first_values"  # attribute of a model: the first values of an adapter that was taken from the base
HALVES = {"A": 0, "B": 1}  # the dimension of the rank in each half


def check_init(settings: Mapping[str, Any], sharded: bool) -> None:
    """Raise RecipeError for first values that need a pass over data or a base of their own, which no run makes, and for
    those taken from the base if they could not be given back. sharded: each process has a part of the weights."""
    init = settings.get("init_lora_weights", True)
    if not isinstance(init, str):
        return
    kind = init.lower().partition("_niter_")[0]
    if kind not in (*TAKEN, *LEFT):
        known = ", ".join(("true", *LEFT, *TAKEN))
        raise RecipeError(
            f"tune.init_lora_weights: {init} needs a pass over data or a base of its own before training, which a run "
            f"does not make; set one of {known}"
        )
    if kind in TAKEN and (others := [key for key in ALONE if settings.get(key)] + ["FSDP or DeepSpeed"] * sharded):
        raise RecipeError(
            f"tune.init_lora_weights: {init} can't be saved as plain LoRA together with {others[0]}; leave one of them "
            "out"
        )


def sums_of(base: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """Each parameter with its sum, which shows later whether it was changed."""
    return [(p, _sum(p)) for p in base.parameters() if not p.is_meta and not _is_float8(p)]


def note_first_values(model: Any, before: list[tuple[nn.Parameter, float]], method: str) -> None:
    """Keep the first values of an adapter that was taken from the base, for save_plain.

    Raises RecipeError if the method has changed weights of the base in a way that no adapter file holds.
    """
    if all(math.isnan(total) or _sum(parameter) == total for parameter, total in before):
        return
    init = getattr(model.peft_config["default"], "init_lora_weights", True)
    if method != "lora" or not isinstance(init, str):
        raise RecipeError(f"tune.method {method}: changes the base's weights, which its adapter file does not hold")
    from peft import get_peft_model_state_dict

    values = get_peft_model_state_dict(model, save_embedding_layers=False)
    setattr(model, FIRST, {name: value.detach().cpu().clone() for name, value in values.items() if _half(name)})


def save_plain(folder: Path, model: Any) -> None:
    """Make a saved LoRA adapter one of the unchanged base, as servers apply it; others stay as they are."""
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not settings.is_file():
        return
    config = json.loads(settings.read_text(encoding="utf-8"))
    if not isinstance(config.get("init_lora_weights"), str):
        return
    if first := getattr(model, FIRST, None):
        trained = load_file(file)
        for name, value in first.items():
            half = _half(name)
            both = [trained[name], (-value if half == "B" else value).to(trained[name].dtype)]
            trained[name] = torch.cat(both, dim=HALVES[half]).contiguous()
        save_file(trained, file, metadata={"format": "pt"})
        scale = 2**0.5 if config.get("use_rslora") else 2  # alpha / sqrt(r) or alpha / r stays
        config["r"], config["lora_alpha"] = 2 * config["r"], scale * config["lora_alpha"]
        config["rank_pattern"] = {name: 2 * rank for name, rank in (config.get("rank_pattern") or {}).items()}
        config["alpha_pattern"] = {name: scale * alpha for name, alpha in (config.get("alpha_pattern") or {}).items()}
    config["init_lora_weights"] = True  # the values are trained: loading them must compute nothing from the base
    settings.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _is_float8(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() and parameter.dtype.itemsize == 1  # torch can't add them


def _sum(parameter: torch.Tensor) -> float:
    return float(parameter.detach().sum(dtype=torch.float64))


def _half(name: str) -> str:
    """`A` or `B` for a matrix of LoRA; "" for other tensors."""
    return next((h for h in HALVES if name.endswith((f".lora_{h}.weight", f".lora_embedding_{h}"))), "")
