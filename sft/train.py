"""Train what a recipe defines: an adapter, a whole model, or a baseline.

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

from data.terminal import print, quoted
from sft.errors import RecipeError
from sft.recipe.load import load_any_recipe
from sft.recipe.schema import Recipe
from sft.session import OneCommand, tune_allocator, user_errors

RecipePath = Annotated[Path | None, typer.Argument(help="A recipe (YAML).", metavar="RECIPE", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.learning_rate=1e-4")]
ResumeFolder = Annotated[Path | None, typer.Option("--resume", help="Resume this run from its last checkpoint.")]
AllowChanged = Annotated[
    str | None, typer.Option(help="With --resume: accept changes of these, comma-separated: recipe, data, base.")
]
Elastic = Annotated[bool, typer.Option("--elastic", help="With --resume: allow another number of processes.")]
Retries = Annotated[int, typer.Option(min=0, help="Resume up to N times after a crash.", metavar="N")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe, time and memory; train nothing.")]


@user_errors
def main(
    recipe: RecipePath = None,
    overrides: Overrides = None,
    resume: ResumeFolder = None,
    dry_run: DryRun = False,
    allow_changed: AllowChanged = None,
    elastic: Elastic = False,
    retries: Retries = 0,
) -> None:
    """Train a recipe; the run folder holds the weights and everything that later steps need."""
    from sft.runs.folder import choose_folder
    from sft.runs.resume import resume_of

    if (recipe is None) == (resume is None):
        raise RecipeError("name a RECIPE, or a run to resume: --resume RUN")
    resumed = resume_of(resume, overrides, allow_changed, elastic)
    path = recipe or resume / "recipe.yaml"  # type: ignore[operator]
    loaded = load_any_recipe(path, overrides)
    if dry_run:
        if not isinstance(loaded, Recipe):
            raise RecipeError("--dry-run estimates the training of an adapter; leave it out for a baseline")
        if not resume:
            choose_folder(loaded, path)
        from sft.training.dry_run import print_plan

        print_plan(loaded)
    elif retries:
        from sft.training.retries import supervise

        folder = resume or choose_folder(loaded, path)
        first = [str(path), *(word for text in overrides or [] for word in ("--set", text))]
        allowed = ["--allow-changed", allow_changed] if allow_changed else []
        again = ["--resume", str(folder), *allowed, *(["--elastic"] if elastic else [])]
        raise SystemExit(supervise([*first, "--set", f"train.output_dir={folder}"], folder, again, retries))
    elif isinstance(loaded, Recipe):
        from sft.training.finetune import finetune

        _print_next(finetune(loaded, path, resumed), "graft eval {run}   |   graft export {run}")
    else:
        from sft.baselines.train import train_baseline

        to_base = "--set model.base={run}/model on a baseline's recipe"
        step = to_base if loaded.objective == "mlm" else "graft eval {run}"
        _print_next(train_baseline(loaded, path, resumed), step)


def _print_next(run: Path | None, step: str) -> None:
    if run:  # the main process
        print(f"\nrun folder: {run}\nnext: {step.format(run=quoted(run))}")


if __name__ == "__main__":
    tune_allocator()
    app = typer.Typer(add_completion=False)
    app.command(cls=OneCommand)(main)
    user_errors(app)()  # refuses a secret before the parser, whose error would show it
