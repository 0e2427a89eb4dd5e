"""Fine-tune a base model as a recipe says.

accelerate launch sft/train.py recipes/smollm_squad.yaml --set train.learning_rate=1e-4
torchrun --nproc_per_node 2 sft/train.py RECIPE          two processes
graft train RECIPE                                       the same in one process
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

if not __package__:  # started as a file: put the repository root, not sft/, first
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from sft.errors import RecipeError
from sft.recipe.baseline_schema import BaselineRecipe
from sft.recipe.load import load_any_recipe
from sft.recipe.schema import Recipe
from sft.runs.checkpoint import commit_folder
from sft.session import keeps_pickles, shards_parameters, tune_allocator, use_all_cores, user_errors

RecipePath = Annotated[Path | None, typer.Argument(help="A recipe (YAML).", metavar="RECIPE", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.learning_rate=1e-4")]
Resume = Annotated[Path | None, typer.Option(help="Go on with this run folder from its last checkpoint.")]
AllowChanged = Annotated[
    str | None, typer.Option(help="With --resume: go on although recipe, data or base changed: recipe,data,base")
]
Elastic = Annotated[bool, typer.Option("--elastic", help="With --resume: another number of processes may go on.")]
Retries = Annotated[int, typer.Option(min=0, help="After a crash go on from the last checkpoint, so many times.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and what the run would do.")]


@user_errors
def main(
    recipe: RecipePath = None,
    overrides: Overrides = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    allow_changed: AllowChanged = None,
    elastic: Elastic = False,
    retries: Retries = 0,
) -> None:
    """Train; the run folder holds the adapter and everything that later steps need."""
    path = recipe_to_train(recipe, overrides, resume)
    changed = parse_changed(resume, allow_changed, elastic)
    loaded = load_any_recipe(path, overrides)
    if retries and not dry_run:
        from sft.runs.folder import agree_on_folder
        from sft.training.retries import supervise

        folder = resume or agree_on_folder(loaded, path, probe=True)
        words = [word for text in overrides or [] for word in ("--set", text)]
        allowed = ["--allow-changed", allow_changed] if allow_changed else []
        going_on = ["--resume", str(folder), *allowed, *(["--elastic"] if elastic else [])]
        raise SystemExit(
            supervise([str(path), *words, "--set", f"train.output_dir={folder}"], folder, going_on, retries)
        )
    if isinstance(loaded, BaselineRecipe):
        from sft.baselines.train import print_next, train_baseline

        if dry_run:
            raise RecipeError("--dry-run: estimates the training of an adapter; leave it out for a baseline")
        run = train_baseline(loaded, path, resume, changed)
        if run:
            print_next(loaded, run)
        return
    if dry_run:
        from sft.runs.folder import agree_on_folder
        from sft.training.dry_run import print_plan

        if not resume:
            agree_on_folder(loaded, path, probe=True)
        print_plan(loaded)
        return
    run = train(loaded, path, resume, changed)
    if run:
        print(f"\nrun folder: {run}\nnext: graft eval {run}   |   graft export {run}")


def recipe_to_train(recipe: Path | None, overrides: list[str] | None, resume: Path | None) -> Path:
    """The recipe's file: RECIPE, or that of the run to go on with. Raises RecipeError for any other call."""
    if (recipe is None) == (resume is None):
        raise RecipeError("name a RECIPE, or a run to go on with: --resume RUN")
    if resume and overrides:
        raise RecipeError("--set changes the recipe, and --resume goes on with the run's own; start a new run")
    return recipe or resume / "recipe.yaml"  # type: ignore[operator]


def parse_changed(resume: Path | None, allowed: str | None, elastic: bool) -> tuple[tuple[str, ...], bool]:
    """What --allow-changed and --elastic let a resumed run change. Raises RecipeError for anything else."""
    from sft.runs.resume import parse_allowed

    if not resume and (allowed or elastic):
        raise RecipeError(f"{'--elastic' if elastic else '--allow-changed'} is read with --resume RUN; leave it out")
    return parse_allowed(allowed), elastic


def train(
    recipe: Recipe, recipe_path: Path, resume: Path | None = None, changed: tuple[Sequence[str], bool] = ((), False)
) -> Path | None:
    """Load, train, save. The run folder on the main process, None on others. `changed`: see parse_changed.

    Raises SystemExit with the signal's exit code where one ended the training.
    """
    with ExitStack() as held:  # the lock of the run folder
        return _train(recipe, recipe_path, resume, changed, held)


def _train(
    recipe: Recipe, recipe_path: Path, resume: Path | None, changed: tuple[Sequence[str], bool], held: ExitStack
) -> Path | None:
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from data.atomic import write_json
    from data.encode.pack import make_packs
    from sft.models.capabilities import takes_packs
    from sft.models.load import check_length, load_base, load_tokenizer
    from sft.models.resolve import resolve_base
    from sft.models.tune import count_parameters, tune_model
    from sft.runs.checkpoint import check_space, full_disk_told, last_checkpoint
    from sft.runs.cost import COST, Stopwatch
    from sft.runs.folder import agree_on_folder, finish_run, warnings_of
    from sft.runs.interrupt import locked
    from sft.runs.manifest import manifest
    from sft.runs.metrics import read_metrics
    from sft.runs.monitor import Monitor
    from sft.runs.resume import begin, note_changed_data
    from sft.training.auto import apply_settled, settle, settle_compile, settle_dtype
    from sft.training.examples import load_examples, load_held_out
    from sft.training.trainer import PackTrainer, plan_steps, training_arguments

    state = PartialState(cpu=not torch.cuda.is_available())
    main, sharded = state.is_main_process, shards_parameters()
    use_all_cores()
    if resume:  # before minutes of loading
        held.enter_context(locked(resume, main))
        going_on = last_checkpoint(resume, keeps_pickles())
    else:
        going_on = None
        agree_on_folder(recipe, recipe_path, probe=True)
    checkpoint = going_on[0] if going_on else None
    with state.main_process_first():  # a base that is not in the cache yet is written there once
        resolve_base(recipe.model.base)
    check_length(recipe)
    recipe = settle_dtype(recipe, state.device)
    tokenizer = load_tokenizer(recipe.model)
    with state.main_process_first():  # encoded once, the others read it from the cache folder
        examples, report = load_examples(recipe, tokenizer)
    held_out = load_held_out(recipe, tokenizer)
    model = load_base(recipe.model, state.device)
    (takes_mask,) = broadcast_object_list([takes_packs(model, recipe.data.max_length)])
    model = tune_model(model, recipe.tune, recipe.train.seed, one_dtype=sharded)
    trainable, parameters = count_parameters(model)
    recipe, layout, decided = settle(recipe, model, examples, takes_mask, resume is not None)
    plan = plan_steps(examples, recipe.train, layout, recipe.data.max_branches)
    recipe, more = settle_compile(recipe, model, plan, resume is not None)
    apply_settled(recipe, model, sharded)

    run = resume or agree_on_folder(recipe, recipe_path)
    if not resume:
        held.enter_context(locked(run, main))
    held.enter_context(full_disk_told(run))
    if recipe.train.save_strategy != "no":
        check_space(run, model, recipe.train.optim)
    facts = manifest(recipe, report, trainable, parameters)
    trainer = PackTrainer(
        model,
        tokenizer,
        training_arguments(recipe.train, plan, run, state.device.type == "cuda"),
        plan,
        make_packs(held_out, layout) if recipe.train.eval_strategy != "no" else (),
        one_dtype=sharded,
    )
    if main:
        trainer.made_from, lines = begin(run, recipe, facts, report, going_on, changed, state.num_processes)
        counts = report["totals"]
        print(
            f"{counts['examples']} examples of {counts['contexts']} contexts, {len(plan.steps)} steps; "
            f"{trainable:,} of {parameters:,} parameters trained; "
            f"{recipe.model.dtype}; run folder {run}",
            flush=True,
        )
        for line in (*decided, *more, *warnings_of(report, run), *lines):
            print(line, flush=True)
    monitor = Monitor(run, plan.steps_per_epoch, read_metrics(run)) if main else None
    watch = Stopwatch()
    trainer.run_to_end(run, monitor, checkpoint)
    trainer.check_finite()
    weights = run / ("adapter" if hasattr(model, "peft_config") else "model")
    commit_folder(weights, trainer.save_model, main)
    if monitor:
        write_json(run / COST, watch.cost(weights, trainable, parameters, monitor.last.get("seconds")))
        note_changed_data(run, facts)
        finish_run(run, recipe, facts, report)
    return run if main else None


if __name__ == "__main__":
    tune_allocator()
    typer.run(main)
