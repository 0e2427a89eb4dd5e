"""Merge a run into a plain model, and prove that it still answers like the run.

graft export RUN [--out DIR]
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel

from data.chat import Example
from data.errors import UserError
from data.pack import build_pack
from data.progress import track
from eval.predict import end_tokens
from eval.run import limit_questions
from eval.tasks import read_conversations
from sft.attention import pack_inputs
from sft.base import readable
from sft.examples import encode_held_out, held_out_conversations, with_split
from sft.load import adapter_folder, load_plain, load_run, run_recipe
from sft.model import compute_dtype, default_device, is_quantized, load_base
from sft.recipe import Recipe, Source
from sft.run import RunError, check_writable, write_json


class ParityError(UserError):
    """The merged model does not answer like the adapter, or like the base as if nothing had been learnt."""


@dataclass(frozen=True)
class Trace:
    """What a model says of one example: logits [M, vocab] in fp32 that predict its M answer tokens, and the most
    likely token after each of its T tokens."""

    answer_logits: torch.Tensor
    argmax: torch.Tensor


def export(run: Path, out: Path, data: str | None = None, allow_mismatch: bool = False) -> dict[str, Any]:
    """Write the merged model to `out` and return its parity record. Raises ParityError, with nothing written."""
    recipe = run_recipe(run)
    if default_device().type == "cpu":
        # bfloat16 rounds activations as coarsely as weights: near ties would flip on both sides, merged right or not
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "float32"})})
    check_writable(out, "--out")
    out = out.resolve()
    # inside an empty folder that is there, which may be a mount or the current one; beside one to be made
    aside = (out if out.is_dir() else out.parent) / f".{out.name}.new"
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty; name another folder with --out")
    if data:
        conversations = read_conversations(recipe.task, data, with_split(Source(path=data), "validation").split)
    else:
        conversations = held_out_conversations(recipe)
    if not conversations:
        raise RunError(f"{run}: no held-out data to check the merge on; name some with --data FILE")
    chosen = limit_questions(conversations, recipe.export.prompts)
    loaded = load_run(run, recipe.model.dtype)
    tokenizer = loaded.tokenizer
    examples, too_long = encode_held_out(chosen, tokenizer, recipe.data.max_length)
    before = trace(loaded.model, examples, "adapter on base")
    del loaded  # before the merged one takes its memory
    try:
        base = write_merged(run, recipe, aside)
        tokenizer.save_pretrained(aside)
        # in the same compute dtype: only the weights' rounding differs
        merged = load_plain(aside, compute_dtype(recipe.model, default_device()))
        after = trace(merged, examples, "merged model")
        parity = {
            "run": run.name,
            "base": base,
            "dtype": recipe.export.dtype,
            "held_out_examples": len(examples),
            "held_out_too_long": too_long,
            **compare(before, after),
            "min_agreement": recipe.export.min_agreement,
        }
        write_json(aside / "parity.json", parity)
        if parity["answer_argmax_agreement"] < recipe.export.min_agreement and not allow_mismatch:
            raise ParityError(
                f"merged and adapter agree on {parity['answer_argmax_agreement']:.2%} of the answer tokens, less than "
                f"export.min_agreement {recipe.export.min_agreement:.2%}; nothing was written. Set export.base to the "
                "other base, export.dtype: float32, or pass --allow-mismatch"
            )
        if out.is_dir():
            for file in aside.iterdir():
                file.rename(out / file.name)
        else:
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return parity


def write_merged(run: Path, recipe: Recipe, folder: Path) -> str:
    """Save the merged model and say what it was merged into. Raises ParityError where it equals its base."""
    dtype = getattr(torch, recipe.export.dtype)
    if (run / "model").is_dir():
        _save(load_plain(run / "model", dtype), folder, run)
        return "trained as a whole: no merge"
    from peft import PeftModel

    adapter = adapter_folder(run)
    dequantize = is_quantized(recipe.model.quantization) and recipe.export.base == "dequantized"
    device = default_device()
    base = load_base(recipe.model if dequantize else recipe.model.model_copy(update={"quantization": None}), device)
    if getattr(base, "is_quantized", False) and dequantize:
        base = base.dequantize(dtype=compute_dtype(recipe.model, device))
    untouched = _fingerprints(base, dtype)
    with readable(str(adapter)):
        tuned = PeftModel.from_pretrained(base, str(adapter))
    if not hasattr(tuned.base_model, "merge_and_unload"):
        method = recipe.tune.method
        raise RunError(f"{method} can't be merged: its parameters are no weights of the base; use {run} as it is")
    merged = tuned.merge_and_unload(safe_merge=True).to(dtype)
    if _fingerprints(merged, dtype) == untouched:
        raise ParityError(f"{adapter}: the merged model equals its base in {recipe.export.dtype}; nothing was learnt")
    _save(merged, folder, run)
    return "dequantized, as trained" if dequantize else "original"


def _save(model: PreTrainedModel, folder: Path, run: Path) -> None:
    """Weights, and a generation config that stops where training taught to stop: servers read it."""
    weights = "model" if (run / "model").is_dir() else "adapter"
    tokenizer = AutoTokenizer.from_pretrained(run / weights, trust_remote_code=False)
    cast(Any, model.generation_config).eos_token_id = sorted(end_tokens(model, tokenizer))
    model.save_pretrained(folder)


def trace(model: PreTrainedModel, examples: Sequence[Example], name: str) -> list[Trace]:
    """Teacher-forced over prompt and gold answer."""
    device = next(model.parameters()).device
    traces = []
    with torch.inference_mode():
        for example in track(examples, name):
            pack = build_pack([[example]])
            inputs = pack_inputs(model, pack, device)
            virtual = inputs.pop("logits_to_keep").min() - min(pack.source)
            logits = model(**inputs, use_cache=False).logits[0, int(virtual) :].float()
            traces.append(Trace(logits[pack.source].cpu(), logits.argmax(-1).cpu()))
    return traces


def compare(before: Sequence[Trace], after: Sequence[Trace]) -> dict[str, Any]:
    """Differences of the answer tokens' logits, and the shares of tokens with the same argmax."""
    pairs = list(zip(before, after, strict=True))
    differences = [(a.answer_logits - b.answer_logits).abs() for a, b in pairs]
    answers = torch.cat([a.answer_logits.argmax(-1) == b.answer_logits.argmax(-1) for a, b in pairs])
    tokens = torch.cat([a.argmax == b.argmax for a, b in pairs])
    return {
        "answer_tokens": len(answers),
        "answer_argmax_agreement": round(answers.float().mean().item(), 5),
        "all_tokens": len(tokens),
        "all_argmax_agreement": round(tokens.float().mean().item(), 5),
        "max_logit_difference": round(max(d.max().item() for d in differences), 5),
        "mean_logit_difference": round(torch.cat([d.flatten() for d in differences]).mean().item(), 6),
    }


def _fingerprints(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, str]:
    """sha256 of each weight as it would be saved."""
    return {
        name: hashlib.sha256(tensor.to(dtype).cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
