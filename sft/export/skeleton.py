"""A model without memory for its weights: its architecture with PEFT's layers, and the base's stored weights."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from data.terminal import quoted
from sft.errors import ParityError, RunError
from sft.export.shards import read_shards, shard_files
from sft.models.capabilities import unserved
from sft.models.patterns import check_adapter_patterns
from sft.models.resolve import readable


class CannotStream(Exception):
    """The reason why a base or adapter has to be merged in memory."""


def build(base: Path) -> PreTrainedModel:
    """The architecture that a folder's config.json names, on the meta device."""
    with readable(str(base)):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def stored_weights(base: Path, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """The base's weights by every name that the model has for them, and by file the names that are stored there."""
    if missing := [file.name for file in shard_files(base) if not file.is_file()]:
        raise CannotStream(f"{missing[0]} is missing")
    shards = read_shards(base)
    stored = {name: weight for weights in shards.values() for name, weight in weights.items()}
    for name, weight in stored.items():
        if weight.is_floating_point() and weight.dtype.itemsize == 1:
            raise CannotStream(f"{name} is stored as {weight.dtype}, whose scales only transformers knows")
    groups = names_by_weight(model).values()
    if unknown := sorted(stored.keys() - {name for names in groups for name in names}):
        raise CannotStream(f"transformers loads {unknown[0]} under another name ({len(unknown)} such weights)")
    for names in groups:
        weights = [stored[name] for name in names if name in stored]
        if len(weights) != 1 and len(names) > 1:
            raise CannotStream(f"{len(weights)} of the tied {' and '.join(names)} are stored")
        if not weights:
            raise CannotStream(f"{names[0]} is not stored")
        shape, wanted = tuple(weights[0].shape), tuple(model.get_parameter_or_buffer(names[0]).shape)
        if shape != wanted:
            raise CannotStream(f"{names[0]} is stored as {shape}, but the model has {wanted}")
        stored |= dict.fromkeys(names, weights[0])
    return stored, {file: list(weights) for file, weights in shards.items()}


def names_by_weight(model: nn.Module) -> dict[int, list[str]]:
    """The names that one weight has in the state dict, by its identity."""
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return groups


def adapter_config(adapter: Path) -> Any:
    """An adapter's configuration, as PEFT's class for its kind."""
    from peft import PeftConfig

    with readable(str(adapter)):
        return PeftConfig.from_pretrained(str(adapter))


def attach_adapter(model: PreTrainedModel, adapter: Path) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
    """Replace modules by PEFT's layers with the adapter's values. Returns these layers by the module's name, and the
    weights of the base that the adapter's file holds. Raises CannotStream and the errors of check_adapter."""
    from peft import PeftModel
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    init = getattr(adapter_config(adapter), "init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva"):
        raise CannotStream(f"init_lora_weights {init} changes the base")
    empty = free_parameters(model)
    with readable(str(adapter)):
        check_adapter_patterns(model, adapter)
        tuned = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True, torch_device="cpu")
    adapted: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not _inside(name, adapted):
            if isinstance(module, ParamWrapper):
                raise CannotStream(f"{name} has an adapter on a parameter, not on a layer")
            adapted[name] = cast(nn.Module, module)
    check_adapter(tuned, adapter)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if built := [name for name, value in tensors.items() if value.is_meta and not _is_base(name, adapted)]:
        raise CannotStream(f"PEFT computes {built[0]} when it builds the adapter")
    replaced = {
        original_name(name): value.detach()
        for name, value in tensors.items()
        if _is_base(name, adapted) and not value.is_meta and value.data_ptr() != empty.data_ptr()
    }
    return adapted, replaced


def check_adapter(tuned: Any, adapter: Path) -> None:
    """Raise RunError if PEFT can't merge this kind of adapter; ParityError unless its file holds exactly the tensors
    that the model expects."""
    from peft import get_peft_model_state_dict

    if not hasattr(type(tuned.base_model), "merge_and_unload"):
        raise RunError(
            f"{adapter}: {tuned.active_peft_config.peft_type.value} can't be merged: its parameters are not weights "
            f"of the base; {unmerged_way(adapter)}"
        )
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that embeddings are included
        optional = set(get_peft_model_state_dict(tuned, save_embedding_layers=True))
    if unknown := sorted(stored - wanted - optional):
        raise ParityError(
            f"{adapter}: {unknown[0]} has no place in the base ({len(unknown)} such tensors); it is an adapter of "
            "another base"
        )
    if missing := sorted(wanted - stored):
        raise ParityError(
            f"{adapter}: {missing[0]} is missing ({len(missing)} such tensors); a layer lacks its adapter"
        )


def unmerged_way(adapter: Path) -> str:
    """What a user can do with a run whose adapter can't be merged."""
    run = adapter.parent
    if not unserved(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))):
        return f"serve the run as it is: graft serve {quoted(run)}"
    return f"it can be neither merged nor served, so ask it here: graft chat {quoted(run)}, or graft eval {quoted(run)}"


def free_parameters(model: nn.Module) -> torch.Tensor:
    """Replace each parameter by a view (stride 0) of one number, which is returned. PEFT moves an adapter to its base's
    device, so that must not be the meta device."""
    number = torch.zeros(())
    replacements: dict[int, nn.Parameter] = {}  # by parameter: tied ones stay tied
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(number.expand(parameter.shape), requires_grad=False)
                module._parameters[leaf] = replacements.setdefault(id(parameter), empty)
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
    """For each weight that bitsandbytes packs into 4 bits, a function that packs and unpacks it like transformers."""
    import bitsandbytes as bnb
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight, replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    if name := next((n for n, m in model.named_modules() if isinstance(m, Conv1D)), None):
        raise CannotStream(f"{name} stores its weight transposed, and transformers transposes it before packing")
    packed = copy.deepcopy(model)
    unconverted = HfQuantizer.get_modules_to_not_convert(packed, None, cast(Any, packed)._keep_in_fp32_modules)
    packed = replace_with_bnb_linear(packed, modules_to_not_convert=unconverted, quantization_config=quantization)

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
