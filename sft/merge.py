"""An adapter merged into its base, streamed: in memory are a few layers, never the model.

The architecture is built without memory for its weights, and PEFT puts the adapter on it. Then each weight is read from
the base's files, merged by PEFT's own layer in float32, and written into the file of the same name. What no adapter
touches is copied by the kernel. So a merge needs memory for two weights, whatever the model's size.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from data.progress import Bar
from sft.base import readable
from sft.parity import ParityError
from sft.shards import Shard, Stored, Tensor, read_header, shard_files, writing

WORKERS = 2  # one merges while the other reads or writes
PREFIX = "base_model.model."  # of PEFT's names in front of the base's


class CannotStream(Exception):
    """Why this base or adapter has to be merged in memory."""


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
            return self.replaced[name].float()
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
                    before[leaf] = values.to(self.dtype)
                    base._parameters[leaf] = nn.Parameter(values, requires_grad=False)
            # not safe_merge: it copies the weight to be able to go back; the result is checked below
            if hasattr(layer, "unload_and_optionally_merge_module"):
                result = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge(safe_merge=False)
                result = layer.get_base_layer()
            values = {leaf: value.detach().to(self.dtype) for leaf, value in result.state_dict().items()}
        finally:
            if base is not None:
                base._parameters.update(kept)
                _forget_merge(layer)
        return {f"{owner}.{leaf}": (before.get(leaf), value) for leaf, value in values.items()}

    def groups(self) -> Iterator[tuple[str | None, list[str]]]:
        """The names of the result's weights in the order of their files: an adapted module's together with its name,
        others by themselves."""
        seen = set()
        for name in (name for tensors in self.layout.values() for name in tensors):
            owner = self.owner(name)
            if owner is None:
                yield None, [name]
            elif owner not in seen:
                seen.add(owner)
                yield owner, [n for tensors in self.layout.values() for n in tensors if self.owner(n) == owner]

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
    with readable(str(base)):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    ties = [names for names in _names_by_weight(model).values() if len(names) > 1]
    stored = _stored(base, model)
    quantize = _quantizers(model, quantization, *trained) if quantization else {}
    adapted: dict[str, nn.Module] = {}
    replaced: dict[str, torch.Tensor] = {}
    if adapter:
        _resize(model, adapter)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if adapter:
        adapted, replaced = _put_on(model, adapter)
        for names in ties:  # what replaces one of them replaces all, unless they come apart below
            replaced |= {name: replaced[n] for n in names if n in replaced for name in names}
    merge = Merge(model, stored, adapted, replaced, dtype, quantize, shapes)
    untied = [names for names in ties if _come_apart(merge, names)]
    merge.layout = _layout(merge, base, untied)
    if untied:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    model.config.dtype = dtype
    return merge


def write_merge(merge: Merge, folder: Path) -> dict[str, Any]:
    """Write the merged weights, their index and config.json; on the disk on return. What was done, by counts, with
    the adapted weights that equal their base's. Raises ParityError for a value that is not finite."""
    groups, unchanged = list(merge.groups()), []
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


def _write_group(
    merge: Merge, shards: dict[str, Shard], owner: str | None, names: list[str]
) -> tuple[int, list[str]]:
    """Bytes written, and which adapted weights equal their base's."""
    if owner is None:
        (name,) = names
        stored = merge.stored.get(name)
        if stored and name not in merge.replaced and name not in merge.quantize and stored.dtype == _dtype(merge, name):
            shards[name].copy(name, stored)
            return stored.bytes, []
        values = merge.before(name).to(_dtype(merge, name))
        _check_finite(name, values)
        shards[name].write(name, values)
        return values.nbytes, []
    unchanged = []
    found = merge.merged(owner)
    for name in names:
        before, after = found[name]
        _check_finite(name, after)
        if before is not None and torch.equal(before, after):
            unchanged.append(name)
        shards[name].write(name, after)
    changed = len(unchanged) < len(names)  # of a module's weight and bias one may stay
    return sum(after.nbytes for _, after in found.values()), [] if changed else unchanged


def _check_finite(name: str, values: torch.Tensor) -> None:
    if values.is_floating_point() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        raise ParityError(
            f"{name}: the merged weight holds values that are not finite in {str(values.dtype).removeprefix('torch.')}; "
            "if float16 is too narrow for it, set export.dtype to bfloat16; else the adapter or its base is broken"
        )


def _stored(base: Path, model: PreTrainedModel) -> dict[str, Stored]:
    """The base's weights by every name that the model has for them."""
    found: dict[str, Stored] = {}
    for file in shard_files(base):
        if not file.is_file():
            raise CannotStream(f"{file.name} is not there")
        try:
            found |= read_header(file)
        except KeyError as error:
            raise CannotStream(f"{file.name} holds a dtype {error} that is not merged") from error
    by_weight = _names_by_weight(model)
    names = {name for group in by_weight.values() for name in group}
    if strange := sorted(found.keys() - names):
        raise CannotStream(f"transformers loads {strange[0]} under another name ({len(strange)} such weights)")
    for group in by_weight.values():
        there = [name for name in group if name in found]
        if len(there) != 1 and len(group) > 1:
            raise CannotStream(f"of the tied {' and '.join(group)} {len(there)} are stored")
        if not there:
            raise CannotStream(f"{group[0]} is not stored")
        found |= {name: found[there[0]] for name in group if name not in found}
    for name, stored in found.items():
        wanted = tuple(model.get_parameter_or_buffer(name).shape)
        if stored.shape != wanted:
            raise CannotStream(f"{name} is stored as {stored.shape}, and the model has {wanted}")
    return found


def _names_by_weight(model: nn.Module) -> dict[int, list[str]]:
    """Names in the state dict that stand for one weight."""
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return groups


def _resize(model: PreTrainedModel, adapter: Path) -> None:
    """As many rows of the embedding as the adapter was trained with, where its tensors tell."""
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    with readable(str(adapter)), safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        whole = PREFIX + embedding + ".weight"
        rows = file.get_slice(whole).get_shape()[0] if whole in file.keys() else None  # noqa: SIM118: no mapping
    if rows and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _put_on(model: PreTrainedModel, adapter: Path) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
    """PEFT's layers in place of the model's, with the adapter's values, and the base's weights that came along.
    Raises ParityError unless each tensor of the adapter has its place and each place its tensor."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    empty = _without_memory(model)
    with readable(str(adapter)):
        tuned = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True, torch_device="cpu")
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            there = set(file.keys())
    adapted: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not _inside(name, adapted):
            if isinstance(module, ParamWrapper):
                raise CannotStream(f"{name} is a parameter with an adapter, no layer")
            adapted[name] = module
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    replaced = {
        _original(name): value.detach()
        for name, value in tensors.items()
        if _is_base(name, adapted) and not value.is_meta and value.data_ptr() != empty.data_ptr()
    }
    wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    came_along = {PREFIX + name for name in replaced}
    if strange := sorted(there - wanted - came_along):
        raise ParityError(
            f"{adapter}: {strange[0]} has no place in the base ({len(strange)} such tensors); it is an adapter of "
            "another base"
        )
    if missing := sorted(wanted - there):
        raise ParityError(f"{adapter}: {missing[0]} is missing ({len(missing)} such tensors); a layer's adapter is gone")
    if built := [n for n, v in tensors.items() if v.is_meta and not _is_base(n, adapted)]:
        raise CannotStream(f"PEFT makes {built[0]} when it builds the adapter")
    return adapted, replaced


def _without_memory(model: nn.Module) -> torch.Tensor:
    """Let each weight be one number seen at every place (stride 0), the returned one: with weights on the meta device
    PEFT would move the adapter there too."""
    number = torch.zeros(())
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(number.expand(parameter.shape), requires_grad=False)
                module._parameters[leaf] = made.setdefault(id(parameter), empty)
    return number


def _inside(name: str, adapted: dict[str, nn.Module]) -> bool:
    return any(name.startswith(f"{owner}.") for owner in adapted)


def _is_base(name: str, adapted: dict[str, nn.Module]) -> bool:
    """Whether a parameter is the base's own, not the adapter's."""
    return not _inside(name, adapted) or ".base_layer." in name or ".original_module." in name


def _original(name: str) -> str:
    """The name that a base's parameter had before PEFT wrapped its module."""
    for wrapper in (".token_adapter", ".base_layer", ".original_module"):
        name = name.replace(wrapper, "")
    return name


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


def _dtype(merge: Merge, name: str) -> torch.dtype:
    stored = merge.stored.get(name)
    return stored.dtype if stored and not stored.dtype.is_floating_point else merge.dtype


def _layout(merge: Merge, base: Path, untied: list[list[str]]) -> dict[str, dict[str, Tensor]]:
    """The base's files with the result's tensors; weights that came apart follow in the last file."""
    layout = {
        file.name: {name: Tensor(_dtype(merge, name), merge.shapes[name]) for name in read_header(file)}
        for file in shard_files(base)
    }
    written = {name for tensors in layout.values() for name in tensors}
    last = next(reversed(layout.values()))
    for name in (name for names in untied for name in names if name not in written):
        last[name] = Tensor(merge.dtype, merge.shapes[name])
    return layout


def _quantizers(
    model: PreTrainedModel, quantization: BitsAndBytesConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """For each weight that bitsandbytes packs into 4 bits, what is left of it, as transformers packs and unpacks it."""
    import bitsandbytes as bnb
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight, replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    packed = copy.deepcopy(model)
    kept = HfQuantizer.get_modules_to_not_convert(packed, None, packed._keep_in_fp32_modules)
    packed = replace_with_bnb_linear(packed, modules_to_not_convert=kept, quantization_config=quantization)

    def rounding(options: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        def through_4_bits(values: torch.Tensor) -> torch.Tensor:
            weight = bnb.nn.Params4bit(values.to(dtype), requires_grad=False, **options).to(device)
            return dequantize_bnb_weight(weight).to(dtype).float().cpu()

        return through_4_bits

    return {
        f"{name}.weight": rounding(module.weight.__dict__)
        for name, module in packed.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
