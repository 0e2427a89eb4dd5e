"""Merge a run into a plain model, and prove that it still answers like the run.

graft export RUN [--out DIR] [--check]
"""

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from data.atomic import flush, write_json
from sft.errors import ParityError, RunError, RunLocked
from sft.export.candidate import CANDIDATES, Trained, base_names, plan, write_candidate
from sft.export.combine import Combination, combine
from sft.export.formats import calibration_rows, convert, find_writer, format_faults, load_format
from sft.export.integrity import PARITY, adapter_sha256, check_origin, read_parity, text_faults, weight_faults
from sft.export.parity import HeldOut, Judge, check_agreement, least_agreement, read_held_out
from sft.export.skeleton import CannotStream, base_folder
from sft.models.load import default_device
from sft.models.resolve import readable
from sft.models.target import adapter_folder, run_recipe
from sft.recipe.schema import changed
from sft.runs.folder import check_writable
from sft.runs.model_card import export_card


def export(
    run: Path,
    out: Path,
    data: str | None = None,
    allow_mismatch: bool = False,
    measure: bool = True,
    combination: Combination | None = None,
    form: str = "",
) -> dict[str, Any]:
    """Write the merged model to `out` and return its parity record. Raises ParityError, with nothing written. With
    `measure` off no model is loaded, for one that is larger than memory: only its weights are checked. `form`: what to
    make of the merged model, see sft/export/formats.py."""
    form = form.lower()
    write = find_writer(form) if form else None
    log = run / f"export-{form}.log"  # of the tool; it is kept where that fails
    trained = read_trained(run)
    check_writable(out, "--out")
    out = out.resolve()
    if out.exists() and any(path.name != _aside_name(out) for path in out.iterdir()):
        raise RunError(f"{out} is not empty; name another folder with --out")
    origin = check_origin(run, trained.recipe, trained.adapter)
    rows = calibration_rows(form, trained)
    if write:
        check_writable(run, "the run folder, for the tool's log")
    with _aside(out) as aside:
        if combination:
            trained = _combined(combination, trained, origin, aside / "adapter")
        judge = Judge(trained, read_held_out(run, trained, data)) if measure else None
        tried = {}
        for base in base_names(trained, measure):
            made = write_candidate(trained, base, aside / base, allow_mismatch)
            tried[base] = (judge.folder(aside / base) if judge else {}) | {"merge": made}
        best = min(tried, key=lambda base: tried[base].get("mean_kl_nats", 0.0))  # of equals the first: as trained
        folder = aside / best
        parity = {
            "run": run.name,
            "base": CANDIDATES[best],
            "reason": _reason(tried, best),
            "dtype": trained.recipe.export.dtype,
            "measured": measure,
            "held_out_examples": len(judge.held_out.examples) if judge else 0,
            "held_out_too_long": judge.held_out.too_long if judge else 0,
            **tried[best],
            "min_agreement": trained.recipe.export.min_agreement,
            "candidates": {CANDIDATES[base]: facts for base, facts in tried.items()},
            "base_sha256": origin,
            "adapter_sha256": adapter_sha256(trained.adapter) if trained.adapter else None,
        }
        if combination:
            parity["combination"] = combination.record()
            if judge:
                parity["against"] = _against(combination, judge.held_out, folder)
        if judge and not allow_mismatch:
            check_agreement(parity, trained.recipe)
        if write:
            made = convert(form, write, trained, folder, aside / form, rows, log)
            folder = aside / form
            measured = judge.model(load_format(form, folder, judge.dtype), form) if judge else {}
            key, least = least_agreement(trained.recipe, form)
            parity["format"] = {"name": form, **made, **measured, key: least}
            if judge and not allow_mismatch:
                check_agreement(measured, trained.recipe, form)
        if combination:
            (aside / "adapter").rename(folder / "adapter")
        write_json(folder / PARITY, parity)
        (folder / "README.md").write_text(export_card(run, trained.recipe, trained.base, parity), encoding="utf-8")
        _publish(folder, out)
    return parity


def check_export(run: Path, out: Path, data: str | None = None, allow_mismatch: bool = False) -> dict[str, Any]:
    """Prove an export anew against its run; nothing is written. Raises ParityError with a line for each fault."""
    parity, trained = read_parity(out), read_trained(run)
    base = next((name for name, told in CANDIDATES.items() if told == parity["base"]), None)
    if base is None:
        raise RunError(f"{out / PARITY}: base {parity['base']!r} is none of {', '.join(CANDIDATES.values())}")
    check_origin(run, trained.recipe, trained.adapter)
    trained = dataclasses.replace(trained, recipe=changed(trained.recipe, export={"dtype": parity["dtype"]}))
    if "combination" in parity:
        trained = dataclasses.replace(trained, adapter=out / "adapter")
    faults = []
    if trained.adapter and adapter_sha256(trained.adapter) != parity["adapter_sha256"]:
        faults.append(f"{trained.adapter} is not the adapter that was merged: its sha256 is another now")
    form = parity.get("format", {}).get("name", "")
    faults += format_faults(form, trained, out) if form else text_faults(run, trained.tokenizer, trained.base, out)
    try:
        if form:
            raise CannotStream(f"{form} has rounded them")
        faults += weight_faults(plan(trained, base), out)
    except CannotStream as reason:
        print(f"weights are not compared one by one, only by what they answer: {reason}", flush=True)
    if faults:
        raise ParityError(f"{out} is not the export of {run}:\n" + "\n".join(f"- {fault}" for fault in faults))
    judge = Judge(trained, read_held_out(run, trained, data))
    found = judge.model(load_format(form, out, judge.dtype), form) if form else judge.folder(out)
    if not allow_mismatch:
        check_agreement(found, trained.recipe, form)
    return {"run": run.name, "export": str(out), "faults": 0, **found}


def read_trained(run: Path) -> Trained:
    """What a run trained. On a CPU it is measured in float32, whatever the run computed in: bfloat16 rounds activations
    as coarsely as weights, so that near ties would flip on both sides, merged right or not."""
    recipe = run_recipe(run)
    if default_device().type == "cpu":
        recipe = changed(recipe, model={"dtype": "float32"})
    whole = (run / "model").is_dir()
    weights = run / "model" if whole else adapter_folder(run)
    with readable(f"{weights}: the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(weights, trust_remote_code=False)
    base = weights if whole else base_folder(recipe.model)
    return Trained(run, recipe, base, None if whole else weights, weights, tokenizer)


def _combined(combination: Combination, trained: Trained, origin: dict[str, str], folder: Path) -> Trained:
    """The first run, with the adapter of all. Raises ParityError where bases differ, RunError where templates do."""
    adapters = []
    for run in combination.runs:
        other = read_trained(run)
        if trained.adapter is None or other.adapter is None:
            raise RunError(f"{run}: --combine takes runs with adapters, not whole models")
        ours, theirs = trained.recipe.model, other.recipe.model
        named_alike = (ours.base, ours.revision) == (theirs.base, theirs.revision)  # of a hub there are no digests
        if check_origin(run, other.recipe, other.adapter) != origin or not (origin or named_alike):
            raise ParityError(f"{run} and {trained.run} have different bases; only adapters of one can be combined")
        if theirs.quantization != ours.quantization:
            raise ParityError(f"{run} and {trained.run} have different model.quantization; what they see differs")
        if fault := next(text_faults(trained.run, trained.tokenizer, trained.base, other.weights, stops=False), None):
            raise RunError(f"{run} and {trained.run}: {fault}")
        adapters.append(other.adapter)
    combine(combination, trained.base, adapters, folder, trained.recipe.train.seed)
    return dataclasses.replace(trained, adapter=folder)


def _against(combination: Combination, held_out: HeldOut, folder: Path) -> dict[str, dict[str, Any]]:
    """How far the combined model is from each run that it was made of."""
    named = zip(combination.names(), combination.runs, strict=True)
    return {name: Judge(read_trained(run), held_out, name).folder(folder) for name, run in named}


def _reason(tried: dict[str, dict[str, Any]], best: str) -> str:
    """The sentence that says which base was chosen, and why."""
    if len(tried) == 1:
        return f"{CANDIDATES[best]}: the only candidate{'' if 'mean_kl_nats' in tried[best] else ', not measured'}"
    told = [
        f"{CANDIDATES[base]}: mean KL {facts['mean_kl_nats']:.2e} nats, largest logit difference "
        f"{facts['max_logit_difference']:.3g}, {facts['answer_argmax_agreement']:.2%} of answer tokens agree, "
        f"exact match {facts['task_score']['merged']['exact']:.1f}"
        for base, facts in tried.items()
    ]
    adapter = tried[best]["task_score"]["adapter"]["exact"]
    return (
        f"{CANDIDATES[best]} is written, because its answers diverge least from those of the adapter on the base of "
        f"training ({'; '.join(told)}; adapter {adapter:.1f})"
    )


def _aside_name(out: Path) -> str:
    return f".{out.name}.new"


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder on the same disk, gone at the end: inside an empty folder that is there, which may be a mount or the
    current one; beside one to be made."""
    aside = (out if out.is_dir() else out.parent) / _aside_name(out)
    aside.mkdir(parents=True, exist_ok=True)
    handle = os.open(aside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(f"{out}: another export writes there; wait for its end, or name another --out") from None
        try:
            for left in aside.iterdir():  # of an export that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(handle)


def _publish(folder: Path, out: Path) -> None:
    """All files on the disk, then the name. In a folder that is there config.json comes last: without it nothing loads
    the model."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        flush(file)
    flush(folder)
    if out.is_dir():
        for file in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            file.rename(out / file.name)
        flush(out)
    else:
        folder.rename(out)
    flush(out.parent)


def verify_export(out: Path, run: Path | None, data: str | None, allow_mismatch: bool) -> dict[str, Any]:
    """Re-verify a finished export against `run`, or the run whose folder it is in. Raises RunError without one."""
    read_parity(out)
    run = run or out.absolute().parent
    if not (run / "recipe.yaml").is_file():
        raise RunError(f"{out}: is in no run folder, so its run is not known; name it: --run RUN")
    return check_export(run, out, data, allow_mismatch)
