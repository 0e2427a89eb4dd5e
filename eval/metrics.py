"""Scores of one answer. SQuAD's equal those of the official evaluate-v2.0.py, on texts in Chinese those of MLQA's."""

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from functools import cache, partial
from typing import Any, Literal, get_args

import numpy as np

from data.readers.squad import UNANSWERABLE
from data.tool_calls import Call, calls_in

OTHER = ""  # a predicted text that is no label of any question
TITLES = {
    "exact": "EM", "f1": "F1", "valid": "valid labels", "macro_f1": "macro-F1", "rouge_l": "ROUGE-L", "chrf": "chrF",
    "number": "number", "json": "valid JSON", "json_equal": "equal JSON", "regex": "regex", "call": "exact calls",
    "call_arguments": "arguments F1",
}  # fmt: skip
MetricName = Literal[
    "exact", "f1", "rouge_l", "chrf", "number", "json", "json_equal", "regex", "call", "call_arguments"
]
METRICS: tuple[str, ...] = get_args(MetricName)
FURTHER = METRICS[2:]  # chosen by eval.metrics, beside EM and F1
OF_CALLS = METRICS[-2:]
Metric = Callable[[Sequence[str], str], float]  # gold answers (at least one) and a prediction -> 0 to 1

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = set(string.punctuation)
# quotes, emphasis and sentence marks that models put around a label; not all punctuation: C++ is not C
_AROUND_LABELS = string.whitespace + ".,;:!?*`'\"“”‘’«»()[]"
# Scripts that SQuAD's rule does not fit. spaceless: Han, Kana, Bopomofo, Thai, Lao, Myanmar and Khmer, whose characters
# are tokens, with their punctuation and full-width forms.
_SCRIPTS = {
    "spaceless": re.compile(
        "[\u2e80-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f"
        "\u0e01-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"
        "\U0001aff0-\U0001b16f\U00020000-\U0003ffff]+"
    ),
    "arabic": re.compile("[\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff]+"),
    "devanagari": re.compile("[\u0900-\u097f]+"),
}
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # ，Ａ１ -> ,A1
_NUMBER = re.compile(r"(?:(?<![\d.])[-−])?(?:\d+(?:,\d+)*(?:\.\d+)?|\.\d+)")


def script_of(answers: Sequence[str], predicted: str, passage: str = "") -> str:
    """The script by whose rule answers are normalised: spaceless, arabic, devanagari, or "" for SQuAD's own rule.

    It is that of most words of the passage, so that a Chinese name in English text changes no score; without a passage,
    one that occurs in the answers.
    """
    text, least = (passage, len(passage.split()) / 2) if passage else (" ".join([*answers, predicted]), 0)
    return next((name for name, pattern in _SCRIPTS.items() if len(pattern.findall(text)) > least), "")


def normalize_answer(text: str, script: str = "") -> str:
    """Lower case, without punctuation, articles and extra white space: by the rule of evaluate-v2.0.py, or for a
    script of `script_of` by that of MLQA's mlqa_evaluation_v1.py (zh, ar, hi).

    Full-width letters, digits and marks become half-width and invisible characters go, which MLQA's rule lacks.
    """
    text = text.lower()
    if not script:
        text = "".join(c for c in text if c not in _PUNCTUATION)
        return " ".join(_ARTICLES.sub(" ", text).split())
    text = text.translate(_HALF_WIDTH)
    text = "".join(c for c in text if c not in _PUNCTUATION and not _is_mark(c))
    if script == "arabic":
        text = text.replace("ال", " ")
    elif script == "spaceless":
        text = _SCRIPTS[script].sub(lambda run: f" {' '.join(run[0])} ", text)
    return " ".join(text.split())


@cache
def _is_mark(character: str) -> bool:
    """Whether it is punctuation or an invisible sign, such as the zero-width space between Khmer words."""
    category = unicodedata.category(character)
    return category[0] == "P" or category == "Cf"


def exact_match(gold: str, predicted: str, script: str = "") -> float:
    return float(normalize_answer(gold, script) == normalize_answer(predicted, script))


def token_f1(gold: str, predicted: str, script: str = "") -> float:
    """F1 of the bags of normalised tokens; if either is empty, 1 if both are, else 0."""
    gold_tokens, predicted_tokens = (normalize_answer(text, script).split() for text in (gold, predicted))
    common = sum((Counter(gold_tokens) & Counter(predicted_tokens)).values())
    return _f1(common, gold_tokens, predicted_tokens)


def _f1(common: int, gold: Sequence[str], predicted: Sequence[str]) -> float:
    if not gold or not predicted:
        return float(gold == predicted)
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def squad_scores(answers: Sequence[str], predicted: str, passage: str = "") -> dict[str, float]:
    """Best EM and F1 over the gold answers. If normalisation leaves no gold answer, the right one is empty.

    A predicted `unanswerable` counts as the empty answer.
    """
    script = script_of(answers, predicted, passage)
    if normalize_answer(predicted, script) == UNANSWERABLE:
        predicted = ""
    return _best([a for a in answers if normalize_answer(a, script)] or [""], predicted, script)


def reference_scores(answers: Sequence[str], predicted: str, passage: str = "") -> dict[str, float]:
    """Best EM and F1 over the reference answers of instruction data; without any (SQuAD rows), SQuAD's scores."""
    if not answers:
        return squad_scores(answers, predicted, passage)
    return _best(answers, predicted, script_of(answers, predicted, passage))


def _best(gold: Sequence[str], predicted: str, script: str) -> dict[str, float]:
    return {
        "exact": max(exact_match(a, predicted, script) for a in gold),
        "f1": max(token_f1(a, predicted, script) for a in gold),
    }


def further_metrics(names: Collection[str], pattern: str | None) -> dict[str, Metric]:
    """The metrics of those names, without EM and F1, which every answer gets. pattern: that of `regex`."""
    metrics: dict[str, Metric] = {
        "rouge_l": rouge_l, "chrf": chrf, "number": number, "json": valid_json, "json_equal": equal_json,
        "regex": partial(matches, re.compile(pattern or "")), "call": exact_calls, "call_arguments": call_arguments,
    }  # fmt: skip
    return {name: metrics[name] for name in FURTHER if name in names}


def rouge_l(answers: Sequence[str], predicted: str) -> float:
    """Best F1 of the longest common subsequence of F1's tokens. Source: Lin, ROUGE (2004), with beta 1. Own code, since
    rouge_score drops all that is not a-z or 0-9."""
    script = script_of(answers, predicted)
    words = normalize_answer(predicted, script).split()
    golds = [normalize_answer(answer, script).split() for answer in answers]
    return max(_f1(_common_subsequence(gold, words), gold, words) for gold in golds)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = row = (1 << len(a)) - 1
    for word in b:
        hits = row & places.get(word, 0)
        row = (row + hits | row & ~hits) & every
    return len(a) - row.bit_count()


def chrf(answers: Sequence[str], predicted: str) -> float:
    """sacrebleu's chrF2 of the one answer."""
    return _chrf().sentence_score(predicted, answers).score / 100


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def number(answers: Sequence[str], predicted: str) -> float:
    """Whether the last number is that of a reference answer, as GSM8K is scored: 1,000.0 is 1000."""
    value = _last_number(predicted)
    return float(value is not None and value in map(_last_number, answers))


def _last_number(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def valid_json(answers: Sequence[str], predicted: str) -> float:
    """Whether the whole answer is one JSON value, without a fence around it."""
    return float(_canonical_json(predicted) is not None)


def equal_json(answers: Sequence[str], predicted: str) -> float:
    """Whether the answer is the JSON value of a reference answer, whatever the order of keys and the white space."""
    value = _canonical_json(predicted)
    return float(value is not None and value in map(_canonical_json, answers))


def _canonical_json(text: str) -> str | None:
    """The JSON value in one form, in which 1.0 is 1 but not true; None if the text is no JSON."""
    try:
        # NaN is no JSON: dumps refuses a Decimal
        return json.dumps(json.loads(text, parse_float=_whole_or_float, parse_constant=Decimal), sort_keys=True)
    except (ValueError, TypeError, RecursionError):  # RecursionError: a model may repeat [ without end
        return None


def _whole_or_float(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def matches(pattern: re.Pattern[str], answers: Sequence[str], predicted: str) -> float:
    """Whether the pattern is in the answer; if it has a group, whether the first group is also that of a reference
    answer, or a whole one."""
    match = pattern.search(predicted)
    if match is None or not pattern.groups:
        return float(match is not None)
    wanted = ((pattern.search(answer), answer.strip()) for answer in answers)
    return float(match[1] in {gold[1] if gold else whole for gold, whole in wanted})


def exact_calls(answers: Sequence[str], predicted: str) -> float:
    """Whether the answer calls the tools of a reference answer, names and arguments the same, in any order; without a
    call in the reference, whether it calls none."""
    calls = calls_in(predicted)
    wanted = [sorted(map(_canonical_call, calls_in(answer))) for answer in answers]
    return float(None not in calls and sorted(map(_canonical_call, calls)) in wanted)


def call_arguments(answers: Sequence[str], predicted: str) -> float:
    """Best F1 of the bags of calls' names and arguments; 1 if neither calls a tool."""
    parts = _call_parts(predicted)
    golds = [_call_parts(answer) for answer in answers]
    return max(_f1(sum((Counter(gold) & Counter(parts)).values()), gold, parts) for gold in golds)


def _canonical_call(call: Call | None) -> str:
    return _canonical_json(json.dumps(call)) or ""


def _call_parts(text: str) -> list[str]:
    """One text for each call's name, and for each of its arguments."""
    parts: list[str] = []
    for call in calls_in(text):
        if call is None:
            parts.append(OTHER)
        else:
            named = ({key: value} for key, value in call["arguments"].items())
            parts += (_canonical_call({"name": call["name"], "arguments": one}) for one in ({}, *named))
    return parts


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
