"""Logits of a span model over windows -> answers, and the threshold above which a question has no answer.

The rules are those of google-research/bert's run_squad.py, but texts are exact quotes , not joined tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from data.conversation import Conversation, DataError
from data.encode.qa_windows import Windows
from data.readers.squad import UNANSWERABLE

Candidate = tuple[float, int, int]  # score, first character in the context, and one past the last


@dataclass(frozen=True)
class SpanAnswer:
    """The best span of a question. Scores are sums of a start and an end logit.

    text: the quote; empty, with score -inf, if no token can begin one. null_score: the score of [CLS], the lowest over
    the question's windows. null_difference: null_score - score; above a threshold, the question has no answer.
    n_best: texts, best first, "" for no answer, with their softmax probabilities. probability, null_probability: those
    of text and of "".
    """

    text: str
    score: float
    null_score: float
    null_difference: float
    probability: float
    null_probability: float
    n_best: list[tuple[str, float]]


def best_spans(
    windows: Windows,
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    conversations: Sequence[Conversation],
    n_best: int = 20,
    max_answer_length: int = 30,
) -> list[SpanAnswer]:
    """An answer for each conversation, in order. Logits: an array for each window, as long as its row or longer
    (padded); max_answer_length: in tokens.

    A span begins only at a token that has its max context in the window, so it is found in one window. Of equal texts
    the best counts, so n_best may hold fewer texts. Raises DataError for logits that are not finite.
    """
    if not len(start_logits) == len(end_logits) == len(windows):
        raise ValueError(f"{len(start_logits)} and {len(end_logits)} rows of logits for {len(windows)} windows")
    candidates: list[list[Candidate]] = [[] for _ in conversations]
    null = [math.inf] * len(conversations)
    rows = zip(windows.conversation.tolist(), windows.lengths.tolist(), start_logits, end_logits, strict=True)
    places = _places(windows)
    for (index, length, start, end), (at, begin, shown, low, high) in zip(rows, places, strict=True):
        starts, ends = np.asarray(start, np.float64)[:length], np.asarray(end, np.float64)[:length]
        if len(starts) != length or len(ends) != length:
            raise ValueError(f"{len(starts)} and {len(ends)} logits for the {length} tokens of a window")
        if not (np.isfinite(starts).all() and np.isfinite(ends).all()):
            problem = "logits are not finite; evaluate it in float32, or train the model with a lower learning rate"
            raise DataError(conversations[index].where, problem, "logits")
        null[index] = min(null[index], float(starts[0] + ends[0]))
        scores, first, last = _best(
            starts[at + low : at + high], ends[at + low : at + shown], n_best, max_answer_length
        )
        offsets = windows.passage_offsets[begin : begin + shown]
        spans = zip(scores.tolist(), offsets[first + low, 0].tolist(), offsets[last + low, 1].tolist(), strict=True)
        candidates[index] += spans
    return [
        _answer(conversation.context, sorted(spans, key=lambda s: -s[0]), score, n_best)
        for conversation, spans, score in zip(conversations, candidates, null, strict=True)
    ]


def choose(answers: Sequence[SpanAnswer], threshold: float = 0.0, allow_null: bool = True) -> list[str]:
    """Texts to score. With allow_null: UNANSWERABLE without a span, or if null_difference exceeds the threshold."""
    return [
        UNANSWERABLE if allow_null and (not answer.text or answer.null_difference > threshold) else answer.text
        for answer in answers
    ]


def tune_threshold(
    differences: Sequence[float], answer_scores: Sequence[float], null_scores: Sequence[float]
) -> tuple[float, float]:
    """The threshold on null_difference with the highest mean score, and that score; of equal ones the nearest to 0.

    answer_scores, null_scores: EM or F1 of each question if it gets its span, and if it gets no answer. If no question
    scores without an answer, as in version 1, the threshold is inf. Tune it on questions that are not reported:
    otherwise the score is an upper bound, as best_exact of SQuAD's evaluate-v2.0.py is.
    """
    given, spanned, nulled = (np.asarray(each, np.float64) for each in (differences, answer_scores, null_scores))
    if not len(given) or not len(given) == len(spanned) == len(nulled) or np.isnan(given).any():
        sizes = f"{len(given)} differences, {len(spanned)} and {len(nulled)} scores"
        raise ValueError(f"{sizes}; give one of each for every question, none of them NaN")
    if not nulled.any():
        return math.inf, float(spanned.mean())
    order = np.argsort(given, kind="stable")
    gains = np.concatenate(([0.0], np.cumsum((spanned - nulled)[order])))
    # totals[i]: score if the questions with the i lowest distinct differences get their span, the others no answer
    values, counts = np.unique(given[order], return_counts=True)
    totals = gains[np.concatenate(([0], np.cumsum(counts)))] + nulled.sum()
    # choice i holds for thresholds from bounds[i] to just below bounds[i + 1]
    bounds = np.concatenate(([-math.inf], values, [math.inf]))
    totals[bounds[:-1] == bounds[1:]] = -math.inf  # an infinite difference leaves no such threshold
    best = np.flatnonzero(totals >= totals.max() - 1e-9)
    choices = [_nearest_0(bounds[i], bounds[i + 1]) for i in best]
    return min(choices, key=abs), float(totals.max() / len(given))


def _nearest_0(low: float, beyond: float) -> float:
    """The number nearest to 0 from `low` to just below `beyond`."""
    if low > 0:
        return float(low)
    return 0.0 if beyond > 0 else float(np.nextafter(beyond, -math.inf))


def _places(windows: Windows) -> list[list[int]]:
    """For each window: position of its first passage token in the row, the token's index among those of all passages,
    passage tokens in the window, and the first and one past the last of them that may begin an answer."""
    begin = windows.passage_rows[windows.passage] + windows.first
    core = windows.core - np.asarray(windows.first)[:, None]
    return np.stack((windows.passage_at, begin, windows.length, *core.T), axis=1).tolist()


def _best(
    starts: np.ndarray, ends: np.ndarray, n_best: int, max_answer_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, first and last tokens of the n_best best spans, not in order. starts and ends: logits from the same token
    on. All spans are candidates, not only those of the best starts and ends."""
    if not len(starts):
        return np.zeros(0), np.zeros(0, int), np.zeros(0, int)
    padded = np.full(len(starts) + max_answer_length - 1, -np.inf)
    padded[: len(ends)] = ends[: len(padded)]
    sums = (starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, max_answer_length)).ravel()
    chosen = np.argpartition(-sums, n_best - 1)[:n_best] if n_best < len(sums) else np.arange(len(sums))
    chosen = chosen[np.isfinite(sums[chosen])]
    first = chosen // max_answer_length
    return sums[chosen], first, first + chosen % max_answer_length


def _answer(context: str, spans: Sequence[Candidate], null_score: float, n_best: int) -> SpanAnswer:
    """The answer of a question. spans: best first."""
    scores: dict[str, float] = {}
    for score, start, end in spans:
        text = context[start:end].strip()  # a byte-level token includes the space before its word
        if text and len(scores) < n_best:
            scores.setdefault(text, score)
    text, score = next(iter(scores.items()), ("", -math.inf))
    ranked = sorted([*scores.items(), ("", null_score)], key=lambda pair: -pair[1])
    texts, values = zip(*ranked, strict=True)
    shares = dict(zip(texts, softmax(values).tolist(), strict=True))
    return SpanAnswer(
        text=text,
        score=score,
        null_score=null_score,
        null_difference=null_score - score,
        probability=shares[text] if text else 0.0,
        null_probability=shares[""],
        n_best=list(shares.items()),
    )
