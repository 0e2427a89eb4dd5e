"""The run folder: everything that later steps need travels with the run.

recipe.yaml (resolved), manifest.json, data_report.json, adapter/ (or model/) with its card, checkpoint-N/,
metrics.jsonl, loss.png, tensorboard/.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from data.audit.report import write_html
from data.audit.triggers import KIND as TRIGGER
from data.encode.example_store import file_sha256
from data.errors import UserError
from data.readers.source import files_of
from data.redact import scrub_values
from sft.models.resolve import readable, resolve_base, stored_config
from sft.recipe.baseline_schema import BaselineRecipe
from sft.recipe.load import dump_recipe
from sft.recipe.schema import Recipe, RecipeError, Source
from sft.runs.model_card import model_card
from sft.untrusted import brings_code, check_run_folder

S = TypeVar("S", bound=Source)
A = TypeVar("A", Recipe, BaselineRecipe)
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


class RunError(UserError):
    """A folder that is not the run, adapter or export that a command needs."""


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


def environment() -> dict[str, Any]:
    """Versions and hardware, for manifests and bug reports; no paths, no variables."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
    }


def manifest(
    recipe: Recipe | BaselineRecipe, report: dict[str, Any], trainable: int, parameters: int
) -> dict[str, Any]:
    """What the run was made from; of the data, what the report says was read."""
    sources = [*report["sources"], *([report["held_out"]] if report["held_out"] else [])]
    model = recipe.encoder if isinstance(recipe, BaselineRecipe) else recipe.model
    stored = _stored_config(model.base, model.revision) if model else {}
    return {
        "command": " ".join(Path(a).name if i == 0 else a for i, a in enumerate(sys.argv)),
        "commit": _commit(),
        **environment(),
        "base": {
            "name": (model or recipe.model).base,
            "revision": recipe.model.revision,
            **(identity(model.base, model.revision) if model else {"commit": None, "sha256": {}}),
            "auto_map": brings_code(stored),
        },
        "trust_remote_code": False,
        "data_sha256": {path: sha256 for source in sources for path, sha256 in source["sha256"].items()},
        "data_revision": {source["name"]: source["revision"] for source in sources if source["revision"]},
        **({"chat_template_sha256": t["chat_template_sha256"]} if (t := report.get("tokenizer")) else {}),
        "seed": recipe.train.seed,
        "trainable_parameters": trainable,
        "parameters": parameters,
    }


def identity(base: str, revision: str | None) -> dict[str, Any]:
    """What tells bases apart: of a Hub id the commit, of a folder the sha256 of weights, config and tokenizer."""
    folder = Path(resolve_base(base))
    parts = ("*.safetensors", "config.json", "tokenizer.json")
    files = sorted(f for part in parts for f in folder.glob(part)) if folder.is_dir() else []
    commit = _stored_config(base, revision).get("_commit_hash")
    return {"commit": commit, "sha256": {file.name: file_sha256(file) for file in files}}


def _stored_config(base: str, revision: str | None) -> dict[str, Any]:
    with readable(f"model.base: {base}"):
        return stored_config(base, revision)


def write_whole(path: Path, text: str) -> None:
    """Written aside and renamed, so that a file that exists is whole."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """The same, without secrets."""
    write_whole(path, json.dumps(scrub_values(value), indent=2, ensure_ascii=False) + "\n")


def start_run(run: Path, recipe: A, facts: dict[str, Any], report: dict[str, Any]) -> None:
    write_whole(run / "recipe.yaml", dump_recipe(with_absolute_paths(recipe)))
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
    write_whole(weights / "README.md", model_card(recipe, facts, report, read_metrics(run)))
    plot_loss(run)


def rewind_metrics(run: Path, step: int) -> None:
    """Drop the rows after a checkpoint that training goes on from."""
    kept = [row for row in read_metrics(run) if row["step"] <= step]
    write_whole(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # a last line without its end was cut by a crash
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}:{number}: is damaged: {error}; remove this line and those behind it") from error
    return rows


def plot_loss(run: Path) -> None:
    """loss.png: training loss of each step, its running mean, and held-out loss where there is any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(run)
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    if not train:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    window = max(1, len(losses) // 20)
    means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window} steps")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token (nats)", title=run.name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / "loss.png", dpi=130)
    pyplot.close(figure)


def machine() -> str:
    """Where a latency was taken, in words; processes that were given fewer cores say so."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_name()}, cores: {cores}" + (f", {', '.join(gpus)}" if gpus else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Commit of this checkout; None where it is none."""
    root = Path(__file__).parents[2]
    asked = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None
