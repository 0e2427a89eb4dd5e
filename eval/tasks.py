"""Tasks: how an answer is scored. Readers turn rows into conversations, see data/readers/source.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from data.readers.newsgroups import NEWSGROUPS
from eval.metrics import label_scores, reference_scores, squad_scores


@dataclass(frozen=True)
class Task:
    """score: gold answers, a prediction and, for SQuAD's rows, the passage -> "exact" and a second score. version:
    raised with every change of prompt, reader or scorer that could change a score."""

    version: int
    score: Callable[..., dict[str, float]]
    labels: tuple[str, ...] = ()  # of a classification


TASKS = {
    "squad_v2": Task(2, squad_scores),
    "squad_v1": Task(2, squad_scores),
    "newsgroups": Task(1, partial(label_scores, NEWSGROUPS), NEWSGROUPS),
    "instruct": Task(2, reference_scores),
}
