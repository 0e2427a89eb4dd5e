"""Score a run, an export, a base or a server: `graft eval TARGET --task squad_v2 --data FILE`."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.predict import ask_server, generate, served_model
from eval.run import limit_questions, score, write_results
from eval.tasks import TASKS, read_conversations
from sft.load import is_run, is_url, load_target, run_recipe
from sft.monitor import peak_memory_gib
from sft.recipe import Eval, RecipeError
from sft.recipe_file import nearest
from sft.run import check_writable
from sft.session import use_all_cores


def evaluate(
    target: str,
    out: Path,
    task: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    base: bool = False,
    served: str | None = None,
    concurrency: int = 16,
    split: str = "validation",
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Results, also written to `out`. What is left out comes from the run's recipe. `base`: score a run's base instead.

    Raises RecipeError where task or data are neither given nor in a recipe.
    """
    recipe = run_recipe(Path(target)) if not is_url(target) and is_run(target) else None
    settings = recipe.eval if recipe else Eval()
    task = task or (recipe.task if recipe else None)
    if task not in TASKS:
        near = nearest(str(task), list(TASKS)) if task else ""
        raise RecipeError(f"--task {task}: name one of {', '.join(TASKS)}{near}")
    source = settings.data
    if data is None and source is None:
        raise RecipeError("--data: name the file to score on; the target brings none")
    revision = None
    if data is None and source is not None:
        data, split, revision = source.path, source.split, source.revision
    check_writable(out, "--out")
    conversations = limit_questions(read_conversations(task, str(data), split, revision), limit or settings.limit)
    length = max_new_tokens or settings.max_new_tokens

    use_all_cores()
    start = time.monotonic()
    if is_url(target):
        served = served_model(target, served)
        predictions = ask_server(target, served, conversations, length, concurrency)
    else:
        if base and recipe is None:
            raise RecipeError(f"--base: {target} is no run folder")
        loaded = load_target(target, base)
        predictions = generate(
            loaded.model, loaded.tokenizer, conversations, length, settings.batch_tokens, loaded.packed
        )
    seconds = time.monotonic() - start
    results = {
        "target": target + (" (base)" if base else f" {served}" if is_url(target) else ""),
        "data": Path(str(data)).name,
        **score(task, conversations, predictions),
        "max_new_tokens": length,
        "seconds": round(seconds, 1),
        "questions_per_s": round(len(predictions) / seconds, 2),
    }
    if not is_url(target):
        results["peak_memory_gib"] = round(peak_memory_gib(), 2)
    write_results(out, results, conversations, predictions)
    return results


def print_scores(results: dict[str, Any], console: Console | None = None) -> None:
    """A row for each part: questions, exact match and F1 with their intervals."""
    table = Table(title=f"{results['target']} on {results['data']}", title_justify="left")
    for column in ("part", "questions", "EM", "95 %", "F1", "95 %"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, s in results["scores"].items():
        cells = [f"{s['exact']:.1f}", interval(s["exact_95"]), f"{s['f1']:.1f}", interval(s["f1_95"])]
        table.add_row(part, str(s["questions"]), *cells)
    (console or Console()).print(table)
    cut = results["cut_at_max_new_tokens"]
    if cut:
        print(f"{cut} of {results['questions']} answers were cut at {results['max_new_tokens']} tokens")


def interval(bounds: list[float]) -> str:
    return f"{bounds[0]:.1f} - {bounds[1]:.1f}"
