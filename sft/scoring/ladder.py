"""One recipe with several tuning methods, score against cost: `graft ladder RECIPE --methods lora,full --out DIR`.

Each method is a rung. It is trained and scored into DIR/METHOD, in processes of its own so that its peak memory is not
that of another. ladder.json (all numbers), ladder.md and ladder.png are written to DIR.
"""

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markdown import Markdown

from data.atomic import atomic_path, open_to_append, write_json, write_text
from data.page import markdown_table
from data.terminal import Console, print
from sft.baselines.encoder import positions_of
from sft.child_supervisor import end_with_parent
from sft.errors import RecipeError
from sft.models.load import load_config
from sft.recipe.baseline_schema import MOVES_POSITIONS, AnyRecipe, BaselineRecipe
from sft.recipe.load import dump_recipe, load_any_recipe, nearest
from sft.recipe.schema import Model, Recipe
from sft.runs.folder import check_writable
from sft.runs.metrics import read_metrics
from sft.scoring.evaluate import column_of
from sft.session import child_environment, graft_command
from sft.untrusted import check_contents

Row = dict[str, Any]

LLM = ("linear_probe", "prompt_tuning", "ia3", "lora", "qlora", "dora", "full")
ENCODER = ("linear_probe", "prompt_tuning", "ia3", "lora", "dora", "gradual_unfreezing", "full")
VARIANT_OF = {"qlora": "lora", "dora": "lora", "gradual_unfreezing": "full"}  # same settings as
# Learning rate of a method over that of LoRA; 1 for other adapters. full: a tenth (Schulman et al., LoRA Without
# Regret, Thinking Machines 2025). ia3, prompt_tuning: 8e-3 and 3e-2 in PEFT's guides, whose LoRA has 1e-3.
# linear_probe: a guess; the loss of one linear layer is convex and tolerates a higher rate.
RATES = {"full": 0.1, "gradual_unfreezing": 0.1, "freeze": 0.1, "linear_probe": 3.0, "ia3": 8.0, "prompt_tuning": 30.0}
COST = ("trainable_parameters", "parameters", "train_peak_memory_gib", "train_seconds", "disk_mib")
COLUMNS = {  # heading in the table -> cell of a finished rung
    "95 %": "{score_95[0]:.1f} - {score_95[1]:.1f}",
    "trained": "{trainable_parameters:,}",
    "% of all": "{trainable_percent:.3g}",
    "peak GiB": "{train_peak_memory_gib:.2f}",
    "train s": "{train_seconds:.0f}",
    "disk MiB": "{disk_mib:.1f}",
}


def ladder(
    recipe_path: Path, methods: Sequence[str], overrides: list[str], out: Path, rates: Sequence[str] = ()
) -> list[Row]:
    """Train and score the recipe with each method (none given: all that suit the recipe's kind of base) and return a
    row for each, whose `failed` is None or the reason. `rates`: METHOD=VALUE, to replace the recipe's learning rate
    times the method's factor.

    Finished rungs in `out` are not repeated, so the same call resumes an interrupted ladder. Raises RecipeError before
    the first rung; on Ctrl-C reports the rungs so far, then raises KeyboardInterrupt.
    """
    recipe = load_any_recipe(recipe_path, overrides)
    methods = _check(recipe, recipe_path, methods)
    rate_by_method = _rates(rates, methods)
    check_writable(out, "--out")
    check_contents(out, f"--out {out}")
    kind = str(load_config(Model(base=recipe.model.base, revision=recipe.model.revision)).model_type)
    rungs: dict[str, AnyRecipe | RecipeError] = {}
    for method in methods:
        changes = rung_overrides(method, recipe, kind, out / method, rate_by_method.get(method))
        try:
            rungs[method] = rung_recipe = load_any_recipe(recipe_path, [*overrides, *changes])
        except RecipeError as error:
            rungs[method] = error
            continue
        written = out / f"{method}.yaml"
        same = written.is_file() and written.read_text(encoding="utf-8") == dump_recipe(rung_recipe)
        if (out / method).exists() and not same:
            remedy = "remove it, or name another --out"
            raise RecipeError(f"{out / method} was made by other settings than those of this ladder; {remedy}")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        for method, rung in rungs.items():
            rows.append(_climb(method, rung, out))
    except KeyboardInterrupt:
        command = ["graft", "ladder", str(recipe_path), "--out", str(out), "--methods", ",".join(methods)]
        command += [word for text in overrides for word in ("--set", text)]
        command += [word for text in rates for word in ("--rate", text)]
        print(f"stopped; resume with: {shlex.join(command)}", flush=True)
        raise
    finally:
        report(rows, out)
    return rows


def rung_overrides(method: str, recipe: AnyRecipe, kind: str, run: Path, rate: float | None = None) -> list[str]:
    """The --set overrides that turn a recipe, whose base has the model_type `kind`, into the rung of a method. Except
    for qlora, rungs start from the unquantized base, so that they differ in the method only."""
    changes: dict[str, Any] = {
        "tune": _tune(method, recipe, kind),
        "train.learning_rate": rate or rate_of(method, recipe),
        "train.output_dir": str(run.absolute()),  # a relative path must stay in the working folder
    }
    if isinstance(recipe, BaselineRecipe) and method == "prompt_tuning" and (positions := positions_of(recipe.model)):
        # virtual tokens take positions from the input
        virtual = changes["tune"].get("num_virtual_tokens") or 0
        changes["data.max_seq_length"] = min(recipe.data.max_seq_length, positions - virtual)
    if isinstance(recipe, Recipe):
        quantization = recipe.model.quantization
        if method != "qlora":
            changes["model.quantization"] = None
        elif not (quantization and quantization.load_in_4bit):
            changes["model.quantization"] = {"load_in_4bit": True}
        if method == "prompt_tuning" and recipe.data.share_prefixes is True:  # virtual tokens come before each example
            changes["data.share_prefixes"] = "auto"
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def rate_of(method: str, recipe: AnyRecipe) -> float:
    """The recipe's learning rate, converted from its own method to this one."""
    return float(f"{recipe.train.learning_rate * RATES.get(method, 1.0) / RATES.get(recipe.tune.method, 1.0):.3g}")


def _tune(method: str, recipe: AnyRecipe, kind: str) -> dict[str, Any]:
    """Section `tune` of a rung: the recipe's own settings if they are of this method, else common ones."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    family, own = VARIANT_OF.get(method, method), recipe.tune.method
    tune: dict[str, Any] = {}
    if family == VARIANT_OF.get(own, own):
        tune = recipe.tune.model_dump(mode="json")
    elif family == "lora":
        tune = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    elif method == "prompt_tuning":
        tune = {"num_virtual_tokens": 20}
    elif method == "ia3" and kind not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        # most bases that PEFT does not know have the module names of BERT or Llama
        encoder = isinstance(recipe, BaselineRecipe)
        modules = ["key", "value", "output.dense"] if encoder else ["k_proj", "v_proj", "down_proj"]
        tune = {"target_modules": modules, "feedforward_modules": modules[2:]}
    if family == "lora":
        if isinstance(recipe, BaselineRecipe) and tune.get("target_modules") == "all-linear":
            # PEFT trains this head whole; all-linear would also adapt it, which PEFT 0.21 refuses
            tune.setdefault("exclude_modules", ["qa_outputs"])
        return tune | {"method": "lora", "use_dora": method == "dora"}
    return tune | {"method": method}


def _check(recipe: AnyRecipe, path: Path, methods: Sequence[str]) -> list[str]:
    """The methods, each once. Raises RecipeError if the recipe suits no ladder, or a method does not suit it."""
    if isinstance(recipe, BaselineRecipe) and (recipe.is_floor or recipe.objective == "mlm"):
        reason = f"{recipe.model.base} has no weights to tune" if recipe.is_floor else "objective mlm has no score"
        raise RecipeError(f"{path}: {reason}; a ladder needs an LLM's recipe, or an encoder's with another objective")
    if recipe.eval.data is None and recipe.eval.share is None:
        raise RecipeError(f"{path}: a ladder needs eval.data or eval.share to score on")
    known: tuple[str, ...] = ENCODER if isinstance(recipe, BaselineRecipe) else LLM
    if isinstance(recipe, BaselineRecipe) and recipe.objective == "extractive_qa":
        known = tuple(method for method in known if method not in MOVES_POSITIONS)
    for method in methods:
        if method not in (*known, recipe.tune.method):
            raise RecipeError(f"--methods {method}: none of {', '.join(known)}{nearest(method, list(known))}")
    return list(dict.fromkeys(methods or known))


def _rates(texts: Sequence[str], methods: Sequence[str]) -> dict[str, float]:
    rates = {}
    for text in texts:
        method, _, value = text.partition("=")
        try:
            rates[method] = float(value)
        except ValueError:
            rates[method] = 0.0
        if method not in methods or not 0 < rates[method] < float("inf"):
            raise RecipeError(f"--rate {text}: write METHOD=VALUE, a positive number for one of {', '.join(methods)}")
    return rates


def _climb(method: str, rung: AnyRecipe | RecipeError, out: Path) -> Row:
    """Train and score a rung, as far as that is left to do; print a line about it and return its row."""
    if isinstance(rung, RecipeError):
        print(f"{method}: failed: {rung}", flush=True)
        return {"method": method, "learning_rate": None, "failed": str(rung)}
    row: Row = {"method": method, "learning_rate": rung.train.learning_rate, "failed": None}
    run, log, start = out / method, out / f"{method}.log", time.monotonic()
    commands = _left_to_do(rung, out / f"{method}.yaml", run)
    for command in commands:
        code = run_logged(command, log)
        if code:
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            reason = f"ended by signal {-code}" if code < 0 else lines[-1].strip().removeprefix("error: ")
            print(f"{method}: failed after {time.monotonic() - start:.0f} s: {reason}", flush=True)
            print(*(f"    {line}" for line in lines[-3:]), f"    all of it: {log}", sep="\n", flush=True)
            return row | {"failed": reason}
    row |= _measured(run)
    seconds = f"{time.monotonic() - start:.0f} s" if commands else "finished before"
    print(f"{method}: {seconds}, {row['metric']} {row['score']:.1f}", flush=True)
    return row


def _left_to_do(rung: AnyRecipe, path: Path, run: Path) -> list[list[str]]:
    """Commands that train a rung, from its start or its checkpoint, and score it; none if it is finished."""
    if (run / "eval" / "results.json").is_file():
        return []
    score = graft_command("eval", run, "--out", run / "eval")
    if (run / "cost.json").is_file():
        return [score]
    if any(run.glob("checkpoint-*/trainer_state.json")):
        return [graft_command("train", "--resume", run), score]
    if run.exists():  # it failed before its first checkpoint, and training needs an empty folder
        shutil.rmtree(run)
    write_text(path, dump_recipe(rung))
    return [graft_command("train", path), score]


def run_logged(command: Sequence[str], log: Path) -> int:
    """Run a command, append its output to the log, and return its exit code. Ctrl-C also reaches the command, which may
    save a checkpoint until a second Ctrl-C."""
    with open_to_append(log) as file:
        print("$", shlex.join(command), file=file, flush=True)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=child_environment(),
            preexec_fn=end_with_parent(),
        )  # fmt: skip
        try:
            return process.wait()
        except KeyboardInterrupt:
            print("\nstopping; a rung in training saves a checkpoint first", flush=True)
            process.wait()
            raise
        finally:
            process.kill()  # does nothing if the process has ended


def _measured(run: Path) -> Row:
    """Score and cost of a finished rung."""
    results = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))
    cost = json.loads((run / "cost.json").read_text(encoding="utf-8"))
    total = results["scores"]["total"]
    row = {"metric": column_of("exact", results), "score": total["exact"], "score_95": total["exact_95"]}
    row |= {key: cost[key] for key in COST} | {"questions": results["questions"], "run": str(run)}
    row["trainable_percent"] = 100 * cost["trainable_parameters"] / cost["parameters"]
    # for a resumed run cost.json has the time of its last part only, and the metrics the total
    row["train_seconds"] = max([cost["train_seconds"], *(m["seconds"] for m in read_metrics(run)[-1:])])
    return row


def report(rows: Sequence[Row], out: Path) -> None:
    """Write ladder.json, ladder.md and ladder.png; print the table and the next command."""
    write_json(out / "ladder.json", rows)
    table = markdown_table(*table_of(rows))
    write_text(out / "ladder.md", table + "\n")
    screen = Console()
    (screen if screen.is_terminal else Console(width=140)).print(Markdown(table))  # a log file has no width
    print(f"written to {out}/ladder.md and ladder.json")
    done = [row for row in rows if not row["failed"]]
    if done:
        plot(done, out / "ladder.png")
    if len(done) > 1:
        print("next:", shlex.join(["graft", "compare", *(r["run"] for r in done), "--out", str(out / "compare")]))


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table; if a rung failed, the last column has the reason."""
    columns = {next((row["metric"] for row in rows if not row["failed"]), "score"): "{score:.1f}", **COLUMNS}
    headings = ["method", *columns, "rate", *["failed"] * any(row["failed"] for row in rows)]
    lines = []
    for row in rows:
        cells = ["–" if row["failed"] else form.format(**row) for form in columns.values()]
        rate = f"{row['learning_rate']:.3g}" if row["learning_rate"] else "–"
        reason = f"failed: {' '.join(row['failed'].split())}" if row["failed"] else ""
        lines.append([row["method"], *cells, rate, reason][: len(headings)])
    return headings, lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the score with its interval, and the peak memory, each against the trained parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    scores, memory = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        x, y, gib = (row[key] for key in ("trainable_parameters", "score", "train_peak_memory_gib"))
        low, high = row["score_95"]
        scores.errorbar(x, y, yerr=[[max(0, y - low)], [max(0, high - y)]], fmt="o", capsize=3, color=f"C{i}")
        memory.plot(x, gib, "o", color=f"C{i}")
        side, offset = (("left", (7, 5)), ("left", (7, -13)), ("right", (-7, 5)))[i % 3]  # lora, qlora and dora overlap
        for axes, at in ((scores, y), (memory, gib)):
            axes.annotate(row["method"], (x, at), offset, textcoords="offset points", ha=side, color=f"C{i}")
    for axes, label in ((scores, f"{rows[0]['metric']}, percent, 95 % interval"), (memory, "peak memory in GiB")):
        axes.set(xlabel="trained parameters", ylabel=label, xscale="log")
        axes.margins(x=0.3, y=0.1)  # room for the labels
        axes.grid(alpha=0.3)
    memory.set_ylim(bottom=0)
    with atomic_path(path) as new:
        figure.savefig(new, dpi=130, format="png")
