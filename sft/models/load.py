"""Load a base model, its tokenizer and its configuration in the recipe's precision."""

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data.conversation import ARGUMENTS, DATE
from data.encode.tokens import control_tokens
from eval.predict import max_positions
from sft.errors import RecipeError
from sft.models.resolve import readable, resolve_base, stored_config
from sft.models.speed import bfloat16_pays
from sft.recipe.baseline_schema import EncoderModel
from sft.recipe.schema import Model, Quantization, Recipe
from sft.untrusted import check_config


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_config(model: Model | EncoderModel) -> PretrainedConfig:
    folder = resolve_base(model.base)
    with readable(f"model.base: {model.base}"):
        return AutoConfig.from_pretrained(folder, revision=model.revision, trust_remote_code=False)


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    folder = resolve_base(model.base)
    with readable(f"model.base: {model.base}: the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=model.revision, trust_remote_code=False)
    if model.chat_template:
        if not model.chat_template.is_file():  # opening a FIFO would wait for ever
            raise RecipeError(f"model.chat_template: no such file: {model.chat_template}; name a Jinja file")
        try:
            tokenizer.chat_template = model.chat_template.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"model.chat_template: {error}; name a Jinja file in UTF-8") from error
    if isinstance(tokenizer.chat_template, str):  # a base's own file may begin with a byte order mark too
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    if model.template_arguments != "auto":
        tokenizer.init_kwargs[ARGUMENTS] = model.template_arguments
    if model.template_date != "auto":
        tokenizer.init_kwargs[DATE] = str(model.template_date)
    check_vocabulary(model, tokenizer)
    return tokenizer


def check_vocabulary(model: Model | EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise RecipeError if a token that texts or the chat template can hold has no row in the base's embedding."""
    rows = load_config(model).get_text_config().to_dict().get("vocab_size")
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if rows is not None and i >= rows}
    unused = set(control_tokens(tokenizer).values()) - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if isinstance(model, EncoderModel):  # each text gets all of them
        unused -= set(tokenizer.all_special_ids)
    template = str(tokenizer.chat_template)
    missing = [token for i, token in sorted(beyond.items()) if i not in unused or token in template]
    if missing:
        shown = ", ".join(map(repr, missing[:3])) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise RecipeError(
            f"model.base: {model.base}: its embedding has {rows} rows, and its tokenizer gives {shown} ids up to "
            f"{max(beyond)}; make the embedding larger and save the base again, in Python: "
            f"model.resize_token_embeddings({max(beyond) + 1}); model.save_pretrained(FOLDER)"
        )


def load_base(model: Model, device: torch.device) -> PreTrainedModel:
    """The base in the recipe's precision, in eval mode.

    4-bit weights are dequantized once if model.dequantize is true, and always on a CPU: no CPU kernel multiplies them,
    so every forward and backward would dequantize them again. (bitsandbytes 0.50 also repacks them in the first eval
    forward for a kernel without autograd.)
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
    if dequantizes(model, device):
        loaded = loaded.dequantize(dtype=compute_dtype(model, device))
    loaded.config.use_cache = False
    return loaded


def dequantizes(model: Model, device: torch.device) -> bool:
    """Whether load_base unpacks the base's weights; `auto` leaves them packed on CUDA."""
    four_bits = model.quantization is not None and model.quantization.load_in_4bit
    return four_bits and (device.type == "cpu" or model.dequantize is True)


def load_weights(name: str, folder: str | Path, **options: Any) -> PreTrainedModel:
    """The model of a folder or Hub id, with PyTorch's SDPA if the architecture has it.

    Raises RecipeError, also for a weight that is missing or has another shape: transformers would draw it at random.
    """
    with readable(name):
        check_config(stored_config(str(folder), options.get("revision")), name)
        model, loading = cast(Any, AutoModelForCausalLM).from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **options,
        )
    mismatched, missing = loading["mismatched_keys"], loading["missing_keys"]
    if mismatched:
        weight, stored, wanted = min(mismatched)
        raise RecipeError(
            f"{name}: {weight} is stored as {tuple(stored)}, and its config.json asks for {tuple(wanted)} "
            f"({len(mismatched)} such weights); config and weights must belong to one model"
        )
    if missing:
        raise RecipeError(
            f"{name}: the weight {min(missing)}, which its config.json asks for, is missing "
            f"({len(missing)} such weights); name a whole causal language model"
        )
    if model.generation_config:
        savable(model.generation_config)
    return cast(PreTrainedModel, model)


def savable(config: GenerationConfig) -> GenerationConfig:
    """The config as transformers can write it: some older bases set a temperature without do_sample."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
    return config


def generation_config(base: str, revision: str | None = None) -> GenerationConfig:
    """The generation config of a folder or Hub id, without its weights; made from its config if it has none."""
    with readable(base):
        try:
            return savable(GenerationConfig.from_pretrained(base, revision=revision or "main"))
        except OSError:
            config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
            return GenerationConfig.from_model_config(config)


def compute_dtype(model: Model, device: torch.device) -> torch.dtype:
    """model.dtype; for `auto` bfloat16 on CUDA, and on a CPU the faster one as measured."""
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" or bfloat16_pays() else torch.float32
    return getattr(torch, model.dtype)


def is_quantized(quantization: Quantization | None) -> bool:
    return quantization is not None and (quantization.load_in_4bit or quantization.load_in_8bit)


def check_length(recipe: Recipe) -> None:
    """Raise RecipeError if data.max_length exceeds the base's positions."""
    positions = max_positions(load_config(recipe.model))
    if positions is not None and recipe.data.max_length > positions:
        raise RecipeError(
            f"data.max_length {recipe.data.max_length} exceeds the {positions} positions of "
            f"{recipe.model.base}; lower it"
        )


def bitsandbytes_config(model: Model, device: torch.device) -> Any:
    """transformers' BitsAndBytesConfig; None if the recipe does not quantize."""
    quantization = model.quantization
    if quantization is None:
        return None
    named = quantization.bnb_4bit_compute_dtype
    compute = getattr(torch, named) if named else compute_dtype(model, device)
    return BitsAndBytesConfig(**{**quantization.model_dump(), "bnb_4bit_compute_dtype": compute})


PREFIX = "base_model.model."  # PEFT puts it before the base's names


def fit_vocabulary(model: PreTrainedModel, adapter: Path) -> None:
    """Resize the embedding to the rows that the adapter was trained with, if it holds the whole embedding."""
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    with readable(str(adapter)), safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = {f"{PREFIX}{embedding}.weight", f"{PREFIX}{embedding}.base_layer.weight"} & set(file.keys())
        rows = max((file.get_slice(name).get_shape()[0] for name in names), default=None)
    if rows and rows != cast(Any, model.get_input_embeddings()).weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
