"""EM and F1 in scripts without spaces: MLQA's and CMRC 2018's official scripts are stated again here, in own words."""

import random
import re
import string
import unicodedata
from collections import Counter
from itertools import product

import pytest

from eval.metrics import squad_scores
from tests.helpers.builders import read_squad
from tests.helpers.places import REAL_DATA, SAMPLES, needs_real

HAN = "天氣很好北京大学的中国人民银行年月日东西南北上海市长江二零一九龥一"
LATIN = ["NBA", "iPhone", "6s", "2008", "Windows XP", "the", "A", "x", "3.14", "Ω"]
MARKS = [
    "，",
    "。",
    "？",
    "！",
    "：",
    "；",
    "《",
    "》",
    "“",
    "”",
    "’",
    "·",
    "、",
    "「",
    "」",
    "（",
    "）",
    "-",
    "*",
    "/",
    ":",
    "_",
]
MORE_MARKS = [*MARKS, "—", "…", "【", "】", ".", ",", "'", "(", "$", "+", "‘", "«", "〈", "　"]
CHINESE = "天安门位于北京市中心，长安街以北，是明清两代北京皇城的正门。"


def test_spaceless_scripts_earn_partial_scores():
    assert squad_scores(["天氣很好"], "天氣好") == {"exact": 0.0, "f1": pytest.approx(6 / 7)}
    assert squad_scores(["ひらがな"], "カタカナ")["f1"] == 0.0
    for gold, predicted in [
        ("東京都", "東京"),
        ("ประเทศไทย", "ไทย"),
        ("ປະເທດລາວ", "ລາວ"),
        ("រាជធានី", "ធានី"),
        ("မြန်မာနိုင်ငံ", "မြန်မာ"),
    ]:
        common = len(predicted)
        f1 = pytest.approx(2 * common / (len(gold) + len(predicted)))
        assert squad_scores([gold], predicted) == {"exact": 0.0, "f1": f1}, gold


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ("東京", "東京。"),
        ("北京大学", "「北京大学」！"),
        ("1998年", "１９９８年"),
        ("A＋B，测试", "a+b,测试"),
        ("北京 大学", "北京大学"),
        ("iPhone", "iPhone。"),  # a mark of Chinese text beside a Latin answer
        ("ភ្នំពេញ", "ភ្នំ\u200bពេញ"),  # zero-width spaces part Khmer words
        ("مكة", "مكة؟"),
        ("कागज", "कागज।"),
    ],
)
def test_marks_and_widths_are_no_difference(gold, predicted):
    assert squad_scores([gold], predicted) == squad_scores([predicted], gold) == {"exact": 1.0, "f1": 1.0}


def test_unanswerable_is_the_empty_answer_beside_a_chinese_passage():
    assert squad_scores([], "unanswerable。", CHINESE) == {"exact": 1.0, "f1": 1.0}
    assert squad_scores(["《》"], "", CHINESE) == {"exact": 1.0, "f1": 1.0}
    assert squad_scores(["北京"], "", CHINESE) == {"exact": 0.0, "f1": 0.0}


def test_passage_decides_before_the_answers():
    english = (
        "The Yuan dynasty (Chinese: 元朝; pinyin: Yuan Chao), officially the Great Yuan, was founded by Kublai Khan."
    )
    assert squad_scores(["元朝"], "大元朝", english)["f1"] == 0.0  # as the official script has it
    assert squad_scores(["元朝"], "大元朝", CHINESE)["f1"] == pytest.approx(0.8)
    assert squad_scores(["NBA"], "NBA联赛", CHINESE)["f1"] == pytest.approx(0.5)
    assert squad_scores(["the A"], "A", CHINESE)["exact"] == 0.0  # Chinese has no articles


def mlqa_tokens(text: str, language: str) -> list[str]:
    text = "".join(
        c for c in text.lower() if not unicodedata.category(c).startswith("P") and c not in string.punctuation
    )
    if language == "ar":
        text = re.sub(r"\sال^|ال", " ", text)
    if language == "zh":
        text = re.sub(r"([\u4e00-\u9fa5])", r" \1 ", text)
    return text.split()


def mlqa_scores(answers: list[str], predicted: str, language: str) -> dict[str, float]:
    exact, f1 = [], []
    for answer in answers:
        gold, words = mlqa_tokens(answer, language), mlqa_tokens(predicted, language)
        exact.append(float(gold == words))
        same = sum((Counter(gold) & Counter(words)).values())
        f1.append(2 * same / (len(gold) + len(words)) if same else 0.0)
    return {"exact": max(exact), "f1": pytest.approx(max(f1), abs=1e-12)}


def written(rng: random.Random, letters: str, marks: list[str]) -> str:
    """Runs of letters, Latin words, marks and spaces."""
    parts = ["".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
    parts += rng.choices([*LATIN, *marks, *marks, " "], k=rng.randint(0, 4))
    rng.shuffle(parts)
    return "".join(parts)


def nearly(rng: random.Random, text: str, other: str) -> str:
    """A part of the text, the text in another text, its characters in another order, or only the other text."""
    start, end = sorted(rng.choices(range(len(text) + 1), k=2))
    shuffled = "".join(rng.sample(text, len(text)))
    return rng.choice(
        [text, text[start:end], other[:3] + text, text + other, text[:start] + text[end:], shuffled, other]
    )


def test_chinese_answers_score_as_mlqa_does():
    rng = random.Random(0)
    for _ in range(1000):
        answers = [written(rng, HAN, MORE_MARKS) for _ in range(rng.randint(1, 3))]
        predicted = nearly(rng, answers[0], written(rng, HAN, MORE_MARKS))
        assert squad_scores(answers, predicted) == mlqa_scores(answers, predicted, "zh"), (answers, predicted)


def test_latin_answers_on_chinese_passages_score_as_mlqa_does():
    rng = random.Random(1)
    for _ in range(1000):
        answers = [" ".join(rng.choices(LATIN, k=rng.randint(1, 3)))]
        predicted = nearly(rng, answers[0], written(rng, HAN, MORE_MARKS))
        assert squad_scores(answers, predicted, CHINESE) == mlqa_scores(answers, predicted, "zh"), (answers, predicted)


@pytest.mark.parametrize(
    ("language", "letters", "marks"),
    [("ar", "المكرةبتسحد ", ["؟", "،", "؛", ".", "«", "»"]), ("hi", "कखगघमनरत ", ["।", "॥", "?", ",", "“", "”"])],
)
def test_arabic_and_hindi_answers_score_as_mlqa_does(language, letters, marks):
    rng = random.Random(2)
    for _ in range(1000):
        first = next(c for c in iter(lambda: rng.choice(letters), "") if mlqa_tokens(c, language))
        answers = [f"{first} {written(rng, letters, marks)}"]
        predicted = nearly(rng, answers[0], written(rng, letters, marks))
        assert squad_scores(answers, predicted) == mlqa_scores(answers, predicted, language), (answers, predicted)


def cmrc_tokens(text: str) -> list[str]:
    """nltk's tokens of the Latin parts are those between spaces, as long as they hold letters and digits only."""
    text = "".join(c for c in text.lower().strip() if c not in MARKS)
    return re.sub(r"([\u4e00-\u9fa5])", r" \1 ", text).split()


def cmrc_scores(answer: str, predicted: str) -> dict[str, float]:
    gold, words = cmrc_tokens(answer), cmrc_tokens(predicted)
    runs = product(range(len(gold)), range(len(words)), range(1, len(gold) + 1))
    longest = max(
        (n for i, j, n in runs if len(gold[i : i + n]) == n and gold[i : i + n] == words[j : j + n]), default=0
    )
    f1 = 2 * longest / (len(gold) + len(words)) if longest else 0.0
    return {"exact": float("".join(gold) == "".join(words)), "f1": f1}


def test_chinese_answers_score_as_cmrc_does_if_one_holds_the_other():
    """CMRC 2018 counts the longest common run of characters, MLQA all common ones."""
    rng, equal = random.Random(3), 0
    for _ in range(1000):
        marked = [rng.choice([*HAN, *"aB7", *MARKS[:6]]) for _ in range(rng.randint(1, 12))]
        answer = "".join([rng.choice(HAN), *marked])
        start, end = sorted(rng.choices(range(len(answer) + 1), k=2))
        predicted = rng.choice([answer, answer[start:end], "".join(rng.choices(HAN, k=3)) + answer, answer[::-1]])
        ours, theirs = squad_scores([answer], predicted), cmrc_scores(answer, predicted)
        assert ours["exact"] == theirs["exact"], (answer, predicted)
        gold, words = "\n".join(cmrc_tokens(answer)), "\n".join(cmrc_tokens(predicted))
        if f"\n{gold}\n" in f"\n{words}\n" or f"\n{words}\n" in f"\n{gold}\n" or not {*gold} & {*words} - {"\n"}:
            equal += 1
            assert ours["f1"] == pytest.approx(theirs["f1"]), (answer, predicted)
        assert ours["f1"] >= theirs["f1"] - 1e-12
    assert equal > 500


def squad_before(answers: tuple[str, ...], predicted: str) -> dict[str, float]:
    """The scores before any script had a rule of its own, digit for digit."""

    def normal(text: str) -> str:
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(gold: list[str], words: list[str]) -> float:
        common = sum((Counter(gold) & Counter(words)).values())
        if not gold or not words:
            return float(gold == words)
        if common == 0:
            return 0.0
        precision, recall = common / len(words), common / len(gold)
        return 2 * precision * recall / (precision + recall)

    if normal(predicted) == "unanswerable":
        predicted = ""
    gold = [a for a in answers if normal(a)] or [""]
    exact = max(float(normal(a) == normal(predicted)) for a in gold)
    return {"exact": exact, "f1": max(f1(normal(a).split(), normal(predicted).split()) for a in gold)}


def same_as_before(questions, seed: int) -> int:
    """How many answers were scored: gold ones, those of other questions, cuts of the passage."""
    rng, scored = random.Random(seed), 0
    gold = [answer for c in questions for answer in c.answers]
    for c in questions:
        words = c.context.split(" ")
        start = rng.randrange(len(words))
        cuts = [" ".join(words[start : start + n]) for n in (1, 3, 8)]
        others = [c.context[s : s + 15] for s in c.starts]
        for predicted in {*c.answers, *cuts, *others, rng.choice(gold), "", "unanswerable", "Unanswerable."}:
            assert squad_scores(c.answers, predicted, c.context) == squad_before(c.answers, predicted), (
                c.id,
                predicted,
            )
            scored += 1
    return scored


def test_english_squad_scores_are_unchanged():
    assert (
        same_as_before([*read_squad(SAMPLES / "squad_dev.json"), *read_squad(SAMPLES / "squad_train.json")], 4) > 1000
    )


@needs_real("squad_v2/dev.json.gz")
def test_english_squad_scores_are_unchanged_on_real_data():
    """Some of its passages hold Chinese, Japanese and Arabic names."""
    assert same_as_before(read_squad(REAL_DATA / "squad_v2" / "dev.json.gz"), 5) > 40_000


def test_scores_of_latin_text_are_unchanged():
    rng = random.Random(6)
    letters = string.printable + "éüñøßŁźĐžİıŒæ“”‘’–—…«»¿¡€°²½ΑλжЯ\u00a0\u2009"
    for _ in range(3000):
        words = ["".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 6))]
        answer = " ".join([*words, rng.choice(["the", "a", "An", ""])])
        predicted = nearly(rng, answer, "".join(rng.choices(letters, k=5)))
        assert squad_scores([answer], predicted) == squad_before((answer,), predicted), (answer, predicted)
