"""Merge a run into a plain model, and check that it answers like the run.

graft export RUN [--out DIR]
"""

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from data.atomic import flush, is_hidden_name, new_folder, remove, write_json
from data.terminal import print
from sft.errors import ParityError, RunError
from sft.export.candidate import CANDIDATES, Trained, base_names, plan, write_candidate
from sft.export.combine import Combination, combine
from sft.export.formats import calibration_rows, convert, find_writer, format_faults
from sft.export.integrity import PARITY, adapter_sha256, check_origin, read_parity, text_faults, weight_faults
from sft.export.parity import HeldOut, ParityCheck, check_agreement, least_agreement, read_held_out
from sft.export.shards import base_folder
from sft.export.skeleton import CannotStream
from sft.models.load import default_device
from sft.models.resolve import readable
from sft.models.target import adapter_folder, is_run, run_recipe
from sft.recipe.schema import changed
from sft.runs.folder import check_writable
from sft.runs.interrupt import LOCK, lock_file
from sft.runs.model_card import export_card
from sft.untrusted import check_contents


def export(
    run: Path,
    out: Path,
    data: str | None = None,
    allow_mismatch: bool = False,
    measure: bool = True,
    combination: Combination | None = None,
    form: str = "",
) -> dict[str, Any]:
    """Write the merged model to `out` and return its parity record. Raises ParityError, with nothing written. Without
    `measure`, for a model larger than memory, no model is loaded: only its weights are checked. `form`: the format to
    convert the merged model to, see sft/export/formats.py."""
    form = form.lower()
    write = find_writer(form) if form else None
    trained = read_trained(run)
    check_writable(out, "--out")
    out = out.resolve()
    if out.exists() and set(out.iterdir()) != set(_leftovers(out)):
        raise RunError(f"{out} is not empty; name another folder with --out")
    origin = check_origin(run, trained.recipe, trained.adapter)
    rows = calibration_rows(form, trained)
    if write:
        check_writable(run, "the run folder, for the tool's log")
    with _temporary_folder(out) as temporary:
        if combination:
            trained = _combined(combination, trained, origin, temporary / "adapter")
        check = ParityCheck(trained, read_held_out(run, trained, data)) if measure else None
        tried = {}
        for base in base_names(trained, measure):
            merge = write_candidate(trained, base, temporary / base, allow_mismatch)
            tried[base] = (check.compare(temporary / base) if check else {}) | {"merge": merge}
        best = min(tried, key=lambda base: tried[base].get("mean_kl_nats", 0.0))  # the first of equals: as trained
        folder = temporary / best
        parity = {
            "run": run.name,
            "base": CANDIDATES[best],
            "reason": _reason(tried, best),
            "dtype": trained.recipe.export.dtype,
            "measured": measure,
            "held_out_examples": len(check.held_out.examples) if check else 0,
            "held_out_too_long": check.held_out.too_long if check else 0,
            **tried[best],
            "min_agreement": trained.recipe.export.min_agreement,
            "candidates": {CANDIDATES[base]: facts for base, facts in tried.items()},
            "base_sha256": origin,
            "adapter_sha256": adapter_sha256(trained.adapter) if trained.adapter else None,
        }
        if combination:
            parity["combination"] = combination.record()
            if check:
                parity["against"] = _against(combination, check.held_out, folder)
        if check and not allow_mismatch:
            check_agreement(parity, trained.recipe)
        if write:
            log = run / f"export-{form}.log"  # of the tool; it stays if the tool fails
            facts = convert(form, write, trained, folder, temporary / form, rows, log)
            folder = temporary / form
            measured = check.compare(folder, form) if check else {}
            key, least = least_agreement(trained.recipe, form)
            parity["format"] = {"name": form, **facts, **measured, key: least}
            if check and not allow_mismatch:
                check_agreement(measured, trained.recipe, form)
        if combination:
            (temporary / "adapter").rename(folder / "adapter")
        write_json(folder / PARITY, parity)
        (folder / "README.md").write_text(export_card(run, trained.recipe, trained.base, parity), encoding="utf-8")
        _publish(folder, out)
    return parity


def verify_export(out: Path, run: Path | None, data: str | None, allow_mismatch: bool) -> dict[str, Any]:
    """Re-verify a finished export against `run`, or else the run whose folder it is in; writes nothing. Raises RunError
    without a run, ParityError with a line for each fault."""
    if is_run(str(out)):
        raise RunError(f"{out}: is a run; add the /v1 address of its server, or name its export: {out / 'export'}")
    check_contents(out, str(out))
    parity = read_parity(out)
    run = run or out.absolute().parent
    if not (run / "recipe.yaml").is_file():
        raise RunError(f"{out}: is in no run folder, so its run is unknown; name it with --run RUN")
    trained = read_trained(run)
    base = next((name for name, written in CANDIDATES.items() if written == parity["base"]), None)
    if base is None:
        raise RunError(f"{out / PARITY}: base {parity['base']!r} is none of {', '.join(CANDIDATES.values())}")
    check_origin(run, trained.recipe, trained.adapter)
    trained = dataclasses.replace(trained, recipe=changed(trained.recipe, export={"dtype": parity["dtype"]}))
    if "combination" in parity:
        trained = dataclasses.replace(trained, adapter=out / "adapter")
    form = parity.get("format", {}).get("name", "")
    faults = []
    if trained.adapter and adapter_sha256(trained.adapter) != parity["adapter_sha256"]:
        faults.append(f"{trained.adapter} is not the adapter that was merged: its sha256 differs")
    faults += format_faults(form, trained, out)
    try:
        if form:
            raise CannotStream(f"{form} has rounded them")
        faults += weight_faults(plan(trained, base), out)
    except CannotStream as reason:
        print(f"weights are not compared one by one, only the answers: {reason}", file=sys.stderr, flush=True)
    if faults:
        raise ParityError(f"{out} is not the export of {run}:\n" + "\n".join(f"- {fault}" for fault in faults))
    measured = ParityCheck(trained, read_held_out(run, trained, data)).compare(out, form)
    if not allow_mismatch:
        check_agreement(measured, trained.recipe, form)
    return {"run": run.name, "export": str(out), "faults": 0, **measured}


def read_trained(run: Path) -> Trained:
    """Read what a run trained. On a CPU its recipe is set to float32, whatever the run computed in: bfloat16 rounds
    activations as coarsely as weights, so that near ties would flip even if the merge is right."""
    recipe = run_recipe(run)
    if default_device().type == "cpu":
        recipe = changed(recipe, model={"dtype": "float32"})
    whole = (run / "model").is_dir()
    weights = run / "model" if whole else adapter_folder(run)
    with readable(f"{weights}: the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(weights, trust_remote_code=False)
    base = weights if whole else base_folder(recipe.model)
    return Trained(run, recipe, base, None if whole else weights, tokenizer)


def _combined(combination: Combination, trained: Trained, origin: dict[str, str], folder: Path) -> Trained:
    """The first run with the combined adapter. Raises ParityError if bases differ, RunError if templates do."""
    adapters = []
    for run in combination.runs:
        other = read_trained(run)
        if trained.adapter is None or other.adapter is None:
            raise RunError(f"{run}: combine takes runs with adapters, not whole models")
        ours, theirs = trained.recipe.model, other.recipe.model
        named_alike = (ours.base, ours.revision) == (theirs.base, theirs.revision)  # a Hub id has no digests
        if check_origin(run, other.recipe, other.adapter) != origin or not (origin or named_alike):
            raise ParityError(f"{run} and {trained.run} have different bases; only adapters of one can be combined")
        if theirs.quantization != ours.quantization:
            raise ParityError(f"{run} and {trained.run} have different model.quantization, so different bases")
        if fault := next(text_faults(trained.run, trained.tokenizer, trained.base, other.adapter, stops=False), None):
            raise RunError(f"{run} and {trained.run}: {fault}")
        adapters.append(other.adapter)
    combine(combination, trained.base, adapters, folder, trained.recipe.train.seed)
    return dataclasses.replace(trained, adapter=folder)


def _against(combination: Combination, held_out: HeldOut, folder: Path) -> dict[str, dict[str, Any]]:
    """The distance of the combined model from each of its runs."""
    named = zip(combination.names(), combination.runs, strict=True)
    return {name: ParityCheck(read_trained(run), held_out, name).compare(folder) for name, run in named}


def _reason(tried: dict[str, dict[str, Any]], best: str) -> str:
    """One sentence: the chosen base, and why."""
    if len(tried) == 1:
        return f"{CANDIDATES[best]}: the only candidate{'' if 'mean_kl_nats' in tried[best] else ', not measured'}"
    measured = [
        f"{CANDIDATES[base]}: mean KL {facts['mean_kl_nats']:.2e} nats, largest logit difference "
        f"{facts['max_logit_difference']:.3g}, {facts['answer_argmax_agreement']:.2%} of answer tokens agree, "
        f"exact match {facts['task_score']['merged']['exact']:.1f}"
        for base, facts in tried.items()
    ]
    adapter = tried[best]["task_score"]["adapter"]["exact"]
    return (
        f"{CANDIDATES[best]} is written, because its answers diverge least from those of the adapter on the base of "
        f"training ({'; '.join(measured)}; adapter {adapter:.1f})"
    )


def _place(out: Path) -> Path:
    """For temporary folders, on the same disk: in an existing `out`, which may be a mount or the current folder; else
    beside it."""
    return out if out.is_dir() else out.parent


def _leftovers(out: Path) -> list[Path]:
    """The temporary folders of exports to `out` that were killed, or still write."""
    hidden = (path for path in _place(out).iterdir() if is_hidden_name(path, re.escape(out.name)))
    return [path for path in hidden if path.is_dir() and not path.is_symlink()]


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """An empty folder for this process alone; removed at the end. Raises RunLocked if another export writes there."""
    _place(out).mkdir(parents=True, exist_ok=True)
    folder, busy = new_folder(_place(out) / out.name), f"{out}: another export writes there:"
    try:
        with lock_file(folder / LOCK, busy):
            for leftover in _leftovers(out):
                if leftover != folder and (leftover / LOCK).exists():  # without a lock it was made a moment ago
                    with lock_file(leftover / LOCK, busy):
                        remove(leftover)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> None:
    """Flush all files to the disk, then rename. Into an existing folder config.json goes last: without it nothing loads
    the model."""
    for path in (*folder.rglob("*"), folder):
        flush(path)
    if out.is_dir():
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(out / path.name)
        flush(out)
    else:
        folder.rename(out)
    flush(out.parent)
