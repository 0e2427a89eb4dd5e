"""Train a baseline as its recipe says: an encoder with a task head, continued pre-training, or a floor without weights.

accelerate launch sft/baselines/train.py recipes/minilm_newsgroups.yaml --set tune.method=linear_probe
graft train recipes/minilm_newsgroups.yaml                       the same in one process
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

if not __package__:  # started as a file: put the repository root, not sft/, first
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from sft.errors import RecipeError
from sft.recipe.baseline_schema import BaselineRecipe
from sft.recipe.load import load_any_recipe
from sft.runs.checkpoint import commit_folder
from sft.session import keeps_pickles, tune_allocator, use_all_cores, user_errors
from sft.train import AllowChanged, Overrides, RecipePath, Resume, parse_changed, recipe_to_train


@user_errors
def main(
    recipe: RecipePath = None,
    overrides: Overrides = None,
    resume: Resume = None,
    allow_changed: AllowChanged = None,
) -> None:
    """Train a baseline; the run folder holds its weights and everything that scoring needs."""
    path = recipe_to_train(recipe, overrides, resume)
    changed = parse_changed(resume, allow_changed, elastic=False)
    loaded = load_any_recipe(path, overrides)
    if not isinstance(loaded, BaselineRecipe):
        raise RecipeError(f"{path}: names no objective, so it is the recipe of an adapter; train it with sft/train.py")
    run = train_baseline(loaded, path, resume, changed)
    if run:
        print_next(loaded, run)


def print_next(recipe: BaselineRecipe, run: Path) -> None:
    use = f"--set model.base={run}/model on a baseline's recipe" if recipe.objective == "mlm" else f"graft eval {run}"
    print(f"\nrun folder: {run}\nnext: {use}")


def train_baseline(
    recipe: BaselineRecipe,
    recipe_path: Path,
    resume: Path | None = None,
    changed: tuple[Sequence[str], bool] = ((), False),
) -> Path | None:
    """Load, train, save. The run folder on the main process, None on others. Raises SystemExit with the signal's exit
    code where one ended the training."""
    with ExitStack() as held:  # the lock of the run folder
        return _train(recipe, recipe_path, resume, changed, held)


def _train(
    recipe: BaselineRecipe, recipe_path: Path, resume: Path | None, changed: tuple[Sequence[str], bool], held: ExitStack
) -> Path | None:
    import torch
    from accelerate import PartialState

    from data.atomic import write_json
    from sft.baselines.data import read_split
    from sft.baselines.encoder import tune_encoder
    from sft.baselines.floors import beside_embedding, fit_floor
    from sft.baselines.heads import CHOSEN, head_of
    from sft.baselines.mlm import keep_pooler
    from sft.baselines.trainer import EncoderTrainer, arguments_of, check_processes, settle_bf16
    from sft.models.tune import count_parameters
    from sft.runs.checkpoint import check_space, full_disk_told, last_checkpoint
    from sft.runs.cost import COST, Stopwatch
    from sft.runs.folder import agree_on_folder, start_run
    from sft.runs.interrupt import locked
    from sft.runs.manifest import manifest
    from sft.runs.metrics import plot_loss, read_metrics
    from sft.runs.monitor import Monitor
    from sft.runs.resume import begin, note_changed_data

    state = PartialState(cpu=not torch.cuda.is_available())
    main = state.is_main_process
    use_all_cores()
    if changed[1]:
        raise RecipeError("--elastic: the rows of a baseline's step depend on the processes; start as many as before")
    check_processes(recipe, state.num_processes)
    if not resume:
        agree_on_folder(recipe, recipe_path, probe=True)
    split = read_split(recipe)
    watch = Stopwatch()
    if recipe.is_floor:
        if resume:
            raise RecipeError(f"{resume}: a floor has no checkpoint to go on from; start a new run")
        features, frozen = beside_embedding(recipe)  # before a folder is made that it can't be used for
        run = agree_on_folder(recipe, recipe_path)
        if not main:
            return None
        start_run(run, recipe, manifest(recipe, split.report, 0, frozen), split.report)
        for line in split.notes:
            print(line, flush=True)
        fitted = fit_floor(recipe, [*split.train, *split.dev], run / "model", features)  # it has nothing to choose
        write_json(run / COST, watch.cost(run / "model", fitted, fitted + frozen))
        return run

    if resume:
        held.enter_context(locked(resume, main))
    going_on = last_checkpoint(resume, keeps_pickles()) if resume else None
    recipe = settle_bf16(recipe, state.device)
    with state.main_process_first():
        head = head_of(recipe, split)
    model = tune_encoder(head.load(), recipe.tune, recipe.objective, recipe.train.seed)
    trainable, parameters = count_parameters(model)
    run = resume or agree_on_folder(recipe, recipe_path)
    if not resume:
        held.enter_context(locked(run, main))
    held.enter_context(full_disk_told(run))
    facts = manifest(recipe, split.report, trainable, parameters)
    arguments = arguments_of(recipe, run, len(head.rows), state.num_processes, state.device.type == "cuda")
    check_space(run, model, arguments.optim)
    trainer = EncoderTrainer(model, arguments, recipe, head)
    if main:
        trainer.made_from, lines = begin(run, recipe, facts, split.report, going_on, changed, state.num_processes)
        print(
            f"{len(split.train)} rows to train on, {len(split.dev)} to choose by, {arguments.max_steps} steps; "
            f"{trainable:,} of {parameters:,} parameters trained; run folder {run}",
            *split.notes,
            *head.notes,
            *lines,
            sep="\n",
            flush=True,
        )
    per_epoch = -(-len(head.rows) // recipe.train.examples_per_step)
    monitor = Monitor(run, per_epoch, read_metrics(run)) if main else None
    watch = Stopwatch()
    trainer.run_to_end(run, monitor, going_on[0] if going_on else None)
    trainer.check_finite()
    weights = run / ("adapter" if hasattr(model, "peft_config") else "model")

    def save(folder: str) -> None:
        trainer.save_model(folder)
        if recipe.objective == "mlm" and main:
            keep_pooler(recipe.model, Path(folder))

    commit_folder(weights, save, main)
    if not monitor:
        return None
    head.tokenizer.save_pretrained(weights)
    write_json(run / CHOSEN, trainer.chosen())
    write_json(run / COST, watch.cost(weights, trainable, parameters, monitor.last.get("seconds")))
    note_changed_data(run, facts)
    plot_loss(run)
    return run


if __name__ == "__main__":
    tune_allocator()
    typer.run(main)
