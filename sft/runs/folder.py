"""The run folder: everything that later steps need travels with the run.

recipe.yaml (resolved), manifest.json, data_report.json, adapter/ (or model/) with its card, checkpoint-N/,
metrics.jsonl, loss.png, tensorboard/.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from data.atomic import write_json, write_text
from data.audit.report import write_html
from data.audit.triggers import KIND as TRIGGER
from data.readers.source import files_of
from sft.errors import RecipeError
from sft.recipe.baseline_schema import BaselineRecipe
from sft.recipe.load import dump_recipe
from sft.recipe.schema import Recipe, Source
from sft.runs.metrics import plot_loss, read_metrics
from sft.runs.model_card import model_card
from sft.untrusted import check_run_folder

S = TypeVar("S", bound=Source)
A = TypeVar("A", Recipe, BaselineRecipe)


def agree_on_folder(recipe: Recipe | BaselineRecipe, recipe_path: Path, probe: bool = False) -> Path:
    """The run folder, made by the main process and told to the others: train.output_dir, or the first free one of
    runs/NAME, runs/NAME-2, ... `probe` makes nothing and only raises RecipeError where it could not be made."""
    wanted = recipe.train.output_dir
    if wanted is None:
        stem = Path("runs") / recipe_path.stem
        check_run_folder(Path(recipe_path.stem), "the recipe's file name")
        names = (stem if n == 1 else stem.with_name(f"{stem.name}-{n}") for n in range(1, 10_000))
        wanted = next(name for name in names if not name.exists())
    elif wanted.is_dir() and any(not p.name.startswith(".") for p in wanted.iterdir()):  # the lock may be there
        raise RecipeError(
            f"train.output_dir: {wanted} is not empty; go on with `graft train --resume {wanted}` or name another"
        )
    check_writable(wanted, "train.output_dir")
    if probe:
        return wanted
    agreed = broadcast_object_list([str(wanted)])[0]
    PartialState().wait_for_everyone()
    Path(agreed).mkdir(parents=True, exist_ok=True)
    return Path(agreed)


def check_writable(folder: Path, key: str) -> None:
    """Raise RecipeError where a folder of this name could not be made; makes nothing."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RecipeError(f"{key}: can't write to {folder}: {existing} is not a folder this user may write to")


def start_run(run: Path, recipe: A, facts: dict[str, Any], report: dict[str, Any]) -> None:
    write_text(run / "recipe.yaml", dump_recipe(with_absolute_paths(recipe)))
    write_json(run / "manifest.json", facts)
    write_report(report | {"recipe": run.name}, run)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """data_report.json, and the same as a page: data_report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "data_report.json", report)
    write_html(report, folder / "data_report.html")


def warnings_of(report: dict[str, Any], run: Path) -> Iterator[str]:
    """What was found in the data and is trained on all the same, a line each."""
    where = f"see {run / 'data_report.html'}"
    counts = report["totals"]
    if left_out := counts["left_out"] + counts["defects"]:
        yield f"{left_out} of {counts['rows_read']} rows are left out: {where}"
    leaks, duplicates = report["leaks"], report["duplicates"]
    if leaked := leaks["rows"] - leaks["removed"]:
        remedy = "data.leaks: remove leaves them out"
        yield f"warning: {leaked} training rows stand in the held-out data ({remedy}): {where}"
    if repeated := duplicates["exact_rows"]:
        yield f"{repeated} rows repeat an earlier one (data.duplicates: remove leaves them out): {where}"
    if triggers := sum(source["notes"].get(TRIGGER, 0) for source in report["sources"]):
        yield f"warning: {triggers} answers hang on {TRIGGER}: {where}"


def with_absolute_paths(recipe: A) -> A:
    """The recipe as it can be read from any folder."""

    def absolute(name: str) -> str:
        return str(Path(name).absolute()) if Path(name).exists() else name

    def moved(source: S) -> S:
        path = source.path if not files_of(source) else str(Path(source.path).absolute())
        return source.model_copy(update={"path": path})

    model: dict[str, Any] = {"base": absolute(recipe.model.base)}
    if isinstance(recipe, BaselineRecipe) and recipe.model.embedder:
        model["embedder"] = absolute(recipe.model.embedder)
    if isinstance(recipe, Recipe) and recipe.model.chat_template:
        model["chat_template"] = recipe.model.chat_template.absolute()
    evaluation = {"data": moved(recipe.eval.data)} if recipe.eval.data else {}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "data": recipe.data.model_copy(update={"train": tuple(moved(s) for s in recipe.data.train)}),
            "eval": recipe.eval.model_copy(update=evaluation),
        }
    )


def finish_run(run: Path, recipe: Recipe, facts: dict[str, Any], report: dict[str, Any]) -> None:
    """Model card beside the weights, and the loss plot."""
    weights = run / "adapter" if (run / "adapter").is_dir() else run / "model"
    config = weights / "adapter_config.json"
    if config.is_file():  # PEFT wrote the cache folder's path
        write_json(config, json.loads(config.read_text()) | {"base_model_name_or_path": recipe.model.base})
    write_text(weights / "README.md", model_card(recipe, facts, report, read_metrics(run)))
    plot_loss(run)
