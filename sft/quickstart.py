"""The whole way in one command: train, score base and adapter, merge, and serve if vLLM is installed."""

import importlib.util
import time
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from data.errors import UserError
from data.terminal import Console, print, quoted
from sft.errors import RecipeError
from sft.export.pipeline import export
from sft.recipe.load import load_recipe
from sft.runs.cost import peak_memory_gib
from sft.runs.metrics import read_metrics
from sft.scoring.evaluate import column_of, evaluate, interval, score_names
from sft.training.finetune import finetune


def quickstart(recipe_path: Path) -> None:
    """Print one table (before, after, time, memory) and three next commands, then a row for the served model."""
    console = Console()
    recipe = load_recipe(recipe_path)
    if recipe.eval.data is None and recipe.eval.share is None:
        raise RecipeError(f"{recipe_path}: a quickstart needs eval.data or eval.share to score on")
    start = time.monotonic()
    console.rule("1/4 train")
    run = finetune(recipe, recipe_path)
    if run is None:
        raise RecipeError("quickstart runs in one process; start it without a launcher")
    trained_s = read_metrics(run)[-1]["seconds"]
    memory = peak_memory_gib()
    console.rule("2/4 score the base")
    before = evaluate(str(run), run / "eval-base", base=True)
    console.rule("3/4 score the adapter")
    after = evaluate(str(run), run / "eval-adapter")
    console.rule("4/4 merge")
    parity = export(run, run / "export")

    print_results(console, f"{run}: {before['questions']} held-out questions", {"base": before, "adapter": after})
    console.print(
        f"training {trained_s:.0f} s, peak memory {memory:.1f} GiB; merged and adapter agree on "
        f"{parity['answer_argmax_agreement']:.1%} of answer tokens; {time.monotonic() - start:.0f} s in all\n"
        f"\nnext:\n  graft chat {quoted(run)}\n  graft serve {quoted(run / 'export')}\n"
        "  graft check recipes/smollm_newsgroups.yaml",
        highlight=False,
        soft_wrap=True,  # a command stays in one line, to be copied
    )
    if importlib.util.find_spec("vllm"):
        console.rule("and serve; Ctrl-C skips it")
        served = score_served(run)
        if served:
            print_results(console, f"{run}: over HTTP", {"served": served})


def score_served(run: Path) -> dict[str, Any] | None:
    """Results of the export behind a server; None, with a line that says why, if it can't be served."""
    from sft.serving.serve import free_port, server

    log = run / "serve.log"
    try:
        with server([str(run / "export")], "127.0.0.1", free_port(), log) as running:
            return evaluate(running.url, run / "eval-served", run=run)
    except UserError as error:
        print(f"not served: {error}\nlog: {log}; training, scores and merge above are not affected", flush=True)
    except KeyboardInterrupt:
        print("not served: interrupted; training, scores and merge above are not affected", flush=True)
    return None


def print_results(console: Console, title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A row for each target: exact match of each part, interval and other scores of the total, seconds."""
    first = next(iter(rows.values()))
    parts, others = list(first["scores"]), [name for name in score_names(first) if name != "exact"]
    exact = [f"{part} {column_of('exact', first)}" for part in parts]
    headings = (*exact, "95 % of total", *(column_of(name, first) for name in others), "seconds")
    columns = (Column(heading, justify="right") for heading in headings)
    table = Table("", *columns, title=title, title_justify="left")
    for name, result in rows.items():
        total = result["scores"]["total"]
        cells = [f"{result['scores'][part]['exact']:.1f}" for part in parts]
        cells += [interval(total["exact_95"]), *(f"{total[other]:.1f}" for other in others)]
        table.add_row(name, *cells, f"{result['seconds']:.0f}")
    console.print(table)
