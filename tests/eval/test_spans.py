"""Logits become exact quotes, and the threshold for no answer is the best possible one."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset

from data.conversation import DataError
from data.encode.qa_windows import make_windows
from data.readers.squad import UNANSWERABLE
from eval.metrics import squad_scores
from eval.spans import SpanAnswer, best_spans, choose, tune_threshold
from tests.helpers.builders import read_squad
from tests.helpers.places import REAL_DATA, needs_real
from tests.helpers.qa import ask, bert_tokenizer, roberta_tokenizer


def one_hot(windows: Dataset) -> tuple[list[np.ndarray], ...]:
    """Logits of a model that is sure of the gold tokens."""
    return tuple(
        [10.0 * (np.arange(len(ids)) == gold) for ids, gold in zip(windows["input_ids"], windows[name], strict=True)]
        for name in ("start_positions", "end_positions")
    )


def random_logits(windows: Dataset, seed: int = 0) -> tuple[list[np.ndarray], ...]:
    rng = np.random.default_rng(seed)
    return tuple([rng.normal(size=len(ids)).astype(np.float32) for ids in windows["input_ids"]] for _ in range(2))


def perfect_score(conversations, windows) -> float:
    answers = best_spans(windows, *one_hot(windows), conversations)
    texts = choose(answers, 0.0)
    assert all(t == UNANSWERABLE or t in c.context for t, c in zip(texts, conversations, strict=True))
    scores = [squad_scores(c.answers, t)["exact"] for c, t in zip(conversations, texts, strict=True)]
    return 100 * sum(scores) / len(scores)


@pytest.mark.parametrize("settings", [(384, 128, 64), (80, 20, 24)])
def test_perfect_logits_score_100_on_the_samples(questions, settings):
    assert perfect_score(questions, make_windows(questions, bert_tokenizer(), *settings)) > 98


@needs_real("squad_v2/dev.json.gz")
def test_perfect_logits_score_100_on_real_data():
    conversations = read_squad(REAL_DATA / "squad_v2" / "dev.json.gz")[:3000]
    assert perfect_score(conversations, make_windows(conversations, bert_tokenizer())) > 99.3


def brute_force(windows, starts, ends, conversation: int, max_answer_length: int) -> tuple[float, int, int]:
    """The best span of a conversation, from rows."""
    found = []
    for i, row in enumerate(windows):
        if row["conversation"] == conversation:
            for s in range(row["core_start"], row["core_end"]):
                for e in range(s, min(s + max_answer_length, len(row["input_ids"]))):
                    if row["char_starts"][e] >= 0:
                        score = float(starts[i][s]) + float(ends[i][e])
                        found.append((score, row["char_starts"][s], row["char_ends"][e]))
    return max(found)


@pytest.mark.parametrize("max_answer_length", [1, 4, 30])
def test_best_span_is_that_of_brute_force(questions, max_answer_length):
    chosen = questions[:6]
    windows = make_windows(chosen, bert_tokenizer(), 80, 20, 24)
    logits = random_logits(windows)
    answers = best_spans(windows, *logits, chosen, max_answer_length=max_answer_length)
    for i, (c, answer) in enumerate(zip(chosen, answers, strict=True)):
        score, start, end = brute_force(windows, *logits, i, max_answer_length)
        assert answer.score == pytest.approx(score)
        assert answer.text == c.context[start:end]
        of_question = np.flatnonzero(np.array(windows["conversation"]) == i)
        assert answer.null_score == pytest.approx(
            min(float(logits[0][w][0]) + float(logits[1][w][0]) for w in of_question)
        )
        assert answer.null_difference == pytest.approx(answer.null_score - answer.score)


def test_n_best_is_a_softmax_over_distinct_texts_and_no_answer(questions):
    chosen = questions[:6]
    windows = make_windows(chosen, bert_tokenizer(), 80, 20, 24)
    for n_best in (1, 5, 20):
        for answer in best_spans(windows, *random_logits(windows), chosen, n_best=n_best):
            texts, shares = zip(*answer.n_best, strict=True)
            assert len(set(texts)) == len(texts) <= n_best + 1
            assert sum(shares) == pytest.approx(1)
            assert list(shares) == sorted(shares, reverse=True)
            assert dict(answer.n_best)[answer.text] == answer.probability
            assert dict(answer.n_best)[""] == answer.null_probability
            assert answer.probability / answer.null_probability == pytest.approx(math.exp(-answer.null_difference))


def test_logits_of_a_padded_batch_give_the_same_answers(questions):
    windows = make_windows(questions, bert_tokenizer())
    starts, ends = random_logits(windows)
    padded = [np.full((len(windows), 400), 99.0, np.float32) for _ in range(2)]
    for whole, rows in zip(padded, (starts, ends), strict=True):
        for i, row in enumerate(rows):
            whole[i, : len(row)] = row
    assert best_spans(windows, *padded, questions) == best_spans(windows, starts, ends, questions)


def test_text_is_the_contexts_own_without_the_space_of_a_byte_level_token():
    c = ask("The  Old\u00a0Town of Zürich, 1999.", answer="Old\u00a0Town of Zürich")
    for tokenizer in (bert_tokenizer(), roberta_tokenizer(), roberta_tokenizer(False)):
        windows = make_windows([c], tokenizer)
        assert choose(best_spans(windows, *one_hot(windows), [c])) == ["Old\u00a0Town of Zürich"]


def test_passage_without_tokens_has_no_answer():
    conversations = [ask("\u200b"), ask("A cat sat.", answer="cat")]
    windows = make_windows(conversations, bert_tokenizer())
    nothing, cat = best_spans(windows, *one_hot(windows), conversations)
    assert (nothing.text, nothing.score, nothing.null_difference) == ("", -math.inf, math.inf)
    assert nothing.n_best == [("", 1.0)]
    assert choose([nothing, cat], math.inf) == [UNANSWERABLE, "cat"]


def test_threshold_and_version_1_decide_on_no_answer():
    answer = SpanAnswer("cat", 2.0, 3.0, 1.0, 0.2, 0.8, [("", 0.8), ("cat", 0.2)])
    assert choose([answer], 0.9) == [UNANSWERABLE]
    assert choose([answer], 1.0) == ["cat"]
    assert choose([answer], -math.inf, allow_null=False) == ["cat"]


def test_logits_that_are_not_finite_or_of_other_windows_are_refused(questions):
    windows = make_windows(questions, bert_tokenizer())
    starts, ends = random_logits(windows)
    with pytest.raises(ValueError, match="95 and 96 rows .* 96 windows"):
        best_spans(windows, starts[1:], ends, questions)
    with pytest.raises(ValueError, match="logits for the"):
        best_spans(windows, [starts[0][:-1], *starts[1:]], ends, questions)
    ends[3][5] = np.nan
    with pytest.raises(DataError, match="not finite; .* float32"):
        best_spans(windows, starts, ends, questions)


def mean_score(threshold, differences, spanned, nulled) -> float:
    taken = [n if d > threshold else s for d, s, n in zip(differences, spanned, nulled, strict=True)]
    return sum(taken) / len(taken)


@pytest.mark.parametrize("seed", range(200))
def test_threshold_is_that_of_brute_force(seed):
    rng = random.Random(seed)
    n = rng.randint(1, 40)
    differences = [rng.choice([rng.gauss(rng.choice([-6, 0, 6]), 3), rng.randint(-2, 2)]) for _ in range(n)]
    answerable = [rng.random() < 0.5 for _ in range(n)]
    spanned = [rng.choice([0.0, 1.0, 0.4]) if a else 0.0 for a in answerable]
    nulled = [0.0 if a else 1.0 for a in answerable]
    threshold, score = tune_threshold(differences, spanned, nulled)
    assert mean_score(threshold, differences, spanned, nulled) == pytest.approx(score)
    if all(answerable):
        assert threshold == math.inf
        return
    candidates = {0.0, *differences, *(math.nextafter(d, -math.inf) for d in differences), 99.0, -99.0}
    by_score = {t: mean_score(t, differences, spanned, nulled) for t in candidates}
    assert score == pytest.approx(max(by_score.values()))
    assert abs(threshold) == min(abs(t) for t, s in by_score.items() if s > score - 1e-9)


def test_threshold_of_questions_without_spans_or_of_none():
    assert tune_threshold([math.inf, -1.0, 2.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]) == (0.0, 1.0)
    assert tune_threshold([math.inf], [0.0], [1.0]) == (0.0, 1.0)
    for wrong in ([], [math.nan]):
        with pytest.raises(ValueError, match=f"{len(wrong)} differences, .* NaN"):
            tune_threshold(wrong, [1.0] * len(wrong), [0.0] * len(wrong))


def test_threshold_tuned_on_spans_beats_always_and_never(questions):
    windows = make_windows(questions, bert_tokenizer())
    answers = best_spans(windows, *random_logits(windows), questions)
    answers = [
        replace(a, null_difference=a.null_difference - 5 * bool(c.answers))
        for a, c in zip(answers, questions, strict=True)
    ]
    spanned = [squad_scores(c.answers, a.text)["f1"] for a, c in zip(answers, questions, strict=True)]
    nulled = [squad_scores(c.answers, "")["f1"] for c in questions]
    threshold, score = tune_threshold([a.null_difference for a in answers], spanned, nulled)
    texts = choose(answers, threshold)
    scored = [squad_scores(c.answers, t)["f1"] for c, t in zip(questions, texts, strict=True)]
    assert np.mean(scored) == pytest.approx(score)
    assert score >= max(np.mean(spanned), np.mean(nulled))
