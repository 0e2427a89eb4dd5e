"""Which labels a classifier gets right, and what it takes them for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.metrics import OTHER, gold_label, predicted_labels

Found = dict[str, Any]


def classes(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Found | None:
    """Precision, recall and F1 of each label in percent, and counts [labels, labels + OTHER], gold by predicted; None
    without labels."""
    if not labels:
        return None
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    gold, predicted = [gold_label(row) for row in rows], predicted_labels(rows, labels)
    each = precision_recall_fscore_support(gold, predicted, labels=labels, zero_division=0)
    table = []
    for label, *shares, n in zip(labels, *(part.tolist() for part in each), strict=True):
        percent = {key: round(100 * s, 2) for key, s in zip(("precision", "recall", "f1"), shares, strict=True)}
        table.append({"label": label, "questions": n, **percent})
    counts = confusion_matrix(gold, predicted, labels=[*labels, OTHER])[: len(labels)]
    return {"table": table, "confusion": counts.tolist()}


def plot_confusion(found: Found, path: Path) -> None:
    """Rows: gold labels, each as shares of its questions. Columns: answered, the last one no label at all."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    labels, counts = [row["label"] for row in found["table"]], np.array(found["confusion"])
    size = 2.5 + 0.38 * len(labels)
    figure, axes = pyplot.subplots(figsize=(size, size), layout="constrained")
    axes.imshow(counts / counts.sum(1, keepdims=True), cmap="Greens", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels) + 1), [*labels, "no such label"], rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="answered", ylabel="gold")
    for (row, column), n in np.ndenumerate(counts):
        if n:
            dark = n > counts[row].sum() / 2
            axes.text(column, row, str(n), ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
