"""Scores of one answer. SQuAD's equal those of the official evaluate-v2.0.py."""

import re
import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from data.readers.squad import UNANSWERABLE

OTHER = ""  # a predicted text that is no label of any question
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = set(string.punctuation)
# quotes, emphasis and sentence marks that models put around a label; not all punctuation: C++ is not C
_AROUND_LABELS = string.whitespace + ".,;:!?*`'\"“”‘’«»()[]"


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(gold: str, predicted: str) -> float:
    return float(normalize_answer(gold) == normalize_answer(predicted))


def token_f1(gold: str, predicted: str) -> float:
    """F1 of the bags of normalised tokens; if either is empty, 1 if both are, else 0."""
    gold_tokens, predicted_tokens = normalize_answer(gold).split(), normalize_answer(predicted).split()
    common = sum((Counter(gold_tokens) & Counter(predicted_tokens)).values())
    if not gold_tokens or not predicted_tokens:
        return float(gold_tokens == predicted_tokens)
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted_tokens), common / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)


def squad_scores(answers: Sequence[str], predicted: str) -> dict[str, float]:
    """Best EM and F1 over the gold answers. If normalisation leaves no gold answer, the right one is empty.

    A predicted `unanswerable` counts as the empty answer.
    """
    if normalize_answer(predicted) == UNANSWERABLE:
        predicted = ""
    gold = [a for a in answers if normalize_answer(a)] or [""]
    return _best(gold, predicted)


def reference_scores(answers: Sequence[str], predicted: str) -> dict[str, float]:
    """Best EM and F1 over the reference answers of instruction data; without any (SQuAD rows), SQuAD's scores."""
    return _best(answers, predicted) if answers else squad_scores(answers, predicted)


def _best(gold: Sequence[str], predicted: str) -> dict[str, float]:
    return {"exact": max(exact_match(a, predicted) for a in gold), "f1": max(token_f1(a, predicted) for a in gold)}


def normalize_label(text: str) -> str:
    """The label in lower case, without quotes and sentence marks around it."""
    return text.strip(_AROUND_LABELS).casefold()


def gold_label(row: Mapping[str, Any]) -> str:
    return str(row["label"] or (row["gold"] or [""])[0])


def predicted_labels(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[str]:
    """The predicted one of `labels` for each row, or OTHER."""
    known = {normalize_label(label): label for label in labels}
    return [known.get(normalize_label(row["predicted"]), OTHER) if row["asked"] else OTHER for row in rows]


def label_counts(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> np.ndarray:
    """The counts that `macro_f1` sums, [rows, 3 labels]: whether each label is hit, gold, predicted."""
    names = np.array(labels)
    gold = np.array([gold_label(row) for row in rows])[:, None] == names
    predicted = np.array(predicted_labels(rows, labels))[:, None] == names
    return np.hstack([gold & predicted, gold, predicted]).astype(float)


def label_scores(labels: Collection[str], answers: Sequence[str], predicted: str) -> dict[str, float]:
    """Scores of a classification: whether the answer is the gold label (accuracy), and whether it is a label at all."""
    label = normalize_label(predicted)
    return {
        "exact": float(label in map(normalize_label, answers)),
        "valid": float(label in map(normalize_label, labels)),
    }
