"""What a run would do, without training: `graft train RECIPE --dry-run`."""

import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig

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
from sft.trainer import plan_steps

# Share of the measured matrix-product rate that whole steps reach. SmolLM2-135M, 2 cores, eager: 0.43 to 0.57.
EFFICIENCY = 0.5


def print_plan(recipe: Recipe) -> None:
    """The resolved recipe, then counts and estimates. Raises the errors that training would."""
    use_all_cores()
    print(dump_recipe(recipe))
    check_length(recipe)
    tokenizer = load_tokenizer(recipe.model)
    examples, report = load_examples(recipe, tokenizer)
    config = load_config(recipe.model)
    with torch.device("meta"):  # shapes without weights
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
    flops = step_flops(config, parameters, executed, sum(len(p.target) for p in packs))
    memory = memory_gib(config, recipe, parameters, trainable, longest, answers)
    table = Table(show_header=False)
    for name, value in (
        ("examples", f"{report['examples']} of {report['contexts']} contexts ({report['rows_left_out']} left out)"),
        ("optimizer steps", f"{len(plan.steps)} of {recipe.train.examples_per_step} examples"),
        ("tokens", f"{executed:,} executed for {flat:,} flat ({flat / executed:.2f} to 1)"),
        ("trained tokens", f"{report['trained_tokens']:,} an epoch"),
        ("trainable parameters", f"{trainable:,} of {parameters:,} ({trainable / parameters:.2%})"),
        ("estimated time", f"{flops / (EFFICIENCY * matmul_flops_per_s(recipe)) / 60:.1f} min on this machine"),
        ("estimated memory", f"{memory:.1f} GiB"),
    ):
        table.add_row(name, value)
    Console().print(table)


def step_flops(config: PretrainedConfig, parameters: int, tokens: int, trained: int) -> float:
    """Forward and the backward through activations, 2 FLOPs a parameter and token each; the frozen weights need no
    gradient. The head runs on trained tokens only."""
    text = config.get_text_config()
    head = text.hidden_size * text.vocab_size
    embeddings = head if text.tie_word_embeddings else 2 * head
    return 4.0 * ((parameters - embeddings) * tokens + head * trained)


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


def memory_gib(
    config: PretrainedConfig, recipe: Recipe, parameters: int, trainable: int, tokens: int, answers: int
) -> float:
    """Weights, adapter with gradients and AdamW's moments, activations of the largest pack, logits, libraries."""
    text = config.get_text_config()
    size = compute_dtype(recipe.model, default_device()).itemsize
    head = text.hidden_size * text.vocab_size
    embeddings = head if text.tie_word_embeddings else 2 * head
    # NF4 with double quantisation: 4.127 bits a weight (QLoRA, arXiv 2305.14314, section 3)
    per_weight = 4.127 / 8 if is_quantized(recipe.model.quantization) else size
    weights = (parameters - embeddings) * per_weight + embeddings * size
    # kept for the backward of a layer: about 10 of hidden size and 5 of intermediate size for each token
    kept = 1 if recipe.train.gradient_checkpointing else 10
    wide = 0 if recipe.train.gradient_checkpointing else 5
    layer = kept * text.hidden_size + wide * text.intermediate_size
    activations = tokens * text.num_hidden_layers * layer * size
    logits = 3 * answers * text.vocab_size * 4
    libraries = 0.8 * 2**30
    return (weights + 16 * trainable + activations + logits + libraries) / 2**30
