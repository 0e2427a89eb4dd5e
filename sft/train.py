"""Fine-tune a base model as a recipe says.

accelerate launch sft/train.py recipes/smollm_squad.yaml --set train.learning_rate=1e-4
torchrun --nproc_per_node 2 sft/train.py RECIPE          two processes
graft train RECIPE                                       the same in one process
"""

import sys
from pathlib import Path
from typing import Annotated

if not __package__:  # started as a file: put the repository root, not sft/, first
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from sft.baseline_recipe import BaselineRecipe
from sft.recipe import Recipe, RecipeError
from sft.recipe_file import load_any_recipe
from sft.session import shards_parameters, tune_allocator, use_all_cores, user_errors

RecipePath = Annotated[Path | None, typer.Argument(help="A recipe (YAML).", metavar="RECIPE", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.learning_rate=1e-4")]
Resume = Annotated[Path | None, typer.Option(help="Go on with this run folder from its last checkpoint.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and what the run would do.")]


@user_errors
def main(
    recipe: RecipePath = None, overrides: Overrides = None, resume: Resume = None, dry_run: DryRun = False
) -> None:
    """Train; the run folder holds the adapter and everything that later steps need."""
    path = recipe_to_train(recipe, overrides, resume)
    loaded = load_any_recipe(path, overrides)
    if isinstance(loaded, BaselineRecipe):
        from sft.bert import print_next, train_baseline

        if dry_run:
            raise RecipeError("--dry-run: estimates the training of an adapter; leave it out for a baseline")
        run = train_baseline(loaded, path, resume)
        if run:
            print_next(loaded, run)
        return
    if dry_run:
        from sft.dry_run import print_plan
        from sft.run import agree_on_folder

        if not resume:
            agree_on_folder(loaded, path, probe=True)
        print_plan(loaded)
        return
    run = train(loaded, path, resume)
    if run:
        print(f"\nrun folder: {run}\nnext: graft eval {run}   |   graft export {run}")


def recipe_to_train(recipe: Path | None, overrides: list[str] | None, resume: Path | None) -> Path:
    """The recipe's file: RECIPE, or that of the run to go on with. Raises RecipeError for any other call."""
    if (recipe is None) == (resume is None):
        raise RecipeError("name a RECIPE, or a run to go on with: --resume RUN")
    if resume and overrides:
        raise RecipeError("--set changes the recipe, and --resume goes on with the run's own; start a new run")
    return recipe or resume / "recipe.yaml"  # type: ignore[operator]


def train(recipe: Recipe, recipe_path: Path, resume: Path | None = None) -> Path | None:
    """Load, train, save. The run folder on the main process, None on others. Raises SystemExit(130) on Ctrl-C."""
    import torch
    from accelerate import PartialState

    from data.pack import make_packs
    from sft.base import resolve_base
    from sft.checkpoint import SaveOnInterrupt, last_checkpoint
    from sft.cost import COST, Stopwatch
    from sft.examples import load_examples, load_held_out
    from sft.model import check_length, count_parameters, load_base, load_tokenizer, takes_packs, tune_model
    from sft.monitor import Monitor
    from sft.run import (
        agree_on_folder,
        check_unchanged,
        finish_run,
        manifest,
        read_metrics,
        rewind_metrics,
        start_run,
        warnings_of,
        write_json,
    )
    from sft.settle import apply_settled, settle, settle_compile, settle_dtype
    from sft.trainer import PackTrainer, plan_steps, training_arguments

    state = PartialState(cpu=not torch.cuda.is_available())
    use_all_cores()
    checkpoint = last_checkpoint(resume) if resume else None
    if not resume:  # before minutes of loading
        agree_on_folder(recipe, recipe_path, probe=True)
    with state.main_process_first():  # a base that is not in the cache yet is written there once
        resolve_base(recipe.model.base)
    check_length(recipe)
    recipe = settle_dtype(recipe, state.device)
    tokenizer = load_tokenizer(recipe.model)
    with state.main_process_first():  # encoded once, the others read it from the cache folder
        examples, report = load_examples(recipe, tokenizer)
    held_out = load_held_out(recipe, tokenizer)
    model = load_base(recipe.model, state.device)
    takes_mask = takes_packs(model)
    sharded = shards_parameters()
    model = tune_model(model, recipe.tune, recipe.train.seed, one_dtype=sharded)
    trainable, parameters = count_parameters(model)
    resumed = resume is not None
    recipe, layout, decided = settle(recipe, model, examples, takes_mask, resumed)
    plan = plan_steps(examples, recipe.train, layout, recipe.data.max_branches)
    recipe, more = settle_compile(recipe, model, plan, resumed)
    apply_settled(recipe, model, sharded)

    run = resume or agree_on_folder(recipe, recipe_path)
    interrupt = SaveOnInterrupt()
    facts = manifest(recipe, report, trainable, parameters)
    if state.is_main_process:
        if checkpoint:
            check_unchanged(run, facts)
            rewind_metrics(run, int(checkpoint.name.split("-")[1]))
        else:
            start_run(run, recipe, facts, report)
        counts = report["totals"]
        print(
            f"{counts['examples']} examples of {counts['contexts']} contexts, {len(plan.steps)} steps; "
            f"{trainable:,} of {parameters:,} parameters trained; "
            f"{recipe.model.dtype}; run folder {run}",
            flush=True,
        )
        for line in (*decided, *more, *warnings_of(report, run)):
            print(line, flush=True)
    last = next((row for row in reversed(read_metrics(run)) if "loss" in row), None) if checkpoint else None
    trainer = PackTrainer(
        model,
        tokenizer,
        training_arguments(recipe.train, plan, run, state.device.type == "cuda"),
        plan,
        make_packs(held_out, layout) if recipe.train.eval_strategy != "no" else (),
        [interrupt, *([Monitor(run, plan.steps_per_epoch, last)] if state.is_main_process else [])],
        one_dtype=sharded,
    )
    if last:
        trainer.executed_tokens, trainer.trained_examples = last["executed_tokens"], last["examples"]
    watch = Stopwatch()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.stopped:
        if state.is_main_process:
            print(f"stopped and saved; go on with: graft train --resume {run}")
        raise SystemExit(130)
    trainer.check_finite()
    weights = run / ("adapter" if hasattr(model, "peft_config") else "model")
    trainer.save_model(str(weights))
    if state.is_main_process:
        write_json(run / COST, watch.cost(weights, trainable, parameters, last["seconds"] if last else None))
        finish_run(run, recipe, facts, report)
    return run if state.is_main_process else None


if __name__ == "__main__":
    tune_allocator()
    typer.run(main)
