"""Merge an adapter into its base, one file of the base at a time.

The architecture is built without memory for its weights, and PEFT puts the adapter on it. Then each weight is read from
the base's files and merged by PEFT's own layer in float32; a file of the result is written when its weights are merged.
So a merge needs memory for about twice the largest file, whatever the model's size.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from data.errors import DiskFull
from data.progress import track
from data.terminal import quoted
from sft.errors import ParityError, RecipeError, RunError
from sft.export.shards import INDEX, SINGLE
from sft.export.skeleton import (
    CannotStream,
    attach_adapter,
    build,
    names_by_weight,
    quantizers,
    stored_weights,
    unmerged_way,
)
from sft.models.load import fit_vocabulary
from sft.models.resolve import resolve_base
from sft.models.target import run_any_recipe


class Weight(NamedTuple):
    """A weight of the result; `before` is the base's in the same dtype, None if no adapter changes it."""

    name: str
    owner: str | None  # the adapted module
    before: torch.Tensor | None
    after: torch.Tensor


@dataclass
class Merge:
    """The plan of a merge. `model` has the adapter's layers and no weight of its base."""

    model: PreTrainedModel
    stored: dict[str, torch.Tensor]  # the base's weights; a tied one under each of its names
    adapted: dict[str, nn.Module]  # PEFT's layers, by the name of the module that they replace
    replaced: dict[str, torch.Tensor]  # weights of the base that the adapter's file holds as a whole
    dtype: torch.dtype
    quantize: dict[str, Callable[[torch.Tensor], torch.Tensor]]  # by weight: to NF4 and back, as in training
    adapter: Path | None
    shapes: dict[str, tuple[int, ...]]  # as trained; a vocabulary may have more rows than are stored
    files: dict[str, list[str]] = field(default_factory=dict)  # names of the result's weights, by file

    def weights(self, names: Iterable[str]) -> Iterator[Weight]:
        """The named weights of the result, grouped by module."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.owner(name) or name, []).append(name)
        for owner, group in groups.items():
            if owner in self.adapted:
                merged = self.merged(owner)
                yield from (merged[name] for name in group)
            else:
                yield Weight(owner, None, None, self._base_weight(owner).to(self.dtype_of(owner)))

    def merged(self, owner: str) -> dict[str, Weight]:
        """The weights of an adapted module, by name."""
        layer, before = cast(Any, self.adapted[owner]), {}
        if not hasattr(layer, "modules_to_save"):  # else the layer itself holds the whole weight
            memo: dict[int, Any] = {}
            for leaf, empty in _base_layer(layer)._parameters.items():
                if empty is not None:
                    weight = self._base_weight(f"{owner}.{leaf}")
                    before[leaf] = weight.to(self.dtype)
                    memo[id(empty)] = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
            layer = copy.deepcopy(layer, memo)  # with the base's weights; the plan's own layer stays empty
        try:
            after = _merged_by_peft(layer)
        except (RuntimeError, ValueError) as error:  # PEFT can't merge this kind of layer or setting
            reason = (str(error).partition("\n")[0] or type(error).__name__).rstrip(".")
            raise ParityError(f"{owner} can't be merged: {reason}; {unmerged_way(cast(Path, self.adapter))}") from error
        weights = (Weight(f"{owner}.{leaf}", owner, before.get(leaf), w.to(self.dtype)) for leaf, w in after.items())
        return {weight.name: weight for weight in weights}

    def owner(self, name: str) -> str | None:
        """The adapted module that a weight belongs to."""
        parents = name.split(".")
        return next((o for i in range(len(parents) - 1, 0, -1) if (o := ".".join(parents[:i])) in self.adapted), None)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a weight in the result: only floating-point weights are converted."""
        return self.dtype if self.stored[name].is_floating_point() else self.stored[name].dtype

    def _base_weight(self, name: str) -> torch.Tensor:
        """The base's weight as training saw it. It may be memory mapped to the file, so it must not change in place."""
        if name in self.replaced:
            return self.replaced[name]
        stored, trained = self.stored[name], self.shapes[name]
        if tuple(stored.shape) != trained:
            raise ParityError(
                f"{name} is stored as {tuple(stored.shape)} and was trained as {trained}, and the adapter does not "
                "hold the added rows: they were drawn at random and are lost; train with modules_to_save"
            )
        return self.quantize[name](stored) if name in self.quantize else stored


def read_merge(
    base: Path,
    adapter: Path | None,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
    trained: tuple[torch.dtype, torch.device] = (torch.float32, torch.device("cpu")),
) -> Merge:
    """The plan of a merge. `quantization`: merge into the weights that 4 bits leave; `trained`: dtype and device with
    which training rounded them. Raises CannotStream, and ParityError if adapter and base don't fit."""
    model = build(base)
    ties = [names for names in names_by_weight(model).values() if len(names) > 1]
    stored, files = stored_weights(base, model)
    quantize = quantizers(model, quantization, *trained) if quantization else {}
    adapted: dict[str, nn.Module] = {}
    replaced: dict[str, torch.Tensor] = {}
    if adapter:
        fit_vocabulary(model, adapter)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if adapter:
        adapted, replaced = attach_adapter(model, adapter)
        for names in ties:  # a weight that replaces one of them replaces all, unless they are untied below
            replaced |= {name: replaced[n] for n in names if n in replaced for name in names}
    merge = Merge(model, stored, adapted, replaced, dtype, quantize, adapter, shapes, files)
    written = {name for names in files.values() for name in names}
    places = {merge.owner(name) for name in written}
    for names in ties:
        if _are_untied(merge, names):  # each must be written: names that the base lacks go into the last file
            next(reversed(files.values())).extend(name for name in names if name not in written)
            model.config.get_text_config().tie_word_embeddings = False
            model.config.tie_word_embeddings = False
        places |= {merge.owner(name) for name in names}
    if lost := [owner for owner in adapted if owner not in places]:
        raise ParityError(f"{adapter}: {lost[0]} is no weight of the base's files, so its adapter would be lost")
    model.config.dtype = dtype
    return merge


def write_merge(merge: Merge, folder: Path) -> dict[str, Any]:
    """Write the merged weights, their index and config.json. Returns counts, and the adapted weights that equal their
    base's. Raises DiskFull before anything is written, ParityError for a value that is not finite."""
    file_of = {name: file for file, names in merge.files.items() for name in names}
    total_size = sum(math.prod(merge.shapes[name]) * merge.dtype_of(name).itemsize for name in file_of)
    if (free := shutil.disk_usage(folder).free) < total_size:
        raise DiskFull(
            f"{folder}: has room for {free / 1e9:.2f} GB, and the merged model takes {total_size / 1e9:.2f} GB; "
            "make room, or name another --out"
        )
    adapted: dict[str, dict[str, bool]] = {}  # by module and name, whether the weight equals its base's
    for file, names in merge.files.items():
        tensors = {}
        for name, owner, before, after in track(merge.weights(names), f"merge {file}", len(names)):
            _check_finite(name, after)
            tensors[name] = after.contiguous()
            if owner:
                adapted.setdefault(owner, {})[name] = before is not None and torch.equal(before, after)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors lets only the owner read it; a server may run as another user
    if list(merge.files) != [SINGLE]:
        index = {"metadata": {"total_size": total_size}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    merge.model.config.architectures = [type(merge.model).__name__]
    merge.model.config.save_pretrained(folder)
    count = sum(map(len, adapted.values()))
    # a module may leave its bias unchanged if it changes its weight
    unchanged = [name for equal in adapted.values() if all(equal.values()) for name in equal]
    return {"adapted": count, "other": len(file_of) - count, "unchanged": unchanged}


def _check_finite(name: str, values: torch.Tensor) -> None:
    if values.is_floating_point() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        raise ParityError(
            f"{name}: the merged weight is not finite in {str(values.dtype).removeprefix('torch.')}; "
            "if float16 is too narrow for it, set export.dtype to bfloat16; else the adapter or its base is broken"
        )


def other_way(adapter: Path) -> str:
    """What a user can do with a run whose adapter can't be served: merge it, if a layer of each kind can be merged."""
    run = adapter.parent
    base = Path(resolve_base(run_any_recipe(run).model.base))
    try:
        if base.is_dir():
            merge = read_merge(base, adapter, torch.float32)
            kinds = {(type(m), owner.rpartition(".")[2]): owner for owner, m in merge.adapted.items()}
            for owner in kinds.values():
                merge.merged(owner)
    except (ParityError, RunError):
        return unmerged_way(adapter)
    except (CannotStream, RecipeError):
        pass  # it is merged in memory, or the export says what is wrong with its files
    return f"merge it first: graft export {quoted(run)}"


def _merged_by_peft(layer: Any) -> dict[str, torch.Tensor]:
    """The weights of a module with its adapter merged into them. Without safe_merge, which copies each weight to undo a
    merge that is not finite; write_merge checks that."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        merged: dict[str, torch.Tensor] = layer.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        ).state_dict()
        return merged
    layer.merge(safe_merge=False)
    return layer.get_base_layer().state_dict()


def _base_layer(layer: Any) -> nn.Module:
    inner = layer.original_module if hasattr(layer, "original_module") else layer
    return inner.get_base_layer() if hasattr(inner, "get_base_layer") else inner


def _are_untied(merge: Merge, names: list[str]) -> bool:
    """Whether the adapter makes weights differ that the base ties."""
    owners = [owner for name in names if (owner := merge.owner(name))]
    if len(owners) < len(names):
        return bool(owners)
    first, *others = (weight.after for weight in merge.weights(names))
    return not all(torch.equal(first, other) for other in others)
