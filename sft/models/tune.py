"""Choose what of a base model is trained: PEFT's methods, and full, freeze, linear_probe."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from sft.errors import RecipeError
from sft.models.adapter_init import check_init, note_first_values, sums_of
from sft.models.patterns import check_patterns
from sft.recipe.load import peft_types
from sft.recipe.schema import Tune

VIRTUAL_TOKENS = ("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning")


def tune_model(base: PreTrainedModel, tune: Tune, seed: int, one_dtype: bool = False) -> PreTrainedModel:
    """The model with the method's parameters trainable and all others frozen.

    `seed` draws the adapter's initial weights, which are fp32 or, with one_dtype, of the base's dtype.
    """
    set_seed(seed)
    if tune.method in ("full", "freeze", "linear_probe"):
        return _train_part(base, tune)
    model = add_adapter(base, tune, "CAUSAL_LM", one_dtype=one_dtype)
    _check_head(model)
    return model


def add_adapter(
    base: PreTrainedModel, tune: Tune, task: str | None, defaults: Mapping[str, Any] = {}, one_dtype: bool = False
) -> PreTrainedModel:
    """The base with the method's adapter for a task type of PEFT. defaults: settings that the recipe may leave out.

    Raises RecipeError for settings that do not fit the base, and for virtual tokens without a number.
    """
    from peft import get_peft_model

    settings = {**defaults, **tune.peft}
    if tune.method in VIRTUAL_TOKENS and not settings.get("num_virtual_tokens"):
        raise RecipeError(f"tune.num_virtual_tokens: tune.method {tune.method} needs it; 20 is usual")
    if settings.get("prompt_tuning_init") == "TEXT":  # read by the base's tokenizer
        settings["tokenizer_name_or_path"] = base.config._name_or_path
    check_patterns(base, tune.peft, "tune")
    check_init(settings, one_dtype)
    before = sums_of(base)
    try:
        config = peft_types()[tune.method](task_type=task, **settings)
        model = get_peft_model(base, config, autocast_adapter_dtype=not one_dtype)
    except (ValueError, TypeError) as error:  # names the module or value that does not fit this base
        raise RecipeError(f"tune: {error}") from error
    note_first_values(model, before, tune.method)
    return cast(PreTrainedModel, model)  # it has the same methods


def _check_head(model: PreTrainedModel) -> None:
    """Raise RecipeError for an adapter on the output layer, which TRL refuses after everything is loaded."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name.rpartition(".")[2] for name, module in model.named_modules() if module is head)
        raise RecipeError(
            f"tune.target_modules: {name} is the output layer, which takes no adapter in training; leave it out, or "
            f"train it whole: tune.modules_to_save: [{name}]"
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable parameters and of all; a packed 4-bit weight counts its logical elements."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = 0
    for p in model.parameters():
        packed = hasattr(p, "quant_state") and p.quant_state is not None
        total += int(torch.Size(p.quant_state.shape).numel()) if packed else p.numel()  # type: ignore[attr-defined]
    return trainable, total


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
    """Train the parameters whose name matches a pattern, and no others. Raises RecipeError if none matches."""
    check_patterns(model, patterns, "tune.trainable")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError(f"tune.trainable: no parameter matches {', '.join(patterns)}")
