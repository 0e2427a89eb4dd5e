"""Scores follow the official SQuAD v2 script; intervals know that questions share passages."""

import random

import pytest

from data.chat import Conversation
from eval.metrics import normalize_answer, squad_scores, token_f1
from eval.predict import Prediction
from eval.run import limit_questions, score, write_results
from eval.stats import cluster_interval


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        (["Paris"], "paris.", 1, 1),
        (["the Eiffel Tower"], "Eiffel tower", 1, 1),
        (["in 1999", "1999"], "1999", 1, 1),
        (["Ann and Bob"], "Ann", 0, 0.5),
        (["Paris"], "London", 0, 0),
        (["Paris"], "unanswerable", 0, 0),
        (["Paris"], "", 0, 0),
        ([], "unanswerable", 1, 1),
        ([], "Unanswerable.", 1, 1),
        ([], "", 1, 1),
        ([], "the", 1, 1),  # both normalise to nothing
        ([], "Paris", 0, 0),
        (["the"], "", 1, 1),  # a gold answer that normalises to nothing is no answer
    ],
)
def test_squad_scores(gold, predicted, exact, f1):
    assert squad_scores(gold, predicted) == {"exact": exact, "f1": pytest.approx(f1)}


def test_normalisation_drops_case_punctuation_articles_and_spaces():
    assert normalize_answer("  The  U.S.   an-Apple, a day ") == "us anapple day"


def test_f1_counts_repeated_tokens():
    assert token_f1("a b b c", "b b b") == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))


def rows(n: int) -> list[Conversation]:
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "x"})
    return [Conversation(turns, str(i), f"f:{i}", ("x",) if i % 2 else (), context=f"c{i // 4}") for i in range(n)]


def test_scores_are_split_by_answerability_and_carry_intervals():
    conversations = rows(40)
    predictions = [Prediction("x" if i % 4 else "unanswerable", 1, i != 3) for i in range(40)]
    result = score("squad_v2", conversations, predictions)
    assert result["scores"]["HasAns"]["exact"] == 100
    assert result["scores"]["NoAns"]["exact"] == 50
    assert result["scores"]["total"]["exact"] == 75
    low, high = result["scores"]["total"]["exact_95"]
    assert low <= 75 <= high
    assert result["cut_at_max_new_tokens"] == 1


def test_every_question_needs_a_prediction():
    with pytest.raises(ValueError, match="shorter"):
        score("squad_v2", rows(4), [Prediction("x", 1, True)] * 3)


def test_interval_is_wider_where_questions_depend_on_their_passage():
    rng = random.Random(0)
    values, clusters = [], []
    for c in range(60):
        right = rng.random() < 0.5
        values += [float(right)] * 5
        clusters += [str(c)] * 5
    low, high = cluster_interval(values, clusters)
    alone_low, alone_high = cluster_interval(values, [str(i) for i in range(300)])
    assert high - low > 1.8 * (alone_high - alone_low)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(1)
    covered = 0
    for trial in range(200):
        values = [float(rng.random() < 0.4) for _ in range(150)]
        low, high = cluster_interval(values, [str(i) for i in range(150)], resamples=1000, seed=trial)
        covered += low <= 0.4 <= high
    assert 180 <= covered <= 199


def test_limit_draws_over_many_contexts_and_the_same_each_time():
    chosen = limit_questions(rows(400), 40)
    assert len(chosen) == 40
    assert len({c.context for c in chosen}) > 25
    assert [c.id for c in chosen] == [c.id for c in limit_questions(rows(400), 40)]
    assert [int(c.id) for c in chosen] == sorted(int(c.id) for c in chosen)
    assert [c.id for c in limit_questions(rows(8), None)] == [str(i) for i in range(8)]


def test_results_and_every_sample_are_written(tmp_path):
    import json

    conversations, predictions = rows(6), [Prediction("x", 1, True)] * 6
    write_results(tmp_path, score("squad_v2", conversations, predictions), conversations, predictions)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["id"] for s in samples] == [c.id for c in conversations]
    assert json.loads((tmp_path / "results.json").read_text())["questions"] == 6
