"""ROUGE-L, chrF, numbers, JSON and regular expressions: scores of instruction data that a recipe chooses."""

import json
import random
import re

import pytest

from data.conversation import Conversation
from eval.metrics import FURTHER, TITLES, further_metrics
from eval.prediction import Prediction
from eval.results import score, summarize


def scored(name: str, answers: list[str], predicted: str, pattern: str | None = None) -> float:
    return further_metrics([name], pattern)[name](answers, predicted)


def subsequence(a: list[str], b: list[str]) -> int:
    """The textbook table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(300):
        gold, words = ([rng.choice("bcdefg") for _ in range(rng.randint(1, 90))] for _ in range(2))
        wanted = 2 * subsequence(gold, words) / (len(gold) + len(words))
        assert scored("rouge_l", [" ".join(gold)], " ".join(words)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("answers", "predicted", "value"),
    [
        (["The cat sat."], "a cat SAT", 1),  # the tokens of F1: no case, marks and articles
        (["cat sat"], "sat cat", 0.5),  # order counts
        (["dog", "cat sat"], "cat", 2 / 3),  # the best reference
        (["天气很好。"], "天气好", 6 / 7),
        (["x"], "", 0),
        (["。"], "", 1),
    ],
)
def test_rouge_l(answers, predicted, value):
    assert scored("rouge_l", answers, predicted) == pytest.approx(value)


def test_chrf_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = random.Random(0)
    for _ in range(50):
        answers = ["".join(rng.choices("abc dé天气。", k=rng.randint(1, 30))) for _ in range(2)]
        predicted = "".join(rng.choices("abc dé天气。", k=rng.randint(0, 30)))
        assert scored("chrf", answers, predicted) == sacrebleu.sentence_chrf(predicted, answers).score / 100
    assert scored("chrf", ["天气很好"], "天气很好") == 1


@pytest.mark.parametrize(
    ("gold", "predicted", "right"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7", "3 and 4 make 7.", 1),
        ("#### 1,234", "It costs $1234.00.", 1),
        ("#### 18", "18 apples, so 9 each", 0),
        ("#### -5", "It is −5", 1),
        ("#### -5", "It is 5", 0),
        ("#### 3", "5-3", 1),  # a range or a difference has no negative number
        ("0.5", "about .5", 1),
        ("#### 70000", "70,000 people", 1),
        ("答案是42。", "所以一共是４２个", 1),
        ("#### 123456789012345678901", "123456789012345678902", 0),  # exact, not as floats
        ("#### 7", "seven", 0),
        ("seven", "seven", 0),
    ],
)
def test_number_is_the_last_one(gold, predicted, right):
    assert scored("number", [gold], predicted) == right
    assert scored("number", ["no number", gold], predicted) == right


@pytest.mark.parametrize(
    ("predicted", "valid", "equal"),
    [
        ('{"a": 1, "b": [true, null]}', 1, 1),
        (' {"b":[true,null],\n"a":1.0} ', 1, 1),
        ('{"a": true, "b": [true, null]}', 1, 0),  # 1 is not true
        ('{"a": "1", "b": [true, null]}', 1, 0),
        ('{"a": 1, "b": [null, true]}', 1, 0),
        ("[]", 1, 0),
        ("1e999", 1, 0),
        ('{"a": NaN}', 0, 0),
        ("-Infinity", 0, 0),
        ("{'a': 1}", 0, 0),
        ('```json\n{"a": 1, "b": [true, null]}\n```', 0, 0),
        ('{"a": 1, "b": [true, null]} Done.', 0, 0),
        ("[" * 200_000, 0, 0),
        ("", 0, 0),
    ],
)
def test_json(predicted, valid, equal):
    gold = '{"a": 1, "b": [true, null]}'
    assert scored("json", [gold], predicted) == valid
    assert scored("json_equal", ["no JSON", gold], predicted) == equal


@pytest.mark.parametrize(
    ("pattern", "gold", "predicted", "right"),
    [
        (r"^[A-D]$", "B", "C", 1),  # without a group: the form of the answer
        (r"^[A-D]$", "B", "(B)", 0),
        (r"answer is ([A-D])", "so the answer is B", "The answer is B.", 1),
        (r"answer is ([A-D])", "so the answer is B", "The answer is C.", 0),
        (r"answer is ([A-D])", " B\n", "The answer is B.", 1),  # the reference is the bare answer
        (r"answer is ([A-D])", "B", "B", 0),
    ],
)
def test_regex(pattern, gold, predicted, right):
    assert scored("regex", [gold], predicted, pattern) == right


def conversation(i: int, gold: tuple[str, ...], question: str = "") -> Conversation:
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "x"})
    return Conversation(turns, str(i), f"f:{i}", gold, context=f"c{i // 2}", question=question)


def test_chosen_metrics_have_intervals_and_come_after_em_and_f1():
    asked = [conversation(i, (f"#### {i}",)) for i in range(20)]
    predictions = [Prediction(str(i if i % 4 else -1), 1, True, asked=i != 1) for i in range(20)]
    chosen = ["number", "json", "exact", "rouge_l", "regex"]
    rows = score("instruct", asked, predictions, chosen, r"\d")
    total = summarize("instruct", rows)["scores"]["total"]
    names = ["exact", "f1", "rouge_l", "number", "json", "regex"]
    assert list(total) == ["questions", *(key for name in names for key in (name, f"{name}_95"))]
    assert total["number"] == 70.0  # of 20: five are wrong, one was not asked
    assert total["json"] == total["regex"] == 95.0
    for name in names:
        low, high = total[f"{name}_95"]
        assert low <= total[name] <= high
    low, high = total["number_95"]
    assert 40 < low < 60 < 80 < high <= 100
    assert json.dumps(total)


def test_without_a_choice_scores_are_em_and_f1():
    asked, predictions = [conversation(0, ("x",))], [Prediction("x", 1, True)]
    assert score("instruct", asked, predictions)[0].scores == {"exact": 1.0, "f1": 1.0}
    assert score("squad_v2", asked, predictions, FURTHER, "x")[0].scores == {"exact": 1.0, "f1": 1.0}


def test_a_question_without_answer_wants_the_word():
    asked = [conversation(i, (), "Who?") for i in range(2)]
    rows = score("instruct", asked, [Prediction("unanswerable", 1, True), Prediction("Ann", 1, True)], ["rouge_l"])
    assert [row.scores["rouge_l"] for row in rows] == [1.0, 0.0]


def test_every_metric_has_a_heading():
    assert set(FURTHER) <= set(TITLES)
    assert set(further_metrics(FURTHER, "x")) == set(FURTHER)
    assert re.fullmatch(r"[a-z_ ]+", " ".join(FURTHER))
