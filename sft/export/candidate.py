"""One way to merge a run: written as a plain model with its tokenizer, and checked but for what it answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data.encode.chat import stop_tokens
from sft.errors import ParityError, RunError
from sft.export.integrity import text_faults
from sft.export.merge import Merge, read_merge, write_merge
from sft.export.skeleton import CannotStream, adapter_config, check_places, original_name
from sft.models.load import (
    bitsandbytes_config,
    compute_dtype,
    default_device,
    fit_vocabulary,
    generation_config,
    is_quantized,
    load_base,
)
from sft.models.resolve import readable
from sft.models.target import load_plain
from sft.recipe.schema import Recipe, changed

# names of candidates, and what parity.json calls them
CANDIDATES = {"dequantized": "dequantized, as trained", "original": "original", "whole": "trained as a whole: no merge"}


@dataclass(frozen=True)
class Trained:
    """What a run trained: `base` is the folder of the weights that `adapter` changes; without an adapter, that of the
    trained weights themselves. The tokenizer is that of training, from the folder `weights`."""

    run: Path
    recipe: Recipe
    base: Path
    adapter: Path | None
    weights: Path
    tokenizer: PreTrainedTokenizerBase


def base_names(trained: Trained, measure: bool = True) -> list[str]:
    """What there is to merge into; where nothing will be measured `auto` is what training saw."""
    if trained.adapter is None:
        return ["whole"]
    if not is_quantized(trained.recipe.model.quantization):
        return ["original"]
    wanted = trained.recipe.export.base
    if wanted == "auto":
        return ["dequantized", "original"] if measure else ["dequantized"]
    return [wanted]


def plan(trained: Trained, base: str) -> Merge:
    """Raises CannotStream; RunError for what can't be merged at all."""
    model, device = trained.recipe.model, default_device()
    if trained.adapter:
        _check_mergeable(trained, trained.adapter)
    quantization = bitsandbytes_config(model, device) if base == "dequantized" else None
    if quantization and not quantization.load_in_4bit:
        raise CannotStream("8-bit weights are unpacked by transformers, for a whole model")
    dtype = getattr(torch, trained.recipe.export.dtype)
    return read_merge(trained.base, trained.adapter, dtype, quantization, (compute_dtype(model, device), device))


def write_candidate(trained: Trained, base: str, folder: Path, allow_unchanged: bool = False) -> dict[str, Any]:
    """Write the model into `folder`, which is made; how it was merged, by counts. Raises ParityError where something
    was not merged, is not finite, or would be rendered or stopped otherwise than in training."""
    folder.mkdir()
    try:
        made: dict[str, Any] = {"streamed": True, **write_merge(plan(trained, base), folder)}
    except CannotStream as reason:
        print(f"merged in memory, not streamed: {reason}", flush=True)
        made = {"streamed": False, "reason": str(reason), **_merge_in_memory(trained, base, folder)}
    _check_changed(trained, made, allow_unchanged)
    trained.tokenizer.save_pretrained(folder)
    stops = generation_config(str(trained.base))
    stops.eos_token_id = stop_tokens(stops.eos_token_id, trained.tokenizer)  # servers read it
    stops.save_pretrained(folder)
    if fault := next(text_faults(trained.run, trained.tokenizer, trained.base, folder), None):
        raise ParityError(f"{trained.run}: {fault}; nothing was written")
    return made


def _check_changed(trained: Trained, made: dict[str, Any], allow_unchanged: bool) -> None:
    unchanged, adapted, dtype = made["unchanged"], made["adapted"], trained.recipe.export.dtype
    if trained.adapter is None or not unchanged:
        return
    if len(unchanged) == adapted:
        raise ParityError(f"{trained.adapter}: the merged model equals its base in {dtype}; nothing was learnt")
    if not allow_unchanged:
        raise ParityError(
            f"{trained.adapter}: {len(unchanged)} of {adapted} adapted weights equal their base's in {dtype}, first "
            f"{unchanged[0]}; a layer's adapter is gone or too small for it: set export.dtype: float32, or pass "
            "--allow-mismatch"
        )


def _check_mergeable(trained: Trained, adapter: Path) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    config = adapter_config(adapter)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        raise RunError(
            f"{trained.recipe.tune.method} can't be merged: its parameters are no weights of the base; use "
            f"{trained.run} as it is"
        )


def _merge_in_memory(trained: Trained, base: str, folder: Path) -> dict[str, Any]:
    """The same by PEFT's merge_and_unload on the loaded model."""
    model, device, dtype = trained.recipe.model, default_device(), getattr(torch, trained.recipe.export.dtype)
    if trained.adapter is None:
        loaded = load_plain(trained.base, dtype)
        loaded.save_pretrained(folder)
        return {"adapted": 0, "other": len(loaded.state_dict()), "unchanged": []}
    from peft import PeftModel

    source = model if base == "dequantized" else changed(model, quantization=None)
    loaded = load_base(source, device)
    if getattr(loaded, "is_quantized", False):
        loaded = loaded.dequantize(dtype=compute_dtype(model, device))
    fit_vocabulary(loaded, trained.adapter)
    before = {name: value.to(dtype).cpu() for name, value in loaded.state_dict().items()}
    with readable(str(trained.adapter)):
        tuned = PeftModel.from_pretrained(loaded, str(trained.adapter))
    check_places(tuned, trained.adapter)
    names = (original_name(name) for name, _ in loaded.named_parameters() if ".base_layer." in name)
    adapted = [name for name in names if name in before]
    merged = tuned.merge_and_unload(safe_merge=True).to(dtype)
    after = {name: value.cpu() for name, value in merged.state_dict().items()}
    same = [n for n in adapted if torch.equal(before[n], after[n]) and not n.endswith(".bias")]
    merged.save_pretrained(folder)
    return {"adapted": len(adapted), "other": len(after) - len(adapted), "unchanged": same}
