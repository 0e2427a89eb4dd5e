"""Merge a run into a plain model, and prove that it still answers like the run.

graft export RUN [--out DIR] [--check]
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from data.chat import Example
from data.store import text_sha256
from eval.run import limit_questions
from eval.tasks import read_conversations
from sft.base import readable, resolve_base
from sft.card import export_card
from sft.combine import Combination, combine, parts
from sft.examples import encode_held_out, held_out_conversations, with_split
from sft.load import adapter_folder, load_plain, load_run, run_recipe
from sft.merge import CannotStream, Merge, read_merge, write_merge
from sft.model import bitsandbytes_config, compute_dtype, default_device, is_quantized, load_base
from sft.parity import ParityError, Trace, compare, trace
from sft.proof import PARITY, adapter_sha256, check_origin, end_ids, generation_config, text_faults, weight_faults
from sft.recipe import Recipe, Source
from sft.run import RunError, check_writable, write_json
from sft.skeleton import hub_folder

TRAINED = {"dequantized": "dequantized, as trained", "original": "original", "whole": "trained as a whole: no merge"}


@dataclass(frozen=True)
class Made:
    """What is exported: the folder of the base's weights, the adapter (none where all weights were trained), and the
    run's folder with its tokenizer."""

    recipe: Recipe
    base: Path
    adapter: Path | None
    tokenizer: Path


def export(
    run: Path,
    out: Path,
    data: str | None = None,
    allow_mismatch: bool = False,
    measure: bool = True,
    combination: Combination | None = None,
) -> dict[str, Any]:
    """Write the merged model to `out` and return its parity record. Raises ParityError, with nothing written. With
    `measure` off no model is loaded, for one that is larger than memory: only its files are checked."""
    made = _made(run)
    check_writable(out, "--out")
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty; name another folder with --out")
    origin = check_origin(run, made.recipe, made.adapter)
    with _aside(out.resolve()) as aside:
        if combination:
            made = _combined(run, made, combination, aside / "adapter")
        examples, too_long = held_out(run, made, data) if measure else ([], 0)
        before = _adapter_traces(run, made, examples) if measure else []
        tried: dict[str, dict[str, Any]] = {}
        for base in _candidates(made):
            folder = aside / base
            folder.mkdir()
            facts = _write(made, base, folder)
            unchanged = facts["merge"].pop("unchanged")
            if made.adapter and len(unchanged) == facts["merge"]["adapted"]:
                raise ParityError(
                    f"{made.adapter}: the merged model equals its base in {made.recipe.export.dtype}; nothing was learnt"
                )
            if unchanged and not allow_mismatch:
                raise ParityError(
                    f"{made.adapter}: {len(unchanged)} of {facts['merge']['adapted']} adapted weights equal their base in "
                    f"{made.recipe.export.dtype}, first {unchanged[0]}; set export.dtype: float32, or pass "
                    "--allow-mismatch"
                )
            if faults := list(text_faults(run, made.tokenizer, made.base, folder)):
                raise ParityError(f"{run}: {faults[0]}; nothing was written")
            facts["merge"]["unchanged"] = unchanged
            tried[base] = facts | (_measured(made, before, folder, examples) if measure else {})
        best = min(tried, key=lambda base: tried[base].get("mean_kl_nats", 0.0))
        parity = {
            "run": run.name,
            "base": TRAINED[best],
            "reason": _reason(tried, best),
            "dtype": made.recipe.export.dtype,
            "measured": measure,
            "held_out_examples": len(examples),
            "held_out_too_long": too_long,
            **tried[best],
            "min_agreement": made.recipe.export.min_agreement,
            "candidates": {TRAINED[base]: facts for base, facts in tried.items()} if len(tried) > 1 else {},
            "base_sha256": origin,
            **({"adapter_sha256": adapter_sha256(made.adapter)} if made.adapter else {}),
        }
        if combination:
            parity["combination"] = combination.record()
            if measure:
                parity["against"] = _against(combination, made, examples, aside / best)
        if measure and parity["answer_argmax_agreement"] < parity["min_agreement"] and not allow_mismatch:
            raise ParityError(
                f"merged and adapter agree on {parity['answer_argmax_agreement']:.2%} of the answer tokens, less than "
                f"export.min_agreement {parity['min_agreement']:.2%}; nothing was written. Set export.base to the "
                "other base, export.dtype: float32, or pass --allow-mismatch"
            )
        folder = aside / best
        if combination:
            (aside / "adapter").rename(folder / "adapter")
        write_json(folder / PARITY, parity)
        (folder / "README.md").write_text(export_card(run, made.recipe, made.base, parity), encoding="utf-8")
        _publish(folder, out.resolve())
    return parity


def check_export(run: Path, out: Path, data: str | None = None) -> dict[str, Any]:
    """Prove an export anew, against its run; nothing is written. Raises ParityError with a line for each fault."""
    if not (out / PARITY).is_file():
        raise RunError(f"{out}: holds no {PARITY}, so it is no finished export; name one with --out")
    with readable(str(out / PARITY)):
        parity = read_parity(out)
    made = _made(run)
    combined = out / "adapter"
    if "combination" in parity:
        made = Made(made.recipe, made.base, combined, made.tokenizer)
    else:
        check_origin(run, made.recipe, made.adapter)
    base = next((name for name, told in TRAINED.items() if told == parity["base"]), None)
    if base is None:
        raise RunError(f"{out / PARITY}: base {parity['base']!r} is none of {', '.join(TRAINED.values())}")
    recipe = made.recipe.model_copy(
        update={"export": made.recipe.export.model_copy(update={"dtype": parity["dtype"]})}
    )
    made = Made(recipe, made.base, made.adapter, made.tokenizer)
    faults = []
    if made.adapter and adapter_sha256(made.adapter) != parity.get("adapter_sha256"):
        faults.append(f"{made.adapter} is not the adapter that was merged: its sha256 has changed since")
    faults += text_faults(run, made.tokenizer, made.base, out)
    try:
        faults += weight_faults(_plan(made, base), out)
    except CannotStream as reason:
        print(f"the weights are not compared one by one, only by what they answer: {reason}", flush=True)
    if faults:
        raise ParityError(f"{out} is not what {run} was trained to be:\n" + "\n".join(f"- {f}" for f in faults))
    examples, too_long = held_out(run, made, data)
    result = _measured(made, _adapter_traces(run, made, examples), out, examples)
    if result["answer_argmax_agreement"] < recipe.export.min_agreement and not parity["answer_argmax_agreement"] == (
        result["answer_argmax_agreement"]
    ):
        raise ParityError(
            f"{out} and the adapter agree on {result['answer_argmax_agreement']:.2%} of the answer tokens, less than "
            f"export.min_agreement {recipe.export.min_agreement:.2%}"
        )
    return {"run": run.name, "export": str(out), "faults": 0, "held_out_too_long": too_long, **result}
