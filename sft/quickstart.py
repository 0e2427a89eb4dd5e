"""The whole way on one screen: score the base, train, score the adapter, merge with proof, serve if vLLM is there."""

import importlib.util
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sft.evaluate import evaluate, interval
from sft.export import export
from sft.monitor import peak_memory_gib
from sft.recipe import RecipeError
from sft.recipe_file import load_recipe
from sft.run import read_metrics
from sft.train import train

PORT = 8127


def quickstart(recipe_path: Path) -> None:
    """Print one table (before, after, time, memory) and three next commands."""
    console = Console()
    recipe = load_recipe(recipe_path)
    if recipe.eval.data is None:
        raise RecipeError(f"{recipe_path}: a quickstart needs eval.data to score on")
    start = time.monotonic()
    console.rule("1/4 train")
    run = train(recipe, recipe_path)
    if run is None:
        raise RecipeError("quickstart is for one process")
    trained_s = read_metrics(run)[-1]["seconds"]
    memory = peak_memory_gib()
    console.rule("2/4 score the base")
    before = evaluate(str(run), run / "eval-base", base=True)
    console.rule("3/4 score the adapter")
    after = evaluate(str(run), run / "eval-adapter")
    console.rule("4/4 merge")
    parity = export(run, run / "export")
    rows = [("base", before), ("adapter", after)]
    if importlib.util.find_spec("vllm"):
        from sft.serve import server

        console.rule("and serve")
        with server(run / "export", "127.0.0.1", PORT, run / "serve.log") as url:
            source = recipe.eval.data
            served = evaluate(
                url,
                run / "eval-served",
                recipe.task,
                source.path,
                recipe.eval.limit,
                split=source.split,
                max_new_tokens=recipe.eval.max_new_tokens,
            )
        rows.append(("served", served))

    parts = list(before["scores"])
    table = Table(title=f"{run}: {before['questions']} held-out questions", title_justify="left")
    for name in ("", *(f"{part} EM" for part in parts), "95 % of total", "F1", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    for name, result in rows:
        total = result["scores"]["total"]
        cells = [f"{result['scores'][part]['exact']:.1f}" for part in parts]
        table.add_row(name, *cells, interval(total["exact_95"]), f"{total['f1']:.1f}", f"{result['seconds']:.0f}")
    console.print(table)
    console.print(
        f"training {trained_s:.0f} s, peak memory {memory:.1f} GiB; merged and adapter agree on "
        f"{parity['answer_argmax_agreement']:.1%} of answer tokens; {time.monotonic() - start:.0f} s in all\n"
        f"\nnext:\n  graft chat {run}\n  graft serve {run / 'export'}\n"
        "  graft train recipes/smollm_squad.yaml --dry-run",
        highlight=False,
    )
