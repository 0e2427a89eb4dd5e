"""Score a run, an export, a base or a server: `graft eval TARGET --task squad_v2 --data FILE`."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from data.cache import file_digests
from data.conversation import Conversation, DataError
from data.readers.source import files_of, read_all
from data.terminal import Console, print
from eval.answer_log import NAME
from eval.few_shot import with_shots
from eval.metrics import METRICS, TITLES, normalize_label
from eval.results import limit_questions, score, summarize, write_results
from eval.tasks import TASKS, with_calls
from sft.baselines.data import baseline_questions
from sft.errors import RecipeError
from sft.models.target import check_target, is_run, is_url, run_any_recipe
from sft.recipe.baseline_schema import TASKS_OF, AnyRecipe, BaselineRecipe
from sft.recipe.load import nearest
from sft.recipe.schema import Eval, Recipe, Source, changed
from sft.runs.cost import latency_ms, peak_memory_gib, system_of
from sft.runs.folder import check_writable
from sft.runs.manifest import machine
from sft.scoring.answerers import AnswerOptions, baseline_answerer, model_answerer, training_questions
from sft.session import use_all_cores
from sft.training.examples import held_out_conversations, other_questions

SIDE_BY_SIDE = 3  # scores in one table


def evaluate(
    target: str,
    out: Path,
    task: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    base: bool = False,
    split: str | None = None,
    run: Path | None = None,
    options: AnswerOptions | None = None,
    metrics: str | None = None,
) -> dict[str, Any]:
    """Score a system and write the results to `out`. Missing arguments come from the recipe of the target, or else of
    `run`, so that a server gets the same questions as the run. `base`: score a run's base instead.

    Raises RecipeError if task or data are neither arguments nor in a recipe.
    """
    check_target(target)
    options = options or AnswerOptions()
    target_is_run = not is_url(target) and is_run(target)
    source_run = Path(target) if target_is_run else run
    recipe = run_any_recipe(source_run) if source_run else None
    if base and not target_is_run:
        raise RecipeError(f"--base: {target} is no run folder, so it has no base to score; leave --base out")
    task = task or (recipe.task if recipe else None)
    if task not in TASKS:
        near = nearest(task, list(TASKS)) if task else ""
        raise RecipeError(f"--task {task or ''}: name one of {', '.join(TASKS)}{near}")
    check_writable(out, "--out")
    if isinstance(recipe, BaselineRecipe) and target_is_run and task not in TASKS_OF[recipe.objective]:
        fitting = " or ".join(TASKS_OF[recipe.objective])
        raise RecipeError(f"--task {task}: {target} was trained for {fitting}; leave --task out")
    settings = _with_metrics(recipe.eval if isinstance(recipe, Recipe) else Eval(), metrics, task)
    conversations, source = questions_to_score(target, recipe, task, data, split, limit, settings.metrics)

    use_all_cores()
    if target_is_run and isinstance(recipe, BaselineRecipe):
        answer = baseline_answerer(Path(target), recipe, base, options)
    else:
        options = replace(options, max_new_tokens=options.max_new_tokens or settings.max_new_tokens)
        known = training_questions(recipe, conversations) if options.shots or options.threshold_from else []
        if options.shots:
            conversations = with_shots(conversations, known, options.shots, recipe.train.seed if recipe else 0)
        answer = model_answerer(target, task, base, settings, options, known, out / NAME, source_run)
    trained_files = trained_on(source_run, data, split) if source_run and data and not base else []
    resumed = (out / NAME).exists()  # then a part of the answers is not in the time below
    start = time.monotonic()
    predictions = answer(conversations)
    seconds = time.monotonic() - start
    scored = score(task, conversations, predictions, settings.metrics, settings.pattern)
    results = {
        "target": target + (" (base)" if base else ""),
        "name": _name(target, base, options),
        "data": source,
        **summarize(task, scored),
        "trained_on": trained_files,
        "pattern": settings.pattern,
        "scorer": "labels" if options.labels else "",
        "shots": options.shots,
        "threshold_from": options.threshold_from,
        "max_new_tokens": options.max_new_tokens,
        "seconds": round(seconds, 1),
    }
    if not resumed:
        results["questions_per_s"] = round(len(predictions) / seconds, 2)
    if not is_url(target):
        results["machine"] = machine()
        results["latency_ms"] = latency_ms(answer, conversations)
        results["peak_memory_gib"] = round(peak_memory_gib(), 2)
    if target_is_run and recipe:
        results["system"] = system_of(Path(target), recipe, base)
    write_results(out, results, scored)
    (out / NAME).unlink(missing_ok=True)
    return results


def _with_metrics(settings: Eval, names: str | None, task: str) -> Eval:
    """The settings with the metrics of --metrics, names with commas between them, instead of the recipe's."""
    if names is None:
        return settings
    if task != "instruct":
        raise RecipeError(f"--metrics: is for task instruct; task {task} has scores of its own, leave it out")
    metrics = names.split(",")
    if unknown := [name for name in metrics if name not in METRICS]:
        raise RecipeError(f"--metrics {unknown[0]}: none of {', '.join(METRICS)}{nearest(unknown[0], list(METRICS))}")
    if "regex" in metrics and settings.pattern is None:
        raise RecipeError("--metrics regex: the recipe has no eval.pattern to look for; set it, or leave regex out")
    return changed(settings, metrics=tuple(metrics), pattern=settings.pattern if "regex" in metrics else None)


def questions_to_score(
    target: str,
    recipe: AnyRecipe | None,
    task: str,
    data: str | None,
    split: str | None,
    limit: int | None,
    metrics: Sequence[str] = (),
) -> tuple[list[Conversation], str]:
    """The questions of --data, or those that the run's recipe holds out; and the name of the data. metrics: those of
    calls ask for each call of a tool."""
    limit = limit or (recipe.eval.limit if recipe else None)
    if data:
        questions = read_all(other_questions(recipe, data, split), task)
        labels = {normalize_label(label) for label in TASKS[task].labels}
        for c in questions if labels else ():
            if not labels.intersection(map(normalize_label, c.answers)):
                answer = f"{c.answers[0]!r:.60}" if c.answers else "no answer"
                raise RecipeError(f"{c.where}: {answer} is none of the {len(labels)} labels of task {task}")
        return limit_questions(with_calls(questions, metrics), limit), Path(data).name
    if recipe is None or (recipe.eval.data is None and recipe.eval.share is None):
        raise RecipeError(f"--data: name the data to score on; {target} has none")
    held_out = recipe.eval.data
    settings: dict[str, Any] = {"limit": None}
    if held_out and split:
        settings["data"] = changed(held_out, split=split)
    recipe = changed(recipe, eval=settings, task=task)
    try:
        if isinstance(recipe, BaselineRecipe):
            questions, metrics = baseline_questions(recipe), ()
        else:
            questions = held_out_conversations(recipe)
    except DataError as error:
        raise RecipeError(f"the data that {target} names: {error}; name other data with --data") from error
    questions = limit_questions(with_calls(questions, metrics), limit)
    return questions, Path(held_out.path).name if held_out else f"{recipe.eval.share:.0%} of data.train"


def trained_on(run: Path, data: str, split: str | None) -> list[str]:
    """Files of the data that the run was trained on, by sha256; none if the run has no data report."""
    report = run / "data_report.json"
    if not report.is_file():
        return []
    sources = json.loads(report.read_text()).get("sources", [])
    trained = {sha256 for source in sources for sha256 in source.get("sha256", {}).values()}
    scored = file_digests(files_of(Source(path=data, split=split)))
    return [name for name, sha256 in scored.items() if sha256 in trained]


def default_folder(target: str, base: bool, options: AnswerOptions) -> Path:
    """Folder of the results if --out is not given: one in the run, named after the options, or eval-results."""
    if not is_run(target):
        return Path("eval-results")
    parts = ["eval", "base" if base else "", f"{options.shots}-shot" if options.shots else ""]
    parts += ["labels" if options.labels else "", "threshold" if options.threshold_from else ""]
    return Path(target) / "-".join(filter(None, parts))


def _name(target: str, base: bool, options: AnswerOptions) -> str:
    """Name of the system in a comparison."""
    name = options.served or target if is_url(target) else Path(target).resolve().name
    shots = f"{options.shots}-shot" if options.shots else "zero-shot" if base else ""
    threshold = "with threshold" if options.threshold_from else ""
    return " ".join(
        filter(None, (name, "base" if base else "", shots, "by labels" if options.labels else "", threshold))
    )


def print_scores(results: dict[str, Any]) -> None:
    """Print a row for each part: number of questions, and each score of the task with its interval."""
    names = score_names(results)
    for first in range(0, len(names), SIDE_BY_SIDE):
        _print_table(results, names[first : first + SIDE_BY_SIDE])
    if files := results.get("trained_on"):
        print(f"warning: the run was trained on {', '.join(files)}: this is no score on held-out questions")
    if long := results["too_long_for_model"]:
        print(f"{long} of {results['questions']} prompts need more positions than the model has and count as wrong")
    if cut := results["cut_at_max_new_tokens"]:
        print(f"{cut} of {results['questions']} answers were cut at {results['max_new_tokens']} tokens")


def _print_table(results: dict[str, Any], names: Sequence[str]) -> None:
    table = Table(title=f"{results['target']} on {results['data']}", title_justify="left")
    table.add_column("part")
    for column in ("questions", *(heading for name in names for heading in (column_of(name, results), "95 %"))):
        table.add_column(column, justify="right")
    for part, s in results["scores"].items():
        cells = [cell for name in names for cell in (f"{s[name]:.1f}", interval(s[f"{name}_95"]))]
        table.add_row(part, str(s["questions"]), *cells)
    Console(width=max(140, Console().width) if not sys.stdout.isatty() else None).print(table)


def score_names(results: dict[str, Any]) -> list[str]:
    """Names of the task's scores that have an interval, such as exact and f1."""
    return [name for name in results["scores"]["total"] if f"{name}_95" in results["scores"]["total"]]


def column_of(name: str, results: dict[str, Any]) -> str:
    """Heading of a score in a table; for labels, exact match is the accuracy."""
    return "accuracy" if name == "exact" and results["task"] == "newsgroups" else TITLES[name]


def interval(bounds: list[float]) -> str:
    return f"{bounds[0]:.1f} - {bounds[1]:.1f}"
