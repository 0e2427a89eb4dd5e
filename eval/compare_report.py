"""What the report of `graft compare` draws beside the scores, and the pages themselves.

Confusion and calibration of a system, scores by kind of question, examples that tell two systems apart.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data.audit.report import INVISIBLE, number
from eval.metrics import OTHER
from eval.per_label import classes
from eval.stats import (
    brier,
    expected_calibration_error,
    mean_cells,
    mean_sd,
    reliability_bins,
    wilson_interval,
)

Found = dict[str, Any]

BINS = 10  # of equal width, from 0 to 1
EXAMPLES = 20
PROMPT_TAIL = 600  # characters of a prompt that are shown; what is asked stands at its end
TITLES = {"exact": "EM", "f1": "F1", "valid": "valid labels", "macro_f1": "macro-F1"}
COSTS = {
    "trainable_parameters": "trained parameters", "parameters": "all parameters", "train_seconds": "training s",
    "train_cpu_seconds": "training CPU s", "train_peak_memory_gib": "training peak GiB", "disk_mib": "disk MiB",
    "latency_p50_ms": "latency p50 ms", "latency_p95_ms": "latency p95 ms", "questions_per_s": "questions a second",
    "peak_memory_gib": "answering peak GiB",
}  # fmt: skip
QUESTION_WORD = re.compile(r"\b(who|what|when|where|which|why|how)(?:m|se)?\b", re.IGNORECASE)
QUESTION_WORDS = ("who", "what", "when", "where", "which", "why", "how", "other")
LENGTHS = ("0", "1", "2", "3-5", "6+")  # words of the first gold answer; 0: unanswerable


def breakdown(rows: Sequence[Found], labels: Sequence[str]) -> Found:
    """Classes (None without labels) and calibration (None without probabilities) of one system."""
    return {"classes": classes(rows, labels), "calibration": calibration(rows)}


def calibration(rows: Sequence[Found]) -> Found | None:
    """ECE, Brier score and the bins of a reliability diagram; None where no answer has a probability."""
    known = [row for row in rows if row.get("probability") is not None]
    if not known:
        return None
    probabilities, correct = [row["probability"] for row in known], [row["exact"] for row in known]
    bins = []
    for i, (n, probability, right) in enumerate(reliability_bins(probabilities, correct, BINS)):
        found: Found = {"low": i / BINS, "high": (i + 1) / BINS, "questions": n, "probability": None, "correct": None}
        if n:
            found |= {"probability": round(probability, 4), "correct": round(right, 4)}
            found["correct_95"] = [round(end, 4) for end in wilson_interval(round(n * right), n)]
        bins.append(found)
    ece = round(expected_calibration_error(probabilities, correct, BINS), 4)
    return {"questions": len(known), "ece": ece, "brier": round(brier(probabilities, correct), 4), "bins": bins}


def over_seeds(results: Sequence[Found], systems: Sequence[Found]) -> list[Found]:
    """Mean and sd of the scores of each recipe that was trained with several seeds; of each seed its first system.

    results: what results.json holds, for each of `systems`."""
    recipes: dict[tuple[Any, ...], dict[Any, Found]] = {}
    for stated, system in zip(results, systems, strict=True):
        made = stated.get("system") or {}
        if made.get("recipe_sha256") and made.get("seed") is not None:
            key = made["recipe_sha256"], made.get("method"), stated.get("scorer")
            recipes.setdefault(key, {}).setdefault(made["seed"], system)
    found = []
    for (recipe, _, scorer), seeds in recipes.items():
        if len(seeds) > 1:
            of = [system["scores"]["total"] for system in seeds.values()]
            spread = {m: dict(zip(("mean", "sd"), mean_sd([s[m]["score"] for s in of]), strict=True)) for m in of[0]}
            names = [system["name"] for system in seeds.values()]
            found.append({"recipe_sha256": recipe, "scorer": scorer, "seeds": list(seeds), "systems": names, **spread})
    return found


def slices(rows: Sequence[Found], scores: dict[str, np.ndarray]) -> list[Found]:
    """Scores [questions, systems] by length of the answer and by question word, each system in order."""
    found = []
    for by, values, of in (
        ("answer length", LENGTHS, [_length(row["gold"]) for row in rows]),
        ("question word", QUESTION_WORDS, [_question_word(row["question"]) for row in rows]),
    ):
        for value in values:
            if indices := [i for i, held in enumerate(of) if held == value]:
                clusters = [rows[i]["cluster"] for i in indices]
                cells = {m: mean_cells(all_[indices], clusters) for m, all_ in scores.items()}
                systems = [dict(zip(cells, each, strict=True)) for each in zip(*cells.values(), strict=True)]
                found.append({"by": by, "value": value, "questions": len(indices), "systems": systems})
    return found


def _length(gold: Sequence[str]) -> str:
    words = max(1, len(gold[0].split())) if gold else 0
    return str(words) if words < 3 else "3-5" if words < 6 else "6+"


def _question_word(question: str) -> str:
    found = QUESTION_WORD.search(question)
    return found[1].lower() if found else "other"


def examples(a: tuple[str, list[Found]], b: tuple[str, list[Found]], seed: int) -> list[Found]:
    """Up to EXAMPLES questions that one of two systems (name, rows) has right and the other wrong, half of them each
    way where there are so many; drawn by seed."""
    scores = [(i, x["exact"] - y["exact"]) for i, (x, y) in enumerate(zip(a[1], b[1], strict=True))]
    only_a, only_b = [i for i, d in scores if d > 0], [i for i, d in scores if d < 0]
    rng = random.Random(seed)
    found = []
    for way, others, right, wrong in ((only_a, only_b, a, b), (only_b, only_a, b, a)):
        most = max(EXAMPLES // 2, EXAMPLES - len(others))
        for i in sorted(rng.sample(way, min(most, len(way)))):
            row = right[1][i]
            cut = max(0, len(row["prompt"]) - PROMPT_TAIL)
            found.append({
                "id": row["id"], "right": right[0], "wrong": wrong[0], "prompt_tail": row["prompt"][cut:],
                "characters_cut": cut, "gold": row["gold"], "right_answer": row["predicted"],
                "wrong_answer": wrong[1][i]["predicted"],
            })  # fmt: skip
    return found


def page(report: Found) -> str:
    """One page without scripts or anything to fetch; text from data can't become markup."""
    loader = FileSystemLoader(Path(__file__).parent)
    jinja = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    jinja.filters["n"] = number
    return jinja.get_template("compare_report.html").render(report, costs=COSTS, title=_titles(report), other=OTHER)


def markdown(report: Found) -> str:
    """Scores, pairs and costs as tables; text from data can't become markup or break a table."""
    title = _titles(report)
    systems, parts = report["systems"], report["parts"]
    columns = [(part, metric) for part in parts for metric in report["metrics"] if metric in systems[0]["scores"][part]]
    head = [title[m] if part == "total" else f"{part} {title[m]}" for part, m in columns]
    scores = [[s["name"], *(_shown(s["scores"][part][m]) for part, m in columns)] for s in systems]
    costs = [[s["name"], *(number(s["cost"][key]) for key in COSTS)] for s in systems]
    pairs = []
    for p in report["pairs"]:
        sure = _shown(p["difference"]), f"{p['p']:.4f}", f"{p['p_holm']:.4f}"
        pairs.append([title[p["metric"]], f"{p['a']} - {p['b']}", *sure, p["verdict"]])
    seeds = []
    for s in report["seeds"]:
        spread = [f"{s[m]['mean']:.1f} ± {s[m]['sd']:.1f}" for m in report["metrics"]]
        seeds.append([", ".join(s["systems"]), *spread])
    counts = f"{report['questions']:,} questions in {report['clusters']:,} clusters"
    told = f"{report['task']}, {counts}; percent, in brackets the 95 % interval, resampled by cluster."
    text = ["# Comparison", told, _table(["system", *head], scores)]
    text.append(_table(["score", "pair", "difference", "p", "p after Holm", "verdict"], pairs))
    text.append(_table(["system", *COSTS.values()], costs))
    if len(report["machines"]) > 1:
        different = _plain("; ".join(report["machines"]))
        text.append(f"Answers were timed on different machines, which can't be compared: {different}.")
    if seeds:
        text.append(_table(["mean ± sd over seeds", *(title[m] for m in report["metrics"])], seeds))
    return "\n\n".join(text) + "\n"


def _titles(report: Found) -> dict[str, str]:
    return TITLES | ({"exact": "accuracy"} if report["labels"] else {})


def _shown(found: Found) -> str:
    return f"{found['score']:.1f} [{found['low']:.1f} - {found['high']:.1f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Markdown that shows just this text, on one line, and is no formula where a cell is pasted into a spreadsheet."""
    escaped = re.sub(r"([\\`*_\[\]<>|&#])", r"\\\1", " ".join(str(_visible(text)).split()))
    return re.sub(r"^(?=[=+@]|-(?![\d.]+( |$)))", r"\\", escaped)


def _visible(value: Any) -> Any:
    """Text from data with controls and marks that reorder text as their names; anything else as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return INVISIBLE.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", value)
