"""Check that base, adapter, weights, chat template and end tokens of an export are those of its run.

graft verify EXPORT [--run RUN]
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from data.cache import file_sha256, text_sha256
from data.encode.chat import stop_tokens
from data.progress import track
from sft.errors import ParityError, RunError
from sft.export.merge import Merge, Weight
from sft.export.shards import read_shards
from sft.models.load import generation_config
from sft.models.resolve import readable, resolve_base
from sft.recipe.schema import Recipe

PARITY = "parity.json"
# how far a weight may be from the merged one, as a share of the distance base -> merged: CPUs round differently
TOLERANCE = 0.1
# numbers, spaces, marks, letters of several scripts, code: tokenizers with the same vocabulary split these differently
PROBE = "It's 12,345.67 €  now;\n\tdef f(x): return x**2  # naïve Ärger, Москва, 北京 東京, 👍🏽 don't"
NOT_COMPARED = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")


def check_origin(run: Path, recipe: Recipe, adapter: Path | None) -> dict[str, str]:
    """The sha256 of the base's files by name; empty for a Hub id. Raises ParityError unless they equal those of the
    run's manifest."""
    if adapter is None:  # the trained weights are in the run folder themselves
        return {}
    base = Path(resolve_base(recipe.model.base))
    record = _read(base / PARITY)
    if record and record.get("adapter_sha256") == adapter_sha256(adapter):
        raise ParityError(
            f"{recipe.model.base} is not what {run} was trained on: it already contains this adapter, which would be "
            "merged twice; put the base of training back"
        )
    identity = _manifest(run)["base"]
    commit = identity.get("commit")
    if commit and base.parent.name == "snapshots" and base.name != commit:
        raise ParityError(
            f"{recipe.model.base} is not what {run} was trained on: its commit is {base.name}, that of training is "
            f"{commit}; set model.revision: {commit}"
        )
    trained = {name: sha256 for name, sha256 in identity["sha256"].items() if name.endswith(".safetensors")}
    files = sorted(base.glob("*.safetensors")) if base.is_dir() else []
    current = {file.name: file_sha256(file) for file in track(files, "check the base's files")}
    if trained and sorted(trained.values()) != sorted(current.values()):
        raise ParityError(
            f"{recipe.model.base} is not what {run} was trained on: it is another base (sha256 of its weights: in "
            f"training {_short(trained)}, now {_short(current)}); put the base of training back"
        )
    return current


def adapter_sha256(adapter: Path) -> str:
    return file_sha256(adapter / "adapter_model.safetensors")


def read_parity(out: Path) -> dict[str, Any]:
    """The parity record of an export. Raises RunError if the folder holds no finished export."""
    record = _read(out / PARITY)
    if not record or not record.keys() >= {"base", "dtype", "adapter_sha256"}:
        raise RunError(f"{out}: holds no {PARITY} of a finished export; name the folder that `graft export` wrote")
    return record


def text_faults(
    run: Path, ours: PreTrainedTokenizerBase, base: Path, folder: Path, stops: bool = True
) -> Iterator[str]:
    """Differences of a model folder's chat template, tokens and stop tokens from those of the run, a line each."""
    with readable(str(folder)):
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    own, current = text_sha256(str(ours.chat_template)), text_sha256(str(theirs.chat_template))
    trained = _manifest(run).get("chat_template_sha256") or own
    if {own, trained} != {current}:
        yield (
            f"the chat template has changed: sha256 {current[:12]}, trained with {trained[:12]}; prompts would be "
            "rendered differently"
        )
    if ours.get_vocab() != theirs.get_vocab():
        yield "the tokenizer has another vocabulary than the run's"
    if ours(PROBE)["input_ids"] != theirs(PROBE)["input_ids"]:
        yield "the tokenizer splits text differently from the run's"
    special, ours_special = theirs.special_tokens_map, ours.special_tokens_map
    for kind in sorted(special.keys() | ours_special.keys()):
        if special.get(kind) != ours_special.get(kind):
            yield f"the tokenizer's {kind} is {special.get(kind)}, the run's is {ours_special.get(kind)}"
    if stops:
        listed = generation_config(str(folder)).eos_token_id
        ids = sorted(listed) if isinstance(listed, list) else [listed]
        if ids != (wanted := stop_tokens(generation_config(str(base)).eos_token_id, ours)):
            yield f"generation_config.json stops at EOS {ids}, training taught to stop at {wanted}"


def weight_faults(merge: Merge, folder: Path) -> Iterator[str]:
    """Differences of a model folder's weights and settings from those of the merge, a line each."""
    stored = {name: weight for weights in read_shards(folder).values() for name, weight in weights.items()}
    wanted = [name for names in merge.files.values() for name in names]
    if odd := sorted({*wanted} ^ stored.keys()):
        kind = "missing" if odd[0] in wanted else "no weight of the merged model"
        yield f"{odd[0]} is {kind} ({len(odd)} such weights)"
    adapted = at_base = 0
    faults = []
    for weight in track(merge.weights(name for name in wanted if name in stored), "check the weights", len(stored)):
        fault = _fault(weight, stored[weight.name])
        adapted += weight.owner is not None
        at_base += fault == _at_base(weight.name)
        faults += [fault] if fault else []
    if adapted and at_base == adapted:
        faults = ["the merged model equals its base: no weight holds the adapter"]
    yield from faults[:10]
    if len(faults) > 10:
        yield f"and {len(faults) - 10} more weights"
    ours, theirs = merge.model.config.to_dict(), AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    for key in sorted((ours.keys() | theirs.keys()) - set(NOT_COMPARED)):
        if ours.get(key) != theirs.get(key):
            yield f"config.json: {key} is {theirs.get(key)}, the run's is {ours.get(key)}"


def _fault(weight: Weight, stored: torch.Tensor) -> str:
    """What is wrong with a stored weight; empty if it is the merged one."""
    name, _, before, after = weight
    if (stored.dtype, stored.shape) != (after.dtype, after.shape):
        return f"{name} is {stored.dtype} {tuple(stored.shape)}, merged {after.dtype} {tuple(after.shape)}"
    if torch.equal(stored, after):
        return ""
    stored, after = stored.double(), after.double()
    distance = (stored - after).norm()
    if before is not None and (length := (after - before.double()).norm()) > 0:
        if distance < TOLERANCE * length:
            return ""
        if (stored - before.double()).norm() < TOLERANCE * length:
            return _at_base(name)
        # its place on the line from base (0) to merged (1)
        place = ((stored - before.double()) * (after - before.double())).sum() / length**2
        if abs(place - 2) < TOLERANCE:
            return f"{name} holds the adapter twice"
    elif distance <= 1e-5 * after.norm():  # rounded on another CPU
        return ""
    return f"{name} is not the merged weight: they differ by up to {(stored - after).abs().max():.3g}"


def _at_base(name: str) -> str:
    return f"{name} equals the base's: its adapter was dropped"


def _manifest(run: Path) -> dict[str, Any]:
    facts = _read(run / "manifest.json")
    if not facts:
        raise RunError(f"{run}: holds no manifest.json, so what it was trained on can't be checked")
    return facts


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    with readable(str(file)):
        return json.loads(file.read_text())


def _short(digests: Mapping[str, str]) -> str:
    return ", ".join(digest[:12] for digest in digests.values()) or "none"
