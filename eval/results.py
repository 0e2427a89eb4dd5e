"""Predictions -> results.json and samples.jsonl: scores with 95 % intervals, and every question with its answer."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.atomic import atomic_path, write_json
from data.conversation import Conversation
from data.readers.squad import UNANSWERABLE
from eval.breakdown import plot_confusion, scores_per_label
from eval.metrics import further_metrics, gold_label, label_counts
from eval.prediction import Prediction
from eval.stats import bootstrap_sums, cell, macro_f1, mean_cells
from eval.tasks import TASKS


@dataclass(frozen=True)
class Scored:
    """One question, its answer, and the scores of the answer."""

    conversation: Conversation
    prediction: Prediction
    scores: dict[str, float]


def limit_questions(conversations: Sequence[Conversation], limit: int | None) -> list[Conversation]:
    """At most `limit` questions drawn at random, the same ones each time, in file order. Questions rather than whole
    contexts: those of one passage tend to be right or wrong together, and many passages give the narrower interval."""
    if limit is None or limit >= len(conversations):
        return list(conversations)
    return [conversations[i] for i in sorted(random.Random(0).sample(range(len(conversations)), limit))]


def score(
    task: str,
    conversations: Sequence[Conversation],
    predictions: Sequence[Prediction],
    metrics: Sequence[str] = (),
    pattern: str | None = None,
) -> list[Scored]:
    """Every question with its scores, each from 0 to 1. metrics, pattern: eval.metrics and eval.pattern of the recipe,
    which only task instruct has. Raises ValueError if a question lacks its prediction."""
    scored, further = [], further_metrics(metrics if task == "instruct" else (), pattern)
    for c, p in zip(conversations, predictions, strict=True):
        passage = [c.context] if c.question else []  # else the context is a prompt or a post
        scores = TASKS[task].score(c.answers, p.text, *passage)
        scores |= {name: metric(c.answers or (UNANSWERABLE,), p.text) for name, metric in further.items()}
        scored.append(Scored(c, p, scores if p.asked else dict.fromkeys(scores, 0.0)))
    return scored


def summarize(task: str, scored: Sequence[Scored]) -> dict[str, Any]:
    """Percentages and 95 % intervals of the task's scores, in total and by answerability; counts of answers that were
    cut and of questions that were not asked; scores per label that occurs (see eval/breakdown.py)."""
    parts = {"total": scored}
    if task == "squad_v2":
        parts["HasAns"] = [s for s in scored if s.conversation.answers]
        parts["NoAns"] = [s for s in scored if not s.conversation.answers]
    rows = [sample_row(one) for one in scored] if TASKS[task].labels else []
    labels = sorted({gold_label(row) for row in rows})
    return {
        "task": task,
        "task_version": TASKS[task].version,
        "evaluation_sha256": evaluation_sha256([s.conversation for s in scored]),
        "questions": len(scored),
        "contexts": len({s.conversation.context for s in scored}),
        "cut_at_max_new_tokens": sum(s.prediction.asked and not s.prediction.finished for s in scored),
        "too_long_for_model": sum(not s.prediction.asked for s in scored),
        "scores": {name: _summary(part, labels) for name, part in parts.items() if part},
        "classes": scores_per_label(rows, labels),
    }


def evaluation_sha256(conversations: Sequence[Conversation]) -> str:
    """Identifies the questions: contexts, questions, gold answers and labels in order, whatever the prompt around
    them."""
    digest = hashlib.sha256()
    for c in conversations:
        digest.update(json.dumps([c.context, c.question, c.answers, c.label]).encode())
    return digest.hexdigest()


def write_results(out: Path, results: dict[str, Any], scored: Sequence[Scored]) -> None:
    """Writes results.json, samples.jsonl (a line per question: prompt, answer, gold answers, scores) and, for labels,
    confusion.png.

    Both are written to temporary files, so that a full disk leaves the old ones; beside a results.json, samples.jsonl
    is its own and whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary, plot = out / "results.json", out / "confusion.png"
    with atomic_path(summary) as new_summary, atomic_path(out / "samples.jsonl") as new_samples:
        with new_samples.open("w", encoding="utf-8") as file:
            for one in scored:
                file.write(json.dumps(sample_row(one), ensure_ascii=False) + "\n")
        write_json(new_summary, results)
        if results.get("classes"):
            with atomic_path(plot) as new_plot:
                plot_confusion(results["classes"], new_plot)
        else:
            plot.unlink(missing_ok=True)
        summary.unlink(missing_ok=True)  # never beside the samples.jsonl of other results


def sample_row(scored: Scored) -> dict[str, Any]:
    """The question's line in samples.jsonl."""
    conversation, prediction = scored.conversation, scored.prediction
    cluster = conversation.cluster.encode(errors="surrogatepass")
    return {
        "id": conversation.id,
        "cluster": hashlib.sha256(cluster).hexdigest()[:16],
        "prompt": conversation.prompt[-1]["content"],
        "question": conversation.question,
        "label": conversation.label,
        "gold": list(conversation.answers),
        "predicted": prediction.text,
        **({"written": prediction.written} if prediction.written is not None else {}),
        "finished": prediction.finished,
        "asked": prediction.asked,
        "probability": prediction.probability,
        **scored.scores,
    }


def _summary(scored: Sequence[Scored], labels: Sequence[str]) -> dict[str, Any]:
    clusters, names = [s.conversation.cluster for s in scored], list(scored[0].scores)
    scores = np.array([[s.scores[name] for name in names] for s in scored])
    cells = dict(zip(names, mean_cells(scores, clusters), strict=True))
    if labels:
        sums = bootstrap_sums(label_counts([sample_row(one) for one in scored], labels), clusters)
        cells["macro_f1"] = cell(100 * macro_f1(sums), len(set(clusters)))
    summary: dict[str, Any] = {"questions": len(scored)}
    for name, of in cells.items():
        summary |= {name: of["score"], f"{name}_95": [of["low"], of["high"]]}
    return summary
