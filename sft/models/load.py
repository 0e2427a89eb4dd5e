"""Base models and what of them is trained: load_base, then tune_model."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from eval.predict import max_positions
from sft.models.resolve import readable, resolve_base, stored_config
from sft.recipe.load import peft_types
from sft.recipe.schema import Model, Quantization, Recipe, RecipeError, Tune
from sft.training.flops import matmul_flops_per_s
from sft.untrusted import check_config

CPU = torch.device("cpu")
VIRTUAL_TOKENS = ("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_config(model: Model) -> PretrainedConfig:
    folder = resolve_base(model.base)
    with readable(f"model.base: {model.base}"):
        return AutoConfig.from_pretrained(folder, revision=model.revision, trust_remote_code=False)


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    folder = resolve_base(model.base)
    with readable(f"model.base: {model.base}: the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=model.revision, trust_remote_code=False)
    if model.chat_template:
        try:
            tokenizer.chat_template = model.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"model.chat_template: {error}; name a Jinja file in UTF-8") from error
    return tokenizer


def load_base(model: Model, device: torch.device) -> PreTrainedModel:
    """The base in the recipe's precision, frozen or not as loaded, in eval mode.

    On a CPU 4-bit weights are dequantized once: the same values, without doing it in every forward and backward, as
    there is no 4-bit product on CPUs. (bitsandbytes 0.50 would also repack them in the first eval forward, and multiply
    by a kernel without autograd from then on.)
    """
    loaded = load_weights(
        f"model.base: {model.base}",
        resolve_base(model.base),
        revision=model.revision,
        dtype=compute_dtype(model, device),
        quantization_config=bitsandbytes_config(model, device),
        device_map={"": device},
        **({"use_kernels": True} if model.use_kernels and device.type == "cuda" else {}),
    )
    if model.quantization and model.quantization.load_in_4bit and device.type == "cpu":
        loaded = loaded.dequantize(dtype=compute_dtype(model, device))
    loaded.config.use_cache = False
    return loaded


def load_weights(name: str, folder: str | Path, **options: Any) -> PreTrainedModel:
    """The model of a folder or Hub id. Raises RecipeError, also where a weight is missing or of another shape, which
    transformers would draw at random. Its attention is PyTorch's SDPA where the architecture has it, as packs need."""
    with readable(name):
        check_config(stored_config(str(folder), options.get("revision")), name)
        model, found = cast(Any, AutoModelForCausalLM).from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below
            **options,
        )
    mismatched, missing = found["mismatched_keys"], found["missing_keys"]
    if mismatched:
        weight, stored, wanted = min(mismatched)
        raise RecipeError(
            f"{name}: {weight} is stored as {tuple(stored)}, and its config.json asks for {tuple(wanted)} "
            f"({len(mismatched)} such weights); config and weights must be of one model"
        )
    if missing:
        raise RecipeError(
            f"{name}: the weight {min(missing)}, which its config.json asks for, is not there "
            f"({len(missing)} such weights); name a whole causal language model"
        )
    if model.generation_config:
        savable(model.generation_config)
    return cast(PreTrainedModel, model)


def savable(config: GenerationConfig) -> GenerationConfig:
    """Older bases name a temperature and leave do_sample out, which transformers reads and won't write."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
    return config


def compute_dtype(model: Model, device: torch.device) -> torch.dtype:
    """model.dtype, where it is `auto` the fastest one that trains: bfloat16 on CUDA, on a CPU as measured."""
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" or bfloat16_pays() else torch.float32
    return getattr(torch, model.dtype)


@cache
def bfloat16_pays() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones. CPUs that have the
    instructions differ: one was measured at 0.5 times the speed, another at 4.4 times."""
    rates = [matmul_flops_per_s(CPU, dtype, 0.05, 1024) for dtype in (torch.bfloat16, torch.float32)]
    return rates[0] > 1.5 * rates[1]


def is_quantized(quantization: Quantization | None) -> bool:
    return quantization is not None and (quantization.load_in_4bit or quantization.load_in_8bit)


def tune_model(base: PreTrainedModel, tune: Tune, seed: int, one_dtype: bool = False) -> PreTrainedModel:
    """The model whose trainable parameters are the method's; all others frozen.

    Seeded here, because PEFT draws the adapter's initial weights. They are fp32, or with one_dtype the base's.
    """
    set_seed(seed)
    if tune.method in ("full", "freeze", "linear_probe"):
        return _train_part(base, tune)
    from peft import get_peft_model

    config = peft_types()[tune.method](task_type="CAUSAL_LM", **peft_settings(tune, base))
    try:
        model = get_peft_model(base, config, autocast_adapter_dtype=not one_dtype)
    except ValueError as error:  # PEFT names the module or value that does not fit this base
        raise RecipeError(f"tune: {error}") from error
    return cast(PreTrainedModel, model)  # it answers to the same calls


def peft_settings(tune: Tune, base: PreTrainedModel) -> dict[str, Any]:
    """Settings of PEFT; those of a prompt that begins as a text with the base's tokenizer, which reads it. Raises
    RecipeError where virtual tokens have no number."""
    settings = tune.peft
    if tune.method in VIRTUAL_TOKENS and not settings.get("num_virtual_tokens"):
        raise RecipeError(f"tune.num_virtual_tokens: tune.method {tune.method} needs it; 20 is usual")
    text = settings.get("prompt_tuning_init") == "TEXT"
    return {**settings, "tokenizer_name_or_path": base.config._name_or_path} if text else settings


def check_length(recipe: Recipe) -> None:
    """Raise RecipeError where data.max_length is more than the base has positions."""
    positions = max_positions(load_config(recipe.model))
    if positions is not None and recipe.data.max_length > positions:
        raise RecipeError(
            f"data.max_length {recipe.data.max_length} exceeds the {positions} positions of "
            f"{recipe.model.base}; lower it"
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable, and all; a packed 4-bit weight counts its logical elements."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = 0
    for p in model.parameters():
        packed = hasattr(p, "quant_state") and p.quant_state is not None
        total += int(torch.Size(p.quant_state.shape).numel()) if packed else p.numel()  # type: ignore[attr-defined]
    return trainable, total


def bitsandbytes_config(model: Model, device: torch.device) -> Any:
    """transformers' BitsAndBytesConfig; None where the recipe does not quantize."""
    quantization = model.quantization
    if quantization is None or not is_quantized(quantization):
        return None
    from transformers import BitsAndBytesConfig

    named = quantization.bnb_4bit_compute_dtype
    compute = getattr(torch, named) if named else compute_dtype(model, device)
    return BitsAndBytesConfig(**{**quantization.model_dump(), "bnb_4bit_compute_dtype": compute})


def _train_part(base: PreTrainedModel, tune: Tune) -> PreTrainedModel:
    base.requires_grad_(tune.method == "full")
    if tune.method == "linear_probe":
        head = base.get_output_embeddings()
        if base.config.tie_word_embeddings:  # else the input embedding would be trained with it
            head.weight = nn.Parameter(head.weight.detach().clone())
            base.config.tie_word_embeddings = False
        head.requires_grad_(True)
    if tune.method == "freeze":
        train_matching(base, tune.trainable)
    return base


def train_matching(model: nn.Module, patterns: Sequence[str]) -> None:
    """Train the parameters whose name a pattern matches, no others. Raises RecipeError where there is none."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError(f"tune.trainable: no parameter matches {', '.join(patterns)}")
