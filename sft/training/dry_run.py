"""What a run would do and need, without training: `graft train RECIPE --dry-run`."""

from rich.table import Table

from data.terminal import Console, print
from sft.models.load import check_length, compute_dtype, default_device, load_config
from sft.models.tune import count_parameters
from sft.recipe.load import dump_recipe
from sft.recipe.schema import Recipe
from sft.session import use_all_cores
from sft.training.auto import expected_plan, resolve_checkpointing, resolve_dequantize, resolve_dtype
from sft.training.compile_layers import training_seconds
from sft.training.examples import load_examples, training_tokenizer
from sft.training.memory import GIB, NotCounted, count_memory, load_of, model_without_weights


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
    recipe, unpacking = resolve_dequantize(recipe, examples, device)
    model = model_without_weights(recipe, config, dtype)
    trainable, parameters = count_parameters(model)
    plan = expected_plan(recipe, model, examples, device)
    recipe, deciding = resolve_checkpointing(recipe, model, plan, device)
    steps = [plan.packs(step) for step in range(len(plan.steps))]
    packs = [pack for step in steps for pack in step]
    executed = sum(len(p.input_ids) for p in packs)
    flat = sum(len(examples[i].ids) for step in plan.steps for i in step)
    checkpointing = recipe.train.gradient_checkpointing is True
    seconds = training_seconds(model, plan, checkpointing, device, dtype)
    load = load_of(plan, recipe.train.attn_implementation)
    try:
        memory = count_memory(recipe, config, load, device, checkpointing)
        needed = [f"{memory.total / GIB:.1f} GiB at {load.tokens:,} tokens in a micro-batch:"]
        needed += [f"{bytes_ / GIB:6.2f}  {part}" for part, bytes_ in memory.parts()]
    except NotCounted as error:
        needed = [str(error)]
    table = Table(show_header=False)
    for name, value in (
        ("examples", f"{counts.examples} of {counts.contexts} contexts ({counts.left_out} rows left out)"),
        ("optimizer steps", f"{len(plan.steps)} of {recipe.train.examples_per_step} examples"),
        ("tokens", f"{executed:,} executed for {flat:,} flat ({flat / executed:.2f} to 1)"),
        ("trained tokens", f"{counts.trained_tokens:,} an epoch"),
        ("trainable parameters", f"{trainable:,} of {parameters:,} ({trainable / parameters:.2%})"),
        ("estimated time", f"{seconds / 60:.1f} min on this machine, in {str(dtype).removeprefix('torch.')}"),
        ("estimated memory", "\n".join(needed)),
        *(("decided", line) for line in (*unpacking, *deciding)),
    ):
        table.add_row(name, value)
    Console().print(table)
