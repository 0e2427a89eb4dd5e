"""Scores follow the official SQuAD v2 script; intervals know that questions share passages."""

import json
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from transformers.data.metrics import squad_metrics

from data.conversation import Conversation
from eval.metrics import label_scores, normalize_answer, reference_scores, squad_scores, token_f1
from eval.prediction import Prediction
from eval.results import limit_questions, score, summarize, write_results
from eval.tasks import TASKS
from tests.helpers.comparisons import mean_interval


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


def adversarial_text(rng: random.Random, like: str = "") -> str:
    """Words that normalise to little or nothing, or a text that is nearly `like`."""
    words = ["the", "a", "an", "An", "Paris", "paris", "U.S.", "1999", "x-ray", "é", "--", "'s", "\xa0", "and", "THE."]
    chosen = like.split() if like and rng.random() < 0.5 else [rng.choice(words) for _ in range(rng.randrange(5))]
    if chosen and rng.random() < 0.5:
        chosen[rng.randrange(len(chosen))] = rng.choice(words)
    return rng.choice([" ", "  ", " , ", "\t"]).join(chosen)


def test_scores_are_those_of_the_official_script(tmp_path):
    """transformers has the functions of evaluate-v2.0.py. Total, HasAns and NoAns, in percent."""
    rng = random.Random(0)
    golds, predicted = {}, {}
    for i in range(1000):
        golds[str(i)] = [adversarial_text(rng) for _ in range(rng.choice([0, 1, 1, 3]))]
        predicted[str(i)] = adversarial_text(rng, rng.choice(golds[str(i)] or [""]))
    examples = [SimpleNamespace(qas_id=i, answers=[{"text": a} for a in g], answer_text="") for i, g in golds.items()]
    exact, f1 = squad_metrics.get_raw_scores(examples, predicted)
    for i, gold in golds.items():
        assert squad_scores(gold, predicted[i]) == {"exact": exact[i], "f1": pytest.approx(f1[i])}
    asked = [
        Conversation(({"role": "user", "content": i},), i, i, answers=tuple(g), context=i) for i, g in golds.items()
    ]

    def totals(answers: dict[str, str]) -> dict:
        return summarize("squad_v2", score("squad_v2", asked, [Prediction(answers[c.id], 1, True) for c in asked]))[
            "scores"
        ]

    scores = totals(predicted)
    has = [i for i, g in golds.items() if g]
    official = squad_metrics.make_eval_dict(exact, f1)
    of_has, of_none = (squad_metrics.make_eval_dict(exact, f1, part) for part in (has, set(golds) - set(has)))
    for part, wanted in (("total", official), ("HasAns", of_has), ("NoAns", of_none)):
        assert scores[part]["questions"] == wanted["total"]
        assert [scores[part][m] for m in ("exact", "f1")] == [round(wanted[m], 2) for m in ("exact", "f1")]
    assert totals({i: (g or [""])[0] for i, g in golds.items()})["NoAns"]["exact"] == 100
    best = {i: next((a for a in g if normalize_answer(a)), "") for i, g in golds.items()}
    assert totals(best)["total"]["exact"] == totals(best)["total"]["f1"] == 100
    unanswerable = sum(not any(normalize_answer(a) for a in g) for g in golds.values())
    assert totals(dict.fromkeys(golds, ""))["total"]["exact"] == round(unanswerable / 10, 2)


def test_normalisation_drops_case_punctuation_articles_and_spaces():
    assert normalize_answer("  The  U.S.   an-Apple, a day ") == "us anapple day"


def test_f1_counts_repeated_tokens():
    assert token_f1("a b b c", "b b b") == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))


LABELS = ("comp.graphics", "misc.forsale", "C", "C++")


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "valid"),
    [
        ("misc.forsale", "misc.forsale", 1, 1),
        ("misc.forsale", ' "Misc.Forsale".\n', 1, 1),
        ("misc.forsale", "**misc.forsale**", 1, 1),
        ("misc.forsale", "comp.graphics", 0, 1),
        ("misc.forsale", "It is misc.forsale", 0, 0),
        ("misc.forsale", "forsale", 0, 0),
        ("misc.forsale", "", 0, 0),
        ("C++", "c++.", 1, 1),
        ("C++", "C", 0, 1),
    ],
)
def test_label_scores(gold, predicted, exact, valid):
    assert label_scores(LABELS, [gold], predicted) == {"exact": exact, "valid": valid}


def rows(n: int) -> list[Conversation]:
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "x"})
    return [Conversation(turns, str(i), f"f:{i}", ("x",) if i % 2 else (), context=f"c{i // 4}") for i in range(n)]


def test_scores_are_split_by_answerability_and_carry_intervals():
    conversations = rows(40)
    predictions = [Prediction("x" if i % 4 else "unanswerable", 1, i != 3) for i in range(40)]
    result = summarize("squad_v2", score("squad_v2", conversations, predictions))
    assert result["scores"]["HasAns"]["exact"] == 100
    assert result["scores"]["NoAns"]["exact"] == 50
    assert result["scores"]["total"]["exact"] == 75
    low, high = result["scores"]["total"]["exact_95"]
    assert low <= 75 <= high
    assert result["cut_at_max_new_tokens"] == 1


def test_any_score_of_a_task_gets_its_interval(monkeypatch):
    monkeypatch.setitem(TASKS, "labels", replace(TASKS["instruct"], score=partial(label_scores, ["x", "y"])))
    conversations = [Conversation(c.messages, c.id, c.where, ("x",), c.context) for c in rows(40)]
    predictions = [Prediction("xyz?"[i % 4], 1, True) for i in range(40)]
    total = summarize("labels", score("labels", conversations, predictions))["scores"]
    assert total == {
        "total": {"questions": 40, "exact": 25, "exact_95": [25, 25], "valid": 50, "valid_95": [50, 50]},
    }


def test_intervals_resample_groups_if_rows_have_one():
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "x"})
    alone = [Conversation(turns, str(i), f"f:{i}", ("x",), context=f"c{i}") for i in range(200)]
    threads = [replace(c, group=f"thread {i // 10}") for i, c in enumerate(alone)]
    predictions = [Prediction("x" if i // 10 % 2 else "y", 1, True) for i in range(200)]
    (low, high), (thread_low, thread_high) = (
        summarize("squad_v2", score("squad_v2", c, predictions))["scores"]["total"]["exact_95"]
        for c in (alone, threads)
    )
    assert thread_high - thread_low > 1.8 * (high - low)


def test_every_question_needs_a_prediction():
    with pytest.raises(ValueError, match="shorter"):
        score("squad_v2", rows(4), [Prediction("x", 1, True)] * 3)


def test_interval_is_wider_if_questions_depend_on_their_passage():
    rng = random.Random(0)
    values, clusters = [], []
    for c in range(60):
        right = rng.random() < 0.5
        values += [float(right)] * 5
        clusters += [str(c)] * 5
    low, high = mean_interval(values, clusters)
    alone_low, alone_high = mean_interval(values, [str(i) for i in range(300)])
    assert high - low > 1.8 * (alone_high - alone_low)


def test_interval_is_that_of_all_draws_at_once():
    rng = random.Random(0)
    values = [rng.random() for _ in range(3000)]
    clusters = [str(rng.randrange(1500)) for _ in values]
    names, index = np.unique(clusters, return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=2000)
    means = (draws @ np.bincount(index, weights=values)) / (draws @ np.bincount(index))
    assert mean_interval(values, clusters, 2000) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(1)
    covered = 0
    for trial in range(200):
        values = [float(rng.random() < 0.4) for _ in range(150)]
        low, high = mean_interval(values, [str(i) for i in range(150)], 1000, trial)
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
    conversations, predictions = rows(6), [Prediction("x", 1, True)] * 6
    scored = score("squad_v2", conversations, predictions)
    write_results(tmp_path, summarize("squad_v2", scored), scored)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["id"] for s in samples] == [c.id for c in conversations]
    assert [(s["exact"], s["f1"]) for s in samples] == [(float(i % 2), float(i % 2)) for i in range(6)]
    assert json.loads((tmp_path / "results.json").read_text())["questions"] == 6


def test_unanswerable_question_among_instructions_is_scored_as_squad_does():
    assert reference_scores((), "unanswerable") == {"exact": 1.0, "f1": 1.0}
    assert reference_scores((), "Paris") == {"exact": 0.0, "f1": 0.0}
