"""What a run would do, without training: `graft train RECIPE --dry-run`."""

import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sft.base import readable
from sft.examples import load_examples
from sft.model import (
    check_length,
    compute_dtype,
    count_parameters,
    default_device,
    is_quantized,
    load_config,
    load_tokenizer,
    tune_model,
)
from sft.recipe import Recipe
from sft.recipe_file import dump_recipe
from sft.session import use_all_cores
from sft.trainer import plan_steps, virtual_tokens

# Share of the measured matrix-product rate that whole steps reach. SmolLM2-135M, 2 cores, eager: 0.43 to 0.57.
EFFICIENCY = 0.5


def print_plan(recipe: Recipe) -> None:
    """The resolved recipe, then counts and estimates. Raises the errors that training would."""
    use_all_cores()
    print(dump_recipe(recipe))
    check_length(recipe)
    tokenizer = load_tokenizer(recipe.model)
    examples, report = load_examples(recipe, tokenizer)
    counts = report["totals"]
    config = load_config(recipe.model)
    with torch.device("meta"):  # shapes without weights
        with readable(f"model.base: {recipe.model.base}"):
            base = AutoModelForCausalLM.from_config(config)
        model = tune_model(base, recipe.tune, recipe.train.seed)
    trainable, parameters = count_parameters(model)
    plan = plan_steps(examples, recipe.train, recipe.data.share_prefixes, recipe.data.pack_tokens)
    steps = [plan.packs(step) for step in range(len(plan.steps))]
    packs = [pack for step in steps for pack in step]
    executed = sum(len(p.input_ids) for p in packs)
    flat = sum(len(examples[i].ids) for step in plan.steps for i in step)
    longest = max(len(p.input_ids) for p in packs)
    answers = max(len(p.target) for p in packs)
    flops = training_flops(model, executed, sum(len(p.target) for p in packs), recipe.train.gradient_checkpointing)
    memory = memory_gib(model, recipe, longest, answers)
    table = Table(show_header=False)
    for name, value in (
        ("examples", f"{counts['examples']} of {counts['contexts']} contexts ({counts['left_out']} rows left out)"),
        ("optimizer steps", f"{len(plan.steps)} of {recipe.train.examples_per_step} examples"),
        ("tokens", f"{executed:,} executed for {flat:,} flat ({flat / executed:.2f} to 1)"),
        ("trained tokens", f"{counts['trained_tokens']:,} an epoch"),
        ("trainable parameters", f"{trainable:,} of {parameters:,} ({trainable / parameters:.2%})"),
        ("estimated time", f"{flops / (EFFICIENCY * matmul_flops_per_s(recipe)) / 60:.1f} min on this machine"),
        ("estimated memory", f"{memory:.1f} GiB"),
    ):
        table.add_row(name, value)
    Console().print(table)


def training_flops(model: PreTrainedModel, tokens: int, trained_tokens: int, checkpointing: bool) -> float:
    """2 FLOPs a weight and token for each product it takes part in: the forward, the gradient of its input where
    something before it is trained (with checkpointing a second forward as well), and its own where it is trained.

    The head runs on trained tokens only; looking up an embedding is free.
    """
    embedding, head, body = split_weights(model)
    # parameters are registered in the order of the forward pass; virtual tokens come last and are used first
    reached = virtual_tokens(model) is not None or any(p.requires_grad for p in embedding)
    flops = 0.0
    for p in body:
        flops += 2 * p.numel() * tokens * (1 + reached * (1 + checkpointing) + p.requires_grad)
        reached = reached or p.requires_grad
    return flops + sum(2 * p.numel() * trained_tokens * (1 + reached + p.requires_grad) for p in head)


def split_weights(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the input embedding, of the head (the same where the two are tied), and all others."""
    embedding = list(model.get_input_embeddings().parameters())
    head = list(model.get_output_embeddings().parameters())
    ends = {id(p) for p in (*embedding, *head)}
    return embedding, head, [p for p in model.parameters() if id(p) not in ends]


def matmul_flops_per_s(recipe: Recipe, seconds: float = 0.3) -> float:
    """Measured on this device in the recipe's compute dtype."""
    device = default_device()
    a = torch.randn(2048, 2048, device=device, dtype=compute_dtype(recipe.model, device))
    float((a @ a)[0, 0])
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        float((a @ a)[0, 0])  # reading an element waits for the device
        count += 1
    return 2 * 2048**3 * count / (time.monotonic() - start)


def memory_gib(model: PreTrainedModel, recipe: Recipe, tokens: int, answers: int) -> float:
    """Frozen weights, trained ones with gradients and AdamW's moments in fp32, activations of the largest pack,
    logits, libraries."""
    _, _, body = split_weights(model)
    text = model.config.get_text_config()
    size = compute_dtype(recipe.model, default_device()).itemsize
    trained, every = count_parameters(model)
    frozen_body = sum(p.numel() for p in body if not p.requires_grad)
    quantization = recipe.model.quantization
    per_weight: float = size
    if quantization and is_quantized(quantization):
        # NF4 with double quantisation: 4.127 bits a weight (QLoRA, arXiv 2305.14314, section 3)
        per_weight = 1 if quantization.load_in_8bit else 4.127 / 8
    weights = frozen_body * per_weight + (every - trained - frozen_body) * size + 16 * trained
    # kept for the backward of a layer: about 10 of hidden size and 5 of its widest one for each token
    widest = max(length for p in body for length in p.shape)
    layer = text.hidden_size if recipe.train.gradient_checkpointing else 10 * text.hidden_size + 5 * widest
    activations = tokens * text.num_hidden_layers * layer * size
    logits = 3 * answers * text.vocab_size * 4
    libraries = 0.8 * 2**30
    return (weights + activations + logits + libraries) / 2**30
