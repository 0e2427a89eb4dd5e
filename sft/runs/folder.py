"""The run folder, which holds everything that later steps need.

recipe.yaml (resolved), manifest.json, data_report.json and .html, adapter/ (or model/) with its card, checkpoint-N/,
metrics.jsonl, loss.png, tensorboard/, cost.json.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from data.atomic import is_hidden_name, write_json, write_text
from data.audit.report import DataReport, write_html
from data.audit.triggers import KIND as TRIGGER
from data.readers.source import files_of
from data.terminal import quoted
from sft.errors import RecipeError
from sft.recipe.baseline_schema import AnyRecipe
from sft.recipe.load import dump_recipe
from sft.recipe.schema import Source, changed
from sft.runs.checkpoint import HIDDEN
from sft.runs.interrupt import LOCK
from sft.untrusted import check_run_folder

S = TypeVar("S", bound=Source)


def choose_folder(recipe: AnyRecipe, recipe_path: Path) -> Path:
    """The folder for a new run: train.output_dir, or the first free one of runs/NAME, runs/NAME-2, ...

    Creates nothing. Raises RecipeError if it is not empty or could not be created.
    """
    folder = recipe.train.output_dir
    if folder is None:
        stem = Path("runs") / recipe_path.stem
        check_run_folder(Path(recipe_path.stem), "the recipe's file name")
        names = (stem if n == 1 else stem.with_name(f"{stem.name}-{n}") for n in range(1, 10_000))
        folder = next(name for name in names if not os.path.lexists(name))
    elif folder.is_dir() and not all(p.name == LOCK or is_hidden_name(p, HIDDEN) for p in folder.iterdir()):
        raise RecipeError(
            f"train.output_dir: {folder} is not empty; resume it with `graft train --resume {quoted(folder)}`, "
            "or name another"
        )
    check_writable(folder, "train.output_dir")
    return folder


def make_folder(recipe: AnyRecipe, recipe_path: Path) -> Path:
    """Create the folder of a new run; the same one on every process."""
    (folder,) = broadcast_object_list([str(choose_folder(recipe, recipe_path))])
    PartialState().wait_for_everyone()
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def check_writable(folder: Path, key: str) -> None:
    """Raise RecipeError if a folder of this name could not be created; creates nothing."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RecipeError(f"{key}: can't write to {folder}: {existing} is not a folder this user may write to")


def start_run(run: Path, recipe: AnyRecipe, facts: dict[str, Any], report: DataReport) -> None:
    """Write the resolved recipe, the manifest (`facts`) and the data report."""
    write_text(run / "recipe.yaml", dump_recipe(with_absolute_paths(recipe)))
    write_json(run / "manifest.json", facts)
    report.recipe = run.name
    write_report(report, run)


def write_report(report: DataReport, folder: Path) -> None:
    """Write data_report.json and data_report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "data_report.json", report.to_json())
    write_html(report, folder / "data_report.html")


def warnings_of(report: DataReport, run: Path) -> Iterator[str]:
    """A line for each problem of the data that does not stop the run."""
    see = f"see {run / 'data_report.html'}"
    totals, leaks, duplicates = report.totals, report.leaks, report.duplicates
    if left_out := (totals.left_out or 0) + (totals.defects or 0):
        yield f"{left_out} of {totals.rows_read} rows are left out: {see}"
    if leaked := leaks.rows - leaks.removed:
        yield f"warning: {leaked} training rows are also in the held-out data (data.leaks: remove drops them): {see}"
    if duplicates and duplicates.exact_rows:
        yield f"{duplicates.exact_rows} rows repeat an earlier one (data.duplicates: remove drops them): {see}"
    notes = sum((Counter(source.notes) for source in report.sources), Counter[str]())
    for kind, count in notes.items():
        if kind != TRIGGER:
            yield f"{count} rows: {kind}: {see}"
    if triggers := sum(source.notes.get(TRIGGER, 0) for source in report.sources):
        yield f"warning: {triggers} answers depend on {TRIGGER}: {see}"


def with_absolute_paths(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe with absolute paths, which hold in any folder."""

    def moved(source: S) -> S:
        return changed(source, path=str(Path(source.path).absolute())) if files_of(source) else source

    names = recipe.model.model_dump(include={"base", "embedder", "chat_template"}, exclude_none=True)
    model = {key: type(name)(Path(name).absolute()) for key, name in names.items() if Path(name).exists()}
    evaluation = {"data": moved(recipe.eval.data)} if recipe.eval.data else {}
    return changed(recipe, model=model, data={"train": tuple(map(moved, recipe.data.train))}, eval=evaluation)
