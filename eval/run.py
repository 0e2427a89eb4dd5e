"""Predictions -> results.json and samples.jsonl: every question scored, with 95 % intervals."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.chat import Conversation
from eval.predict import Prediction
from eval.stats import cluster_interval
from eval.tasks import TASKS


def limit_questions(conversations: Sequence[Conversation], limit: int | None, seed: int = 0) -> list[Conversation]:
    """At most `limit` questions drawn at random by seed, in file order. Questions rather than whole contexts: those
    of one passage tend to be right or wrong together, so many passages give the narrower interval."""
    if limit is None or limit >= len(conversations):
        return list(conversations)
    return [conversations[i] for i in sorted(random.Random(seed).sample(range(len(conversations)), limit))]


def score(task: str, conversations: Sequence[Conversation], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Percentages and 95 % intervals of exact match and F1, total and by answerability; counts of what went wrong."""
    rows = [
        TASKS[task].score(c.answers, p.text) | {"context": c.context, "has_answer": bool(c.answers)}
        for c, p in zip(conversations, predictions, strict=True)
    ]
    parts = {"total": rows}
    if task == "squad_v2":
        parts |= {"HasAns": [r for r in rows if r["has_answer"]], "NoAns": [r for r in rows if not r["has_answer"]]}
    return {
        "task": task,
        "task_version": TASKS[task].version,
        "questions": len(rows),
        "contexts": len({r["context"] for r in rows}),
        "cut_at_max_new_tokens": sum(not p.finished for p in predictions),
        "scores": {name: _summary(part) for name, part in parts.items() if part},
    }


def write_results(
    out: Path, results: dict[str, Any], conversations: Sequence[Conversation], predictions: Sequence[Prediction]
) -> None:
    """results.json and samples.jsonl, a row a question with prompt, answer, gold answers and scores."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "samples.jsonl").open("w", encoding="utf-8") as file:
        for c, p in zip(conversations, predictions, strict=True):
            row = {
                "id": c.id, "prompt": c.prompt[-1]["content"], "gold": list(c.answers), "predicted": p.text,
                "finished": p.finished, **TASKS[results["task"]].score(c.answers, p.text),
            }  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    aside = out / ".results.json.new"
    aside.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(out / "results.json")


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"questions": len(rows)}
    for name in ("exact", "f1"):
        values, contexts = [r[name] for r in rows], [r["context"] for r in rows]
        low, high = cluster_interval(values, contexts)
        summary[name] = round(100 * sum(values) / len(values), 2)
        summary[f"{name}_95"] = [round(100 * low, 2), round(100 * high, 2)]
    return summary
