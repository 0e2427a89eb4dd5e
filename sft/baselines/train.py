"""Train a baseline: an encoder with a head, continued pre-training, or a floor without a trained encoder."""

from pathlib import Path

from data.atomic import write_json
from sft.baselines.data import Split, read_split
from sft.baselines.encoder import check_positions, tune_encoder
from sft.baselines.floors import beside_embedding, fit_floor
from sft.baselines.heads import CHOSEN, Classifier, SpanReader
from sft.baselines.mlm import MaskedLM, keep_pooler
from sft.baselines.trainer import EncoderTrainer, arguments_of, check_processes, resolve_bf16
from sft.errors import RecipeError
from sft.models.tune import count_parameters
from sft.recipe.baseline_schema import BaselineRecipe
from sft.runs.checkpoint import check_space
from sft.runs.cost import Stopwatch
from sft.runs.resume import Resume
from sft.training.open_run import OpenRun, open_run

HEAD_CLASSES: dict[str, type[Classifier | SpanReader | MaskedLM]] = {
    "classification": Classifier, "extractive_qa": SpanReader, "mlm": MaskedLM,
}  # fmt: skip


def train_baseline(recipe: BaselineRecipe, recipe_path: Path, resume: Resume | None = None) -> Path | None:
    """Train as the recipe says and return the run folder, or None on other processes than the main one.

    Raises SystemExit with the exit code of the signal if one ended the training.
    """
    if resume and resume.elastic:
        raise RecipeError("--elastic: the rows of a baseline's step depend on the processes; start as many as before")
    if resume and recipe.is_floor:
        raise RecipeError(f"{resume.folder}: a floor has no checkpoint to resume from; start a new run")
    with open_run(recipe, recipe_path, resume) as run:
        check_processes(recipe, run.state.num_processes)
        split = read_split(recipe)
        return _fit_floor(recipe, split, run) if recipe.is_floor else _train_encoder(recipe, split, run)


def _fit_floor(recipe: BaselineRecipe, split: Split, run: OpenRun) -> Path | None:
    run.watch = Stopwatch()
    features, frozen = beside_embedding(recipe)  # an error must leave no run folder
    folder = run.claim(recipe, split.report, (0, frozen))
    if not run.main:
        return None
    run.begin()
    print(*split.notes, sep="\n", flush=True)
    fitted = fit_floor(recipe, [*split.train, *split.dev], folder / "model", features)  # a floor chooses nothing
    run.parameters = (fitted, fitted + frozen)
    return run.finish(folder / "model")


def _train_encoder(recipe: BaselineRecipe, split: Split, run: OpenRun) -> Path | None:
    recipe = resolve_bf16(recipe, run.device)
    with run.state.main_process_first():
        check_positions(recipe.model, recipe.data.max_seq_length, recipe.tune.peft.get("num_virtual_tokens") or 0)
        head = HEAD_CLASSES[recipe.objective](recipe, split)
    model = tune_encoder(head.load(), recipe.tune, recipe.objective, recipe.train.seed)
    trainable, parameters = count_parameters(model)
    folder = run.claim(recipe, split.report, (trainable, parameters))
    arguments = arguments_of(recipe, folder, len(head.rows), run.state.num_processes, run.device.type == "cuda")
    check_space(folder, model, arguments.optim)
    trainer = EncoderTrainer(model, arguments, recipe, head)
    summary = (
        f"{len(split.train)} rows to train on, {len(split.dev)} to choose the best checkpoint on, "
        f"{arguments.max_steps} steps; {trainable:,} of {parameters:,} parameters trained; run folder {folder}"
    )
    per_epoch = -(-len(head.rows) // recipe.train.examples_per_step)
    with run.record(trainer, per_epoch, (summary, *split.notes, *head.notes)) as checkpoint:
        trainer.train(resume_from_checkpoint=checkpoint)

    def save(weights: str) -> None:
        trainer.save_model(weights)
        if recipe.objective == "mlm" and run.main:
            keep_pooler(recipe.model, Path(weights))

    weights = run.save_weights(trainer, save)
    if run.main:
        head.tokenizer.save_pretrained(weights)
        write_json(folder / CHOSEN, trainer.chosen())
    return run.finish(weights)
