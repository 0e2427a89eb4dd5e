"""A model without memory for its weights: its architecture, PEFT's layers on it, and where its weights are stored."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft.errors import ParityError
from sft.export.shards import INDEX, SINGLE, read_shards, shard_files
from sft.models.resolve import readable, resolve_base
from sft.recipe.schema import Model, is_hub_id


class CannotStream(Exception):
    """Why this base or adapter has to be merged in memory."""


def base_folder(model: Model) -> Path:
    """The folder of a base's configuration and weights; those of a Hub id are fetched, or found in the hub's cache."""
    name = resolve_base(model.base)
    if not is_hub_id(name):
        return Path(name)
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    options: dict[str, Any] = {"revision": model.revision}
    with readable(f"model.base: {name}"):
        config = cached_file(name, "config.json", **options)
        cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False, **options)
        index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False, **options)
        if index:
            get_checkpoint_shard_files(name, index, **options)
        else:
            cached_file(name, SINGLE, _raise_exceptions_for_missing_entries=False, **options)
    return Path(cast(str, config)).parent


def build(base: Path) -> PreTrainedModel:
    """The architecture that a folder's config.json names, on the meta device."""
    with readable(str(base)):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def stored_weights(base: Path, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """The base's weights by every name that the model has for them, and by file the names that are stored there."""
    if missing := [file.name for file in shard_files(base) if not file.is_file()]:
        raise CannotStream(f"{missing[0]} is not there")
    shards = read_shards(base)
    found = {name: weight for weights in shards.values() for name, weight in weights.items()}
    for name, weight in found.items():
        if weight.is_floating_point() and weight.dtype.itemsize == 1:
            raise CannotStream(f"{name} is stored as {weight.dtype}, whose scales only transformers knows")
    by_weight = names_by_weight(model)
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
    for name, weight in found.items():
        stored, wanted = tuple(weight.shape), tuple(model.get_parameter_or_buffer(name).shape)
        if stored != wanted:
            raise CannotStream(f"{name} is stored as {stored}, and the model has {wanted}")
    return found, {file: list(weights) for file, weights in shards.items()}


def names_by_weight(model: nn.Module) -> dict[int, list[str]]:
    """Names in the state dict that stand for one weight."""
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return groups


def adapter_config(adapter: Path) -> Any:
    """PEFT's configuration of an adapter's kind."""
    from peft import PeftConfig

    with readable(str(adapter)):
        return PeftConfig.from_pretrained(str(adapter))


def put_on(model: PreTrainedModel, adapter: Path) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
    """PEFT's layers in place of the model's, with the adapter's values, and the base's weights that came along.
    Raises CannotStream, and ParityError unless each tensor of the adapter has its place and each place its tensor."""
    from peft import PeftModel
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    start = getattr(adapter_config(adapter), "init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise CannotStream(f"init_lora_weights {start} changes the base")
    empty = without_memory(model)
    with readable(str(adapter)):
        tuned = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True, torch_device="cpu")
    adapted: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not _inside(name, adapted):
            if isinstance(module, ParamWrapper):
                raise CannotStream(f"{name} is a parameter with an adapter, no layer")
            adapted[name] = cast(nn.Module, module)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    replaced = {
        original_name(name): value.detach()
        for name, value in tensors.items()
        if _is_base(name, adapted) and not value.is_meta and value.data_ptr() != empty.data_ptr()
    }
    check_places(tuned, adapter)
    if built := [n for n, v in tensors.items() if v.is_meta and not _is_base(n, adapted)]:
        raise CannotStream(f"PEFT makes {built[0]} when it builds the adapter")
    return adapted, replaced


def check_places(tuned: nn.Module, adapter: Path) -> None:
    """Raise ParityError unless each tensor of the adapter's file has its place and each place its tensor."""
    from peft import get_peft_model_state_dict

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        there = set(file.keys())
    wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells at length that it was told to include embeddings
        may_come_along = set(get_peft_model_state_dict(tuned, save_embedding_layers=True))
    if strange := sorted(there - wanted - may_come_along):
        raise ParityError(
            f"{adapter}: {strange[0]} has no place in the base ({len(strange)} such tensors); it is an adapter of "
            "another base"
        )
    if missing := sorted(wanted - there):
        raise ParityError(
            f"{adapter}: {missing[0]} is missing ({len(missing)} such tensors); a layer's adapter is gone"
        )


def without_memory(model: nn.Module) -> torch.Tensor:
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


def original_name(name: str) -> str:
    """The name that a base's parameter had before PEFT wrapped its module."""
    for wrapper in (".token_adapter", ".base_layer", ".original_module"):
        name = name.replace(wrapper, "")
    return name


def quantizers(
    model: PreTrainedModel, quantization: BitsAndBytesConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """For each weight that bitsandbytes packs into 4 bits, what is left of it, as transformers packs and unpacks it."""
    import bitsandbytes as bnb
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight, replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    if name := next((n for n, m in model.named_modules() if isinstance(m, Conv1D)), None):
        raise CannotStream(f"{name} holds its weight transposed, and transformers packs it as it is not stored")
    packed = copy.deepcopy(model)
    kept = HfQuantizer.get_modules_to_not_convert(packed, None, cast(Any, packed)._keep_in_fp32_modules)
    packed = replace_with_bnb_linear(packed, modules_to_not_convert=kept, quantization_config=quantization)

    def rounding(options: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        def through_4_bits(values: torch.Tensor) -> torch.Tensor:
            weight: Any = bnb.nn.Params4bit(values.to(dtype), requires_grad=False, **options)
            weight = weight.to(device)
            return dequantize_bnb_weight(weight).to(dtype).float().cpu()

        return through_4_bits

    return {
        f"{name}.weight": rounding(module.weight.__dict__)
        for name, module in packed.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
