"""Merge a run into one of its possible bases: a plain model with its tokenizer, whose answers are not checked yet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data.encode.chat import stop_tokens
from data.terminal import print
from sft.errors import ParityError
from sft.export.integrity import text_faults
from sft.export.merge import Merge, read_merge, write_merge
from sft.export.skeleton import CannotStream, check_adapter, original_name, unmerged_way
from sft.models.load import (
    bitsandbytes_config,
    compute_dtype,
    default_device,
    fit_vocabulary,
    generation_config,
    is_quantized,
    load_base,
)
from sft.models.patterns import check_adapter_patterns
from sft.models.resolve import readable
from sft.models.target import load_plain
from sft.recipe.schema import Recipe, changed

# names of the bases to merge into, and how parity.json describes them
CANDIDATES = {"dequantized": "dequantized, as trained", "original": "original", "whole": "trained as a whole: no merge"}


@dataclass(frozen=True)
class Trained:
    """What a run trained. `base`: the folder of the weights that `adapter` changes, or of the trained weights if there
    is no adapter."""

    run: Path
    recipe: Recipe
    base: Path
    adapter: Path | None
    tokenizer: PreTrainedTokenizerBase


def base_names(trained: Trained, measure: bool = True) -> list[str]:
    """Names of the bases to merge into. `auto` means both; without measuring, only the one that training saw."""
    if trained.adapter is None:
        return ["whole"]
    if not is_quantized(trained.recipe.model.quantization):
        return ["original"]
    wanted = trained.recipe.export.base
    if wanted == "auto":
        return ["dequantized", "original"] if measure else ["dequantized"]
    return [wanted]


def plan(trained: Trained, base: str) -> Merge:
    """The plan of the merge into one base. Raises CannotStream, or RunError if the adapter can't be merged at all."""
    model, device = trained.recipe.model, default_device()
    quantization = bitsandbytes_config(model, device) if base == "dequantized" else None
    if quantization and not quantization.load_in_4bit:
        raise CannotStream("8-bit weights are unpacked by transformers, for a whole model")
    dtype = getattr(torch, trained.recipe.export.dtype)
    return read_merge(trained.base, trained.adapter, dtype, quantization, (compute_dtype(model, device), device))


def write_candidate(trained: Trained, base: str, folder: Path, allow_unchanged: bool = False) -> dict[str, Any]:
    """Write the merged model to a new folder and return how it was merged. Raises ParityError if a weight is not
    merged or not finite, or if template or stop tokens differ from those of training."""
    folder.mkdir()
    try:
        facts: dict[str, Any] = {"streamed": True, **write_merge(plan(trained, base), folder)}
    except CannotStream as reason:
        print(f"merged in memory, not streamed: {reason}", flush=True)
        facts = {"streamed": False, "reason": str(reason), **_merge_in_memory(trained, base, folder)}
    if trained.adapter and facts["unchanged"]:
        _check_unchanged(trained, facts["unchanged"], facts["adapted"], allow_unchanged)
    trained.tokenizer.save_pretrained(folder)
    stops = generation_config(str(trained.base))
    stops.eos_token_id = stop_tokens(stops.eos_token_id, trained.tokenizer)  # inference servers read it
    stops.save_pretrained(folder)
    if fault := next(text_faults(trained.run, trained.tokenizer, trained.base, folder), None):
        raise ParityError(f"{trained.run}: {fault}; nothing was written")
    return facts


def _check_unchanged(trained: Trained, unchanged: list[str], adapted: int, allowed: bool) -> None:
    dtype = trained.recipe.export.dtype
    if len(unchanged) == adapted:
        raise ParityError(f"{trained.adapter}: the merged model equals its base in {dtype}; nothing was learnt")
    if not allowed:
        raise ParityError(
            f"{trained.adapter}: {len(unchanged)} of {adapted} adapted weights equal their base's in {dtype}, first "
            f"{unchanged[0]}; a layer's adapter is missing, or too small to change them: set export.dtype: float32, "
            "or pass --allow-mismatch"
        )


def _merge_in_memory(trained: Trained, base: str, folder: Path) -> dict[str, Any]:
    """Merge with PEFT's merge_and_unload on the loaded model; returns the same counts as write_merge."""
    model, device, dtype = trained.recipe.model, default_device(), getattr(torch, trained.recipe.export.dtype)
    if trained.adapter is None:
        loaded = load_plain(trained.base, dtype)
        loaded.save_pretrained(folder)
        return {"adapted": 0, "other": len(loaded.state_dict()), "unchanged": []}
    from peft import PeftModel

    loaded = load_base(model if base == "dequantized" else changed(model, quantization=None), device)
    if getattr(loaded, "is_quantized", False):
        loaded = loaded.dequantize(dtype=compute_dtype(model, device))
    fit_vocabulary(loaded, trained.adapter)
    before = {name: value.to(dtype).cpu() for name, value in loaded.state_dict().items()}
    with readable(str(trained.adapter)):
        check_adapter_patterns(loaded, trained.adapter)
        tuned = PeftModel.from_pretrained(loaded, str(trained.adapter))
    check_adapter(tuned, trained.adapter)
    names = (original_name(name) for name, _ in loaded.named_parameters() if ".base_layer." in name)
    adapted = [name for name in names if name in before]
    try:
        merged = tuned.merge_and_unload(safe_merge=True).to(dtype)
    except (RuntimeError, ValueError) as error:  # PEFT can't merge this kind of layer or setting
        reason = (str(error).partition("\n")[0] or type(error).__name__).rstrip(".")
        raise ParityError(f"{trained.run} can't be merged: {reason}; {unmerged_way(trained.adapter)}") from error
    after = {name: value.cpu() for name, value in merged.state_dict().items()}
    same = [n for n in adapted if torch.equal(before[n], after[n]) and not n.endswith(".bias")]
    merged.save_pretrained(folder)
    return {"adapted": len(adapted), "other": len(after) - len(adapted), "unchanged": same}
