"""An adapter merged into its base, streamed: in memory are a few layers, never the model.

The architecture is built without memory for its weights, and PEFT puts the adapter on it. Then each weight is read from
the base's files, merged by PEFT's own layer in float32, and written into the file of the same name. What no adapter
touches is copied by the kernel. So a merge needs memory for two weights, whatever the model's size.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from data.progress import Bar
from sft.errors import ParityError
from sft.export.shards import Shard, Stored, Tensor, read_header, shard_files, writing
from sft.export.skeleton import build, names_by_weight, put_on, quantizers, stored_weights
from sft.models.load import fit_vocabulary

WORKERS = 2  # one merges while the other reads or writes
SLICE = 2**20  # weights that are merged at once where rows can be: they stay in a core's cache


@dataclass
class Merge:
    """What is to be merged: `model` without its base's weights, with the adapter's layers; the stored weights (a tied
    one under each of its names), and the files of the result."""

    model: PreTrainedModel
    stored: dict[str, Stored]
    adapted: dict[str, nn.Module]  # PEFT's layers, by the name of what they replace
    replaced: dict[str, torch.Tensor]  # weights of the base that the adapter brings along
    dtype: torch.dtype
    quantize: dict[str, Callable[[torch.Tensor], torch.Tensor]]  # to NF4 and back, as in training, by weight
    shapes: dict[str, tuple[int, ...]]  # of the model, which may have more rows than are stored
    layout: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def before(self, name: str) -> torch.Tensor:
        """The base's weight as training saw it, in float32."""
        if name in self.replaced:
            return self.replaced[name].to(torch.float32, copy=True)
        stored = self.stored[name]
        if stored.shape != self.shapes[name]:
            raise ParityError(
                f"{name} is stored as {stored.shape} and was trained as {self.shapes[name]}, and the adapter does not "
                "hold the added rows: they were drawn at random and are lost; train with modules_to_save"
            )
        values = stored.read()
        return self.quantize[name](values) if name in self.quantize else values.float()

    def merged(self, owner: str) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
        """The weights of an adapted module before and after, in the dtype of the result; before is None where the
        adapter holds the weight as a whole."""
        layer = cast(Any, self.adapted[owner])
        whole = hasattr(layer, "modules_to_save")
        base = None if whole else _base_layer(layer)
        kept = dict(base._parameters) if base is not None else {}
        before = {}
        try:
            if base is not None:
                for leaf, parameter in kept.items():
                    if parameter is None:
                        continue
                    values = self.before(f"{owner}.{leaf}")
                    before[leaf] = values.to(self.dtype, copy=True)  # PEFT adds in place
                    base._parameters[leaf] = nn.Parameter(values, requires_grad=False)
            result = _merged_by_peft(owner, layer)
            after = {leaf: value.detach().to(self.dtype) for leaf, value in result.state_dict().items()}
        finally:
            if base is not None:
                base._parameters.update(kept)
                _forget_merge(layer)
        return {f"{owner}.{leaf}": (before.get(leaf), value) for leaf, value in after.items()}

    def by_rows(self, owner: str) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The same of a layer's weight a few rows at a time, with the number of the first: PEFT merges rows of B into
        rows of the weight. For layers that `has_rows`."""
        layer, name = cast(Any, self.adapted[owner]), f"{owner}.weight"
        base, up = layer.get_base_layer(), layer.lora_B[layer.active_adapters[0]]
        kept, whole = base._parameters["weight"], up.weight
        of = whole.shape[0]
        step = max(1, SLICE // self.stored[name].shape[1])
        try:
            for first in range(0, of, step):
                rows = range(first, min(first + step, of))
                values = self.stored[name].read(rows)
                base._parameters["weight"] = nn.Parameter(values.to(torch.float32, copy=True), requires_grad=False)
                up.weight = nn.Parameter(whole[rows.start : rows.stop], requires_grad=False)
                layer.merge(safe_merge=False)
                yield first, values.to(self.dtype), base.weight.detach().to(self.dtype)
                _forget_merge(layer)
        finally:
            base._parameters["weight"], up.weight = kept, whole
            _forget_merge(layer)

    def has_rows(self, owner: str) -> bool:
        """Whether each row of a module's merged weight comes of that row alone, and the module is no more than it:
        plain LoRA on a stored linear layer."""
        from peft.tuners.lora.layer import Linear

        layer = self.adapted[owner]
        if type(layer) is not Linear or layer.lora_variant or layer.fan_in_fan_out or len(layer.active_adapters) > 1:
            return False
        name, active = f"{owner}.weight", layer.active_adapters[0]
        plain = name not in self.replaced and name not in self.quantize and not layer.lora_bias[active]
        return plain and self.shapes[name] == self.stored[name].shape

    def result(self, owner: str | None, names: list[str]) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
        """What stands in the files under the names of a group, as `merged` returns it."""
        if owner is None:
            return {name: (None, self._stored_as_is(name)) for name in names}
        found = self.merged(owner)
        return {name: found[name] for name in names}

    def is_copied(self, name: str) -> bool:
        """Whether a weight that no adapter touches stays byte for byte."""
        stored = self.stored.get(name)
        untouched = name not in self.replaced and name not in self.quantize
        return untouched and stored is not None and stored.dtype == self.dtype_of(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """The result's: only floating-point weights are converted."""
        stored = self.stored.get(name)
        return stored.dtype if stored and not stored.dtype.is_floating_point else self.dtype

    def _stored_as_is(self, name: str) -> torch.Tensor:
        if self.is_copied(name):
            return self.stored[name].read()
        return self.before(name).to(self.dtype_of(name))

    def groups(self) -> list[tuple[str | None, list[str]]]:
        """The names of the result's weights in the order of their files: an adapted module's together with its name,
        others by themselves."""
        found: dict[str, tuple[str | None, list[str]]] = {}
        for name in (name for tensors in self.layout.values() for name in tensors):
            owner = self.owner(name)
            found.setdefault(owner or name, (owner, []))[1].append(name)
        return list(found.values())

    def owner(self, name: str) -> str | None:
        """The adapted module that a weight belongs to."""
        parents = name.split(".")
        return next((o for i in range(len(parents) - 1, 0, -1) if (o := ".".join(parents[:i])) in self.adapted), None)


def read_merge(
    base: Path,
    adapter: Path | None,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
    trained: tuple[torch.dtype, torch.device] = (torch.float32, torch.device("cpu")),
) -> Merge:
    """The plan of a merge. `quantization`: merge into what is left of the weights after 4 bits, rounded from and to
    the dtype and on the device of training. Raises CannotStream, and ParityError where adapter and base don't fit."""
    model = build(base)
    ties = [names for names in names_by_weight(model).values() if len(names) > 1]
    stored = stored_weights(base, model)
    quantize = quantizers(model, quantization, *trained) if quantization else {}
    adapted: dict[str, nn.Module] = {}
    replaced: dict[str, torch.Tensor] = {}
    if adapter:
        fit_vocabulary(model, adapter)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if adapter:
        adapted, replaced = put_on(model, adapter)
        for names in ties:  # what replaces one of them replaces all, unless they come apart below
            replaced |= {name: replaced[n] for n in names if n in replaced for name in names}
    merge = Merge(model, stored, adapted, replaced, dtype, quantize, shapes)
    untied = [names for names in ties if _come_apart(merge, names)]
    merge.layout = _layout(merge, base, untied)
    alike = {name for names in ties if names not in untied for name in names}  # one of them is written for all
    places = {owner for owner, _ in merge.groups()} | {merge.owner(name) for name in alike}
    if lost := [owner for owner in adapted if owner not in places]:
        raise ParityError(f"{adapter}: {lost[0]} is no weight of the base's files, so its adapter would be lost")
    if untied:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    model.config.dtype = dtype
    return merge


def write_merge(merge: Merge, folder: Path) -> dict[str, Any]:
    """Write the merged weights, their index and config.json; on the disk on return. What was done, by counts, with
    the adapted weights that equal their base's. Raises ParityError for a value that is not finite."""
    groups, unchanged = merge.groups(), []
    threads = torch.get_num_threads()
    total = sum(tensor.bytes for tensors in merge.layout.values() for tensor in tensors.values())
    bar, done = Bar("merge, MiB", total // 2**20), 0
    with writing(folder, merge.layout) as shards:
        pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(max(1, threads // WORKERS),))
        try:
            for written, same in pool.map(lambda group: _write_group(merge, shards, *group), groups):
                unchanged += same
                done += written
                bar.update(done // 2**20)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
            bar.close()
    merge.model.config.architectures = [type(merge.model).__name__]
    merge.model.config.save_pretrained(folder)
    adapted = sum(len(names) for owner, names in groups if owner)
    return {"adapted": adapted, "other": sum(map(len, merge.layout.values())) - adapted, "unchanged": unchanged}


def _write_group(merge: Merge, shards: dict[str, Shard], owner: str | None, names: list[str]) -> tuple[int, list[str]]:
    """Bytes written, and which adapted weights equal their base's."""
    if owner is None and merge.is_copied(names[0]):
        stored = merge.stored[names[0]]
        shards[names[0]].copy(names[0], stored)
        return stored.bytes, []
    if owner and names == [f"{owner}.weight"] and merge.has_rows(owner):
        (name,), same, done = names, True, 0
        for first, old, new in merge.by_rows(owner):
            _check_finite(name, new)
            same = same and torch.equal(old, new)
            shards[name].write(name, new, first)
            done += new.nbytes
        return done, [name] if same else []
    found = merge.result(owner, names)
    for name, (_, after) in found.items():
        _check_finite(name, after)
        shards[name].write(name, after)
    equal = [n for n, (before, after) in found.items() if owner and before is not None and torch.equal(before, after)]
    changed = len(equal) < len(found)  # of a module's weight and bias one may stay
    return sum(after.nbytes for _, after in found.values()), [] if changed else equal


def _check_finite(name: str, values: torch.Tensor) -> None:
    if values.is_floating_point() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        raise ParityError(
            f"{name}: the merged weight is not finite in {str(values.dtype).removeprefix('torch.')}; "
            "if float16 is too narrow for it, set export.dtype to bfloat16; else the adapter or its base is broken"
        )


def _merged_by_peft(owner: str, layer: Any) -> nn.Module:
    """The module with its adapter merged. Not by safe_merge, which copies the weight to be able to go back; whoever
    writes the result checks it."""
    try:
        if hasattr(layer, "unload_and_optionally_merge_module"):
            return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        layer.merge(safe_merge=False)
    except (RuntimeError, ValueError) as error:  # PEFT's, for a kind of layer or setting that has no merge
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ParityError(f"{owner} can't be merged: {why}; serve the run as it is") from error
    return layer.get_base_layer()


def _base_layer(layer: Any) -> nn.Module:
    inner = layer.original_module if hasattr(layer, "original_module") else layer
    return inner.get_base_layer() if hasattr(inner, "get_base_layer") else inner


def _forget_merge(layer: Any) -> None:
    """A merged layer merges once only; this one gets its weight anew each time."""
    layer.merged_adapters = []
    if hasattr(layer, "token_adapter"):
        layer.token_adapter.merged_adapters = []


def _come_apart(merge: Merge, names: list[str]) -> bool:
    """Whether the adapter makes weights differ that the base ties."""
    touched = [n for n in names if merge.owner(n) is not None]
    if not touched:
        return False
    if len(touched) < len(names):
        return True
    first, *others = (merge.merged(cast(str, merge.owner(n)))[n][1] for n in names)
    return not all(torch.equal(first, other) for other in others)


def _layout(merge: Merge, base: Path, untied: list[list[str]]) -> dict[str, dict[str, Tensor]]:
    """The base's files with the result's tensors; weights that came apart follow in the last file."""
    layout = {
        file.name: {name: Tensor(merge.dtype_of(name), merge.shapes[name]) for name in read_header(file)}
        for file in shard_files(base)
    }
    written = {name for tensors in layout.values() for name in tensors}
    last = next(reversed(layout.values()))
    for name in (name for names in untied for name in names if name not in written):
        last[name] = Tensor(merge.dtype, merge.shapes[name])
    return layout
