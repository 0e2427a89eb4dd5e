"""Resolve what a recipe leaves to `auto`, once: the run's recipe.yaml holds the decision, and a resume repeats it."""

from dataclasses import replace
from importlib.util import find_spec

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from data.encode.example_store import Examples
from data.encode.pack import Layout
from sft.errors import RecipeError
from sft.kernels.fused_layers import fuse_layers
from sft.kernels.fused_lora import fuse_lora
from sft.models.capabilities import has_virtual_tokens, sliding_window, takes_padding
from sft.models.load import compute_dtype, dequantizes, load_config
from sft.recipe.schema import OTHER_METHODS, Recipe, changed
from sft.session import shards_parameters
from sft.training.attention import choose_attention
from sft.training.compile_layers import (
    compile_layers,
    compile_pays,
    decoder_layers,
    keep_kernels_private,
    missing_compiler,
    training_seconds,
)
from sft.training.examples import layout_of, rows_layout, sharing_of
from sft.training.memory import (
    GIB,
    SHARE,
    NotCounted,
    count_memory,
    load_of,
    memory_of,
    model_without_weights,
)
from sft.training.plan import StepPlan, plan_steps

# an H200 trains a 7B 2 % faster with 16,384, which takes 1.5 times the memory
GPU_PACKS = (8192, 4096, 2048)


def resolve_dtype(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with model.dtype as the main process decides it.

    On a CPU nothing casts between layers, so a run that trains weights of the base is float32 throughout; of PEFT's
    methods, LoRA is known to train in bfloat16.
    """
    model, tune, train = recipe.model, recipe.tune, recipe.train
    if model.use_kernels and not (device.type == "cuda" and find_spec("kernels")):
        raise RecipeError("model.use_kernels: needs a GPU and `pip install kernels`; or set it to false")
    mixed = tune.method != "lora" or bool(tune.peft.get("modules_to_save") or tune.peft.get("trainable_token_indices"))
    half = compute_dtype(model, device)
    if device.type == "cpu" and mixed and not train.bf16 and half != torch.float32:
        if model.dtype != "auto" and tune.method in (*OTHER_METHODS, "ln_tuning", "lora"):
            raise RecipeError(f"model.dtype {model.dtype}: a CPU trains weights of the base in float32; use auto")
        half = torch.float32 if model.dtype == "auto" else half
    (agreed,) = broadcast_object_list([str(half).removeprefix("torch.")])
    return changed(recipe, model={"dtype": agreed})


def resolve_dequantize(recipe: Recipe, examples: Examples, device: torch.device) -> tuple[Recipe, list[str]]:
    """The recipe with model.dequantize as the main process counts it before the base is loaded, and lines for the user.

    Without 4-bit weights, and on a CPU, which always unpacks them, it stays `auto`.
    """
    unpacked = changed(recipe, model={"dequantize": True})
    if device.type == "cpu" or recipe.model.dequantize != "auto" or not dequantizes(unpacked.model, device):
        return recipe, []
    dense = model_without_weights(recipe, load_config(recipe.model), compute_dtype(recipe.model, device))
    plan = expected_plan(recipe, dense, examples, device)
    fits, why = _fits(unpacked, plan, device, recipe.train.gradient_checkpointing is True)
    lines = [f"with 4-bit weights unpacked, {why}: {'they are unpacked once' if fits else 'they stay packed'}"]
    return changed(recipe, model={"dequantize": bool(fits)}), lines


def expected_plan(recipe: Recipe, model: PreTrainedModel, examples: Examples, device: torch.device) -> StepPlan:
    """The steps as they will be planned if the base follows a pack's mask, from a tuned model without weights."""
    asked, share = recipe.train.attn_implementation, recipe.data.share_prefixes
    if has_virtual_tokens(model):  # each example is then a row of its own
        layout = rows_layout(recipe, device.type == "cuda", padded=True)
    else:
        attention = choose_attention(model, device, _half(recipe)) if asked == "auto" else asked
        on_gpu = device.type == "cuda"
        pays = sharing_of(examples, recipe, attention, on_gpu).pays if share == "auto" else share
        layout = layout_of(recipe, pays, attention, on_gpu)
        recipe = changed(recipe, train={"attn_implementation": attention})
        layout, _ = _sized(recipe, layout, examples, device)
    return plan_steps(examples, recipe.train, layout, recipe.data.max_branches)


def _half(recipe: Recipe) -> bool:
    """Whether a GPU computes attention in half precision: autocast is on there unless the recipe turns it off."""
    return recipe.train.bf16 is not False or recipe.model.dtype in ("bfloat16", "float16")


def _sized(recipe: Recipe, layout: Layout, examples: Examples, device: torch.device) -> tuple[Layout, list[str]]:
    """The layout with the largest packs of GPU_PACKS that fit without gradient checkpointing, on a GPU if the recipe
    leaves them to `auto`; lines for the user."""
    if recipe.data.pack_tokens != "auto" or device.type == "cpu" or layout.attention != "sparse":
        return layout, []
    for tokens in GPU_PACKS:
        sized = replace(layout, pack_tokens=tokens)
        plan = plan_steps(examples, recipe.train, sized, recipe.data.max_branches)
        fits, why = _fits(recipe, plan, device, recipe.train.gradient_checkpointing is True)
        if fits:
            return sized, [f"at most {tokens:,} tokens in a micro-batch: {why}"]
    return layout, []


def resolve_auto(
    recipe: Recipe, model: PreTrainedModel, examples: Examples, takes_mask: bool, resumed: bool = False
) -> tuple[Recipe, Layout, list[str]]:
    """The recipe with share_prefixes, pack_tokens and attn_implementation resolved; the layout of micro-batches; lines
    for the user.

    model: with its adapter. takes_mask: takes_packs() of the base. resumed: decide again what this machine can't do.
    Raises RecipeError if the recipe asks for the impossible.
    """
    data, attention, lines = recipe.data, recipe.train.attn_implementation, list[str]()
    if attention == "flex_attention" and model.device.type == "cpu":
        if not resumed:
            raise RecipeError("train.attn_implementation flex_attention: has no backward on a CPU; use auto or forest")
        attention = "auto"
        lines.append("flex_attention has no backward on this CPU: attention is chosen again")
    obstacle = _obstacle(recipe, model, takes_mask)
    if obstacle:
        if data.share_prefixes is True:
            remedy = "set data.share_prefixes: auto or false"
            if resumed:
                remedy = f"resume on the kind of machine it began on, or {remedy} and --allow-changed recipe"
            raise RecipeError(f"data.share_prefixes: {obstacle}; {remedy}")
        lines.append(f"prefixes are not shared: {obstacle}")
        longest = data.max_length + (recipe.tune.peft.get("num_virtual_tokens") or 0)
        (padded,) = broadcast_object_list([takes_padding(model, longest)])  # all processes plan the same packs
        layout = rows_layout(recipe, model.device.type == "cuda", padded)
        if not padded:
            lines.append("each example is a micro-batch of its own: padding after it would change it")
        attention = model.config._attn_implementation if attention == "auto" else attention
    else:
        if attention == "auto":
            attention = choose_attention(model, model.device, _half(recipe))
        on_gpu = model.device.type == "cuda"
        sharing = sharing_of(examples, recipe, attention, on_gpu)
        share = sharing.pays if data.share_prefixes == "auto" else data.share_prefixes
        lines.append(
            f"{sharing.ratio:.2f} flat tokens per executed token if prefixes are shared, which saves "
            f"{1 - 1 / sharing.gain:.0%} of the time: {'on' if share else 'off'}"
        )
        layout, sizing = _sized(
            changed(recipe, train={"attn_implementation": attention}),
            layout_of(recipe, share, attention, on_gpu),
            examples,
            model.device,
        )
        lines += sizing
    decided = {"share_prefixes": layout.share_prefixes, "pack_tokens": layout.pack_tokens}
    return changed(recipe, data=decided, train={"attn_implementation": attention}), layout, lines


def _obstacle(recipe: Recipe, model: PreTrainedModel, takes_mask: bool) -> str | None:
    """Why a pack's mask would not reach the attention; None if it does."""
    if has_virtual_tokens(model):
        return f"tune.method {recipe.tune.method} puts virtual tokens before each example"
    if not takes_mask:
        window = sliding_window(model)
        if window and recipe.data.max_length > window:
            return (
                f"layers of {recipe.model.base} see {window} tokens back, and data.max_length is "
                f"{recipe.data.max_length}; up to {window} prefixes can be shared"
            )
        return f"layers of {recipe.model.base} do not follow a pack's mask and positions"
    return None


def resolve_checkpointing(
    recipe: Recipe, model: PreTrainedModel, plan: StepPlan, device: torch.device
) -> tuple[Recipe, list[str]]:
    """The recipe with train.gradient_checkpointing as the main process counts it, and lines for the user.

    Off if the training fits without it, or if the base or the method can't do it.
    """
    if recipe.train.gradient_checkpointing != "auto":
        return recipe, []
    if not model.supports_gradient_checkpointing or recipe.tune.method == "prefix_tuning":
        what = f"tune.method {recipe.tune.method}" if model.supports_gradient_checkpointing else recipe.model.base
        return changed(recipe, train={"gradient_checkpointing": False}), [
            f"{what} takes no gradient checkpointing: off"
        ]
    fits, why = _fits(recipe, plan, device, False)
    lines = [f"without gradient checkpointing, {why}: {'on' if fits is False else 'off'}"]
    return changed(recipe, train={"gradient_checkpointing": fits is False}), lines


def _fits(recipe: Recipe, plan: StepPlan, device: torch.device, checkpointing: bool) -> tuple[bool | None, str]:
    """Whether the training fits in SHARE of the memory, as the main process counts both, and a clause for the user.
    None if it can't be counted."""
    processes = PartialState().num_processes
    load = load_of(plan, recipe.train.attn_implementation, processes)
    shards = processes if shards_parameters() else 1
    try:
        needed = count_memory(recipe, load_config(recipe.model), load, device, checkpointing, shards).total
    except NotCounted as error:
        return None, str(error)
    needed, limit = broadcast_object_list([needed, SHARE * memory_of(device, processes)])
    return needed <= limit, f"{needed / GIB:.1f} of {limit / GIB:.1f} GiB are needed"


def resolve_compile(
    recipe: Recipe, model: PreTrainedModel, plan: StepPlan, resumed: bool = False
) -> tuple[Recipe, list[str]]:
    """The recipe with train.compile_layers as the main process estimates it, and lines for the user.

    Raises RecipeError if the recipe asks for it and it can't be done.
    """
    train, device, lines = recipe.train, model.device, list[str]()
    asked = train.compile_layers
    obstacle = missing_compiler() if device.type == "cpu" else None
    if not decoder_layers(model):
        obstacle = f"{recipe.model.base} names no decoder layers"
    if asked is True and obstacle:
        if not resumed:
            raise RecipeError(f"train.compile_layers: {obstacle}; or set it to false")
        lines.append(f"layers are not compiled here: {obstacle}")
    elif asked == "auto":
        seconds = training_seconds(model, plan, train.gradient_checkpointing is True, device, model.dtype)
        asked, why = broadcast_object_list([*compile_pays(seconds, device, model.dtype, obstacle)])
        lines.append(why)
    return changed(recipe, train={"compile_layers": asked and not obstacle}), lines


def apply_auto(recipe: Recipe, model: PreTrainedModel, sharded: bool = False) -> list[str]:
    """Make the tuned model compute as the resolved recipe says; lines for the user.

    sharded: FSDP and ZeRO-3 gather parameters in a module's own forward, so none is replaced.
    """
    train = recipe.train
    if model.config._attn_implementation != train.attn_implementation:
        refused = f"train.attn_implementation: {recipe.model.base} does not take {train.attn_implementation}; use auto"
        try:
            model.set_attn_implementation(train.attn_implementation)
        except ValueError as error:
            raise RecipeError(refused) from error
        if model.config._attn_implementation != train.attn_implementation:
            raise RecipeError(refused)
    if model.device.type == "cuda" or train.compile_layers:
        keep_kernels_private()
    lines = []
    if not sharded:
        fuse_lora(model)
        if model.device.type == "cuda" and not (train.compile_layers or recipe.model.use_kernels):
            try:
                fuse_layers(model)
            except Exception as error:  # of Triton, or of the C compiler that it calls
                first = (str(error).splitlines() or [""])[0]
                lines.append(f"norms and activations are not fused, which is slower: {type(error).__name__}: {first}")
    if train.compile_layers:
        compile_layers(model)
    return lines
