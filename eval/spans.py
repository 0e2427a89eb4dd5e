"""Logits of a span model over windows -> answers, and the threshold above which a question has no answer.

The rules are those of google-research/bert's run_squad.py, but texts are exact quotes, not joined tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from scipy.special import softmax

from data.conversation import Conversation, DataError
from data.encode.qa_windows import NO_PASSAGE
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
    windows: Dataset,
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
    null_scores = [math.inf] * len(conversations)
    places = windows.select_columns(["conversation", "char_starts", "char_ends", "core_start", "core_end"])
    for row, start, end in zip(places, start_logits, end_logits, strict=True):
        index, first, length = row["conversation"], row["core_start"], len(row["char_ends"])
        starts, ends = np.asarray(start, np.float64)[:length], np.asarray(end, np.float64)[:length]
        if len(starts) != length or len(ends) != length:
            raise ValueError(f"{len(starts)} and {len(ends)} logits for the {length} tokens of a window")
        if not (np.isfinite(starts).all() and np.isfinite(ends).all()):
            remedy = "evaluate it in float32, or train it with a lower learning rate"
            raise DataError(conversations[index].where, f"the model's logits are not finite; {remedy}", "logits")
        null_scores[index] = min(null_scores[index], float(starts[0] + ends[0]))
        ends = np.where(np.array(row["char_ends"]) == NO_PASSAGE, -np.inf, ends)
        best = _best(starts[first : row["core_end"]], ends[first:], n_best, max_answer_length)
        candidates[index] += [(s, row["char_starts"][first + i], row["char_ends"][first + j]) for s, i, j in best]
    return [
        _answer(conversation.context, sorted(spans, key=lambda s: -s[0]), score, n_best)
        for conversation, spans, score in zip(conversations, candidates, null_scores, strict=True)
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
    gains = np.concatenate(([0.0], np.cumsum((spanned - nulled)[order])))  # of the first N getting their span
    # the score only changes at a difference: each threshold is as good as one of these that is not farther from 0
    thresholds = np.concatenate(([0.0], given, np.nextafter(given, -np.inf)))
    thresholds = np.unique(thresholds[np.isfinite(thresholds)])  # a question without a span has an infinite difference
    totals = nulled.sum() + gains[np.searchsorted(given[order], thresholds, side="right")]
    best = thresholds[totals >= totals.max() - 1e-9]
    return float(min(best, key=abs)), float(totals.max() / len(given))


def _best(
    starts: np.ndarray, ends: np.ndarray, n_best: int, max_answer_length: int
) -> Iterator[tuple[float, int, int]]:
    """Scores, first and last tokens of the n_best best spans that begin at one of `starts` and end at one of `ends`,
    which begin at the same token; not in order. All spans compete, not those of the best starts and ends only."""
    if not len(starts):
        return iter(())
    padded = np.full(len(starts) + max_answer_length - 1, -np.inf)
    padded[: len(ends)] = ends[: len(padded)]
    sums = (starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, max_answer_length)).ravel()
    chosen = np.argpartition(-sums, n_best - 1)[:n_best] if n_best < len(sums) else np.arange(len(sums))
    chosen = chosen[np.isfinite(sums[chosen])]
    first, length = np.divmod(chosen, max_answer_length)
    return zip(sums[chosen].tolist(), first.tolist(), (first + length).tolist(), strict=True)


def _answer(context: str, spans: Sequence[Candidate], null_score: float, n_best: int) -> SpanAnswer:
    """The answer of a question. spans: best first."""
    scores: dict[str, float] = {}
    for score, start, end in spans:
        text = context[start:end].strip()  # a byte-level token includes the space before its word
        if text and len(scores) < n_best:
            scores.setdefault(text, score)
    text, score = next(iter(scores.items()), ("", -math.inf))
    ranked = dict(sorted({**scores, "": null_score}.items(), key=lambda pair: -pair[1]))
    shares = dict(zip(ranked, softmax([*ranked.values()]).tolist(), strict=True))
    return SpanAnswer(
        text=text,
        score=score,
        null_score=null_score,
        null_difference=null_score - score,
        probability=shares[text] if text else 0.0,
        null_probability=shares[""],
        n_best=list(shares.items()),
    )
