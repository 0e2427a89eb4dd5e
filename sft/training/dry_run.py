"""What a run would do and need, without training: `graft train RECIPE --dry-run`."""

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from data.terminal import Console, print
from sft.models.capabilities import has_virtual_tokens
from sft.models.load import check_length, compute_dtype, default_device, load_config
from sft.models.resolve import readable
from sft.models.tune import count_parameters, tune_model
from sft.recipe.load import dump_recipe
from sft.recipe.schema import Recipe
from sft.session import use_all_cores
from sft.training.attention import choose_attention
from sft.training.auto import resolve_dtype
from sft.training.compile_layers import training_seconds
from sft.training.examples import layout_of, load_examples, rows_layout, sharing_of, training_tokenizer
from sft.training.flops import split_weights
from sft.training.plan import plan_steps


def print_plan(recipe: Recipe) -> None:
    """Print the resolved recipe, then counts and estimates. Raises the errors that training would raise."""
    use_all_cores()
    print(dump_recipe(recipe))
    check_length(recipe)
    device = default_device()
    recipe = resolve_dtype(recipe, device)
    dtype = compute_dtype(recipe.model, device)
    tokenizer = training_tokenizer(recipe)
    examples, report = load_examples(recipe, tokenizer)
    counts = report.totals
    config = load_config(recipe.model)
    with torch.device("meta"):  # shapes without weights
        with readable(f"model.base: {recipe.model.base}"):
            base = AutoModelForCausalLM.from_config(config)
        model = tune_model(base, recipe.tune, recipe.train.seed)
    trainable, parameters = count_parameters(model)
    if has_virtual_tokens(model):  # each example is then a row of its own
        layout = rows_layout(recipe, device.type == "cuda", padded=True)
    else:
        asked, share = recipe.train.attn_implementation, recipe.data.share_prefixes
        attention = choose_attention(model, device) if asked == "auto" else asked
        layout = layout_of(
            recipe, sharing_of(examples, recipe, attention).pays if share == "auto" else share, attention
        )
    plan = plan_steps(examples, recipe.train, layout, recipe.data.max_branches)
    steps = [plan.packs(step) for step in range(len(plan.steps))]
    packs = [pack for step in steps for pack in step]
    executed = sum(len(p.input_ids) for p in packs)
    flat = sum(len(examples[i].ids) for step in plan.steps for i in step)
    longest = max(len(p.input_ids) for p in packs)
    answers = max(len(p.target) for p in packs)
    seconds = training_seconds(model, plan, recipe.train.gradient_checkpointing, device, dtype)
    memory = memory_gib(model, recipe, longest, answers)
    table = Table(show_header=False)
    for name, value in (
        ("examples", f"{counts.examples} of {counts.contexts} contexts ({counts.left_out} rows left out)"),
        ("optimizer steps", f"{len(plan.steps)} of {recipe.train.examples_per_step} examples"),
        ("tokens", f"{executed:,} executed for {flat:,} flat ({flat / executed:.2f} to 1)"),
        ("trained tokens", f"{counts.trained_tokens:,} an epoch"),
        ("trainable parameters", f"{trainable:,} of {parameters:,} ({trainable / parameters:.2%})"),
        ("estimated time", f"{seconds / 60:.1f} min on this machine, in {str(dtype).removeprefix('torch.')}"),
        ("estimated memory", f"{memory:.1f} GiB"),
    ):
        table.add_row(name, value)
    Console().print(table)


def memory_gib(model: PreTrainedModel, recipe: Recipe, tokens: int, answers: int) -> float:
    """Estimated peak memory: frozen weights, trained ones with gradients and AdamW's moments in fp32, activations,
    logits, libraries. tokens, answers: most tokens and trained tokens of a pack."""
    _, _, body = split_weights(model)
    text = model.config.get_text_config()
    size = compute_dtype(recipe.model, default_device()).itemsize
    trained, every = count_parameters(model)
    frozen_body = sum(p.numel() for p in body if not p.requires_grad)
    quantization = recipe.model.quantization
    per_weight: float = size
    on_cpu = default_device().type == "cpu"  # 4-bit weights are dequantized once there
    if quantization and not (on_cpu and quantization.load_in_4bit):
        # NF4 with double quantisation: 4.127 bits a weight (QLoRA, arXiv 2305.14314, section 3)
        per_weight = 1 if quantization.load_in_8bit else 4.127 / 8
    weights = frozen_body * per_weight + (every - trained - frozen_body) * size + 16 * trained
    # stored for the backward of a layer: about 10 of hidden size and 5 of its widest one for each token
    widest = max(length for p in body for length in p.shape)
    layer = text.hidden_size if recipe.train.gradient_checkpointing else 10 * text.hidden_size + 5 * widest
    activations = tokens * text.num_hidden_layers * layer * size
    # float32 logits become their own gradient (step.py); those of a shorter dtype and their gradient come on top
    logits = answers * text.vocab_size * (4 + (2 * size if size < 4 else 0))
    libraries = 0.8 * 2**30
    return (weights + activations + logits + libraries) / 2**30
