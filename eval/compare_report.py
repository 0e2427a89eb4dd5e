"""The report of `graft compare`: a page, and its tables in Markdown."""

from pathlib import Path
from typing import Any

from data.page import markdown_table, number, plain_markdown, render
from eval.metrics import TITLES

PAGE = Path(__file__).with_name("compare_report.html")
COSTS = {
    "trainable_parameters": "trained parameters", "parameters": "all parameters", "train_seconds": "training s",
    "train_cpu_seconds": "training CPU s", "train_peak_memory_gib": "training peak GiB", "disk_mib": "disk MiB",
    "latency_p50_ms": "latency p50 ms", "latency_p95_ms": "latency p95 ms", "questions_per_s": "questions a second",
    "peak_memory_gib": "answering peak GiB",
}  # fmt: skip


def page(report: dict[str, Any]) -> str:
    main_scores = [(s["name"], s["scores"]["total"][report["metrics"][0]]) for s in report["systems"]]
    columns = _columns(report)
    return render(PAGE, **report, costs=COSTS, title=_titles(report), columns=columns, main_scores=main_scores)


def markdown(report: dict[str, Any]) -> str:
    """Scores, pairs and costs as tables."""
    title, systems, columns = _titles(report), report["systems"], _columns(report)
    scores = [[s["name"], *(_shown(s["scores"][part][metric]) for part, metric, _ in columns)] for s in systems]
    costs = [[s["name"], *(number(s["cost"][key]) for key in COSTS)] for s in systems]
    pairs = []
    for p in report["pairs"]:
        p_values = f"{p['p']:.4f}", f"{p['p_holm']:.4f}"
        pairs.append([title[p["metric"]], f"{p['a']} - {p['b']}", _shown(p["difference"]), *p_values, p["verdict"]])
    seeds = []
    for s in report["seeds"]:
        spread = [f"{s[m]['mean']:.1f} ± {s[m]['sd']:.1f}" for m in report["metrics"]]
        seeds.append([", ".join(s["systems"]), *spread])
    counts = f"{report['questions']:,} questions in {report['clusters']:,} clusters"
    caption = f"{report['task']}, {counts}; percent, in brackets the 95 % interval, resampled by cluster."
    text = ["# Comparison", caption, markdown_table(["system", *(heading for *_, heading in columns)], scores)]
    text.append(markdown_table(["score", "pair", "difference", "p", "p after Holm", "verdict"], pairs))
    text.append(markdown_table(["system", *COSTS.values()], costs))
    if len(report["machines"]) > 1:
        machines = plain_markdown("; ".join(report["machines"]))
        text.append(f"Answers were timed on different machines, which can't be compared: {machines}.")
    if seeds:
        text.append(markdown_table(["mean ± sd over seeds", *(title[m] for m in report["metrics"])], seeds))
    return "\n\n".join(text) + "\n"


def _titles(report: dict[str, Any]) -> dict[str, str]:
    return TITLES | ({"exact": "accuracy"} if report["labels"] else {})


def _columns(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Part, metric and heading of every score."""
    title, scores = _titles(report), report["systems"][0]["scores"]
    return [(part, m, f"{part} {title[m]}".removeprefix("total ")) for part in report["parts"] for m in scores[part]]


def _shown(c: dict[str, float]) -> str:
    return f"{c['score']:.1f} [{c['low']:.1f} - {c['high']:.1f}]"
