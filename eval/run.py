"""Predictions -> results.json and samples.jsonl: every question scored, with 95 % intervals."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.conversation import Conversation
from eval.predict import Prediction
from eval.stats import cluster_interval
from eval.tasks import TASKS


@dataclass(frozen=True)
class Scored:
    """One question, what was answered, and what the task's scorer says of it."""

    conversation: Conversation
    prediction: Prediction
    scores: dict[str, float]


def limit_questions(conversations: Sequence[Conversation], limit: int | None, seed: int = 0) -> list[Conversation]:
    """At most `limit` questions drawn at random by seed, in file order. Questions rather than whole contexts: those
    of one passage tend to be right or wrong together, so many passages give the narrower interval."""
    if limit is None or limit >= len(conversations):
        return list(conversations)
    return [conversations[i] for i in sorted(random.Random(seed).sample(range(len(conversations)), limit))]


def score(task: str, conversations: Sequence[Conversation], predictions: Sequence[Prediction]) -> list[Scored]:
    """Every question with its scores, each from 0 to 1. Raises ValueError where one lacks its prediction."""
    scored = []
    for c, p in zip(conversations, predictions, strict=True):
        scores = TASKS[task].score(c.answers, p.text)
        scored.append(Scored(c, p, scores if p.asked else dict.fromkeys(scores, 0.0)))
    return scored


def summarize(task: str, scored: Sequence[Scored]) -> dict[str, Any]:
    """Percentages and 95 % intervals of the task's scores, total and by answerability; counts of what went wrong."""
    parts = {"total": scored}
    if task == "squad_v2":
        parts["HasAns"] = [s for s in scored if s.conversation.answers]
        parts["NoAns"] = [s for s in scored if not s.conversation.answers]
    return {
        "task": task,
        "task_version": TASKS[task].version,
        "questions": len(scored),
        "contexts": len({s.conversation.context for s in scored}),
        "cut_at_max_new_tokens": sum(s.prediction.asked and not s.prediction.finished for s in scored),
        "too_long_for_model": sum(not s.prediction.asked for s in scored),
        "scores": {name: _summary(part) for name, part in parts.items() if part},
    }


def write_results(out: Path, results: dict[str, Any], scored: Sequence[Scored]) -> None:
    """results.json and samples.jsonl, a row a question with prompt, answer, gold answers and scores."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "samples.jsonl").open("w", encoding="utf-8") as file:
        for s in scored:
            row = {
                "id": s.conversation.id,
                "prompt": s.conversation.prompt[-1]["content"],
                "gold": list(s.conversation.answers),
                "predicted": s.prediction.text,
                "finished": s.prediction.finished,
                "asked": s.prediction.asked,
                **s.scores,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    aside = out / ".results.json.new"
    aside.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(out / "results.json")


def _summary(scored: Sequence[Scored]) -> dict[str, Any]:
    summary: dict[str, Any] = {"questions": len(scored)}
    clusters = [s.conversation.cluster for s in scored]
    for name in scored[0].scores:
        values = [s.scores[name] for s in scored]
        low, high = cluster_interval(values, clusters)
        summary[name] = round(100 * sum(values) / len(values), 2)
        summary[f"{name}_95"] = [round(100 * low, 2), round(100 * high, 2)]
    return summary
