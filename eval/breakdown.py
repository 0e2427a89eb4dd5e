"""Parts of a score: by label, by probability, by kind of question; and the questions on which two systems differ."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.metrics import OTHER, gold_label, normalize_answer, predicted_labels, script_of
from eval.stats import brier, expected_calibration_error, reliability_bins, wilson_interval

Row = Mapping[str, Any]  # of samples.jsonl
Record = dict[str, Any]  # of compare.json or results.json

BINS = 10  # of equal width from 0 to 1
EXAMPLES = 20
PROMPT_TAIL = 600  # characters of a prompt that are shown; its question is at the end
QUESTION_WORD = re.compile(r"\b(who|what|when|where|which|why|how)(?:m|se)?\b", re.IGNORECASE)
QUESTION_WORDS = ("who", "what", "when", "where", "which", "why", "how", "other")
LENGTHS = ("0", "1", "2", "3-5", "6+")  # words of the first gold answer; 0: unanswerable


def scores_per_label(rows: Sequence[Row], labels: Sequence[str]) -> Record | None:
    """Precision, recall and F1 of each label in percent, and the confusion matrix [labels, labels + OTHER], gold by
    predicted; None without labels."""
    if not labels:
        return None
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    gold, predicted = [gold_label(row) for row in rows], predicted_labels(rows, labels)
    columns = precision_recall_fscore_support(gold, predicted, labels=labels, zero_division=0)
    table = []
    for label, *shares, n in zip(labels, *(column.tolist() for column in columns), strict=True):
        precision, recall, f1 = (round(100 * share, 2) for share in shares)
        table.append({"label": label, "questions": n, "precision": precision, "recall": recall, "f1": f1})
    counts = confusion_matrix(gold, predicted, labels=[*labels, OTHER])[: len(labels)]
    return {"table": table, "confusion": counts.tolist()}


def plot_confusion(classes: Record, path: Path) -> None:
    """Writes a PNG. Rows: gold labels, coloured by share of the row. Columns: answers, the last one no label at all."""
    import numpy as np
    from matplotlib.figure import Figure

    labels, counts = [row["label"] for row in classes["table"]], np.array(classes["confusion"])
    size = 2.5 + 0.38 * len(labels)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts / counts.sum(1, keepdims=True), cmap="Greens", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels) + 1), [*labels, "no such label"], rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="answered", ylabel="gold")
    for (row, column), n in np.ndenumerate(counts):
        if n:
            dark = n > counts[row].sum() / 2
            axes.text(column, row, str(n), ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.savefig(path, dpi=120, format="png")


def calibration(rows: Sequence[Row]) -> Record | None:
    """ECE, Brier score and the bins of a reliability diagram; None if no answer has a probability."""
    known = [(row["probability"], row["exact"]) for row in rows if row.get("probability") is not None]
    if not known:
        return None
    probabilities, correct = zip(*known, strict=True)
    bins = []
    for i, (n, probability, right) in enumerate(reliability_bins(probabilities, correct, BINS)):
        row: Record = {"low": i / BINS, "high": (i + 1) / BINS, "questions": n, "probability": None, "correct": None}
        if n:
            row |= {"probability": round(probability, 4), "correct": round(right, 4)}
            row["correct_95"] = [round(end, 4) for end in wilson_interval(round(n * right), n)]
        bins.append(row)
    ece = round(expected_calibration_error(probabilities, correct, BINS), 4)
    return {"questions": len(known), "ece": ece, "brier": round(brier(probabilities, correct), 4), "bins": bins}


def question_kinds(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[int]]]:
    """Each division of the questions, each of its kinds that occurs, and the indices of that kind's rows."""
    for by, kinds, kind_of_row in (
        ("answer length", LENGTHS, [answer_length(row["gold"], script_of((), "", row["prompt"])) for row in rows]),
        ("question word", QUESTION_WORDS, [question_word(row["question"]) for row in rows]),
    ):
        for kind in kinds:
            if indices := [i for i, own in enumerate(kind_of_row) if own == kind]:
                yield by, kind, indices


def answer_length(gold: Sequence[str], script: str = "") -> str:
    """Words of the first gold answer, or characters if the prompt's script has no spaces between words."""
    words = max(1, len((normalize_answer(gold[0], script) if script else gold[0]).split())) if gold else 0
    return str(words) if words < 3 else "3-5" if words < 6 else "6+"


def question_word(question: str) -> str:
    word = QUESTION_WORD.search(question)
    return word[1].lower() if word else "other"


def discordant_examples(a: str, b: str, rows: Mapping[str, Sequence[Row]], seed: int) -> list[Record]:
    """Up to EXAMPLES questions that one of the systems a and b has right and the other wrong, half of them each way if
    there are enough; drawn by seed. rows: those of each system by its name."""
    gaps = [x["exact"] - y["exact"] for x, y in zip(rows[a], rows[b], strict=True)]
    only_a, only_b = [i for i, gap in enumerate(gaps) if gap > 0], [i for i, gap in enumerate(gaps) if gap < 0]
    rng = random.Random(seed)
    examples = []
    for right, wrong, indices, others in ((a, b, only_a, only_b), (b, a, only_b, only_a)):
        most = max(EXAMPLES // 2, EXAMPLES - len(others))
        for i in sorted(rng.sample(indices, min(most, len(indices)))):
            row = rows[right][i]
            cut = max(0, len(row["prompt"]) - PROMPT_TAIL)
            examples.append({
                "id": row["id"], "right": right, "wrong": wrong, "prompt_tail": row["prompt"][cut:],
                "characters_cut": cut, "gold": row["gold"], "right_answer": row["predicted"],
                "wrong_answer": rows[wrong][i]["predicted"],
            })  # fmt: skip
    return examples
