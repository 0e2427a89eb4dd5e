"""The data report: page and terminal output of a full, an empty and a hostile report."""

import copy
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from data.audit.report import DataReport, find_all, print_example, print_report, write_html
from tests.helpers.pages import Page

EMPTY = {"stops": []}
SOURCE = {
    "name": "a.jsonl", "format": "jsonl", "weight": 1.0, "rows_read": 12000, "defects": {"no answer": 7},
    "notes": {"answer offset mended": 2}, "left_out": {"longer than max_length": 3}, "examples": 11990,
    "tokens": 1234567, "trained_tokens": 61728, "sha256": {"a.jsonl": "ab" * 32},
    "named": {
        "no answer": [f"a.jsonl:{line}: the answer is empty; write one or drop the row" for line in (3, 5, 8, 9, 11)],
        "answer offset mended": ["a.jsonl:4: offset 7 is 9", "a.jsonl:6: offset 1 is 2"],
    },
}  # fmt: skip
EXAMPLE = {
    "where": "a.jsonl:1", "length": 1120, "trained": 2,
    "tokens": [["<|im_start|>", 0, 1], ["user\nCapital of France?", 0, 0], ["<|im_end|>", 0, 1], ["Paris", 1, 0]],
}  # fmt: skip
FULL = {
    "recipe": "squad", "task": "squad_v2", "max_length": 1024, "created_by": "graft 0.1.0", "stops": [],
    "totals": {
        "rows_read": 12000, "defects": 7, "left_out": 3, "not_chosen": 0, "examples": 11990, "contexts": 400,
        "tokens": 1234567, "trained_tokens": 61728, "longest_example_tokens": 1020, "executed_tokens": 308642,
        "flat_tokens_per_executed_token": 4.0,
    },
    "sources": [SOURCE],
    "held_out": {"name": "dev.jsonl", "format": "jsonl", "rows_read": 50, "notes": {"answer offset mended": 1}},
    "lengths": {
        "example": {"edges": [0, 512, 1024, 1536], "counts": [11000, 990, 3], "min": 9, "p50": 300, "p95": 700,
                    "max": 4000, "clipped": 2},
        "answer": {"edges": [0, 8, 16], "counts": [11000, 990], "min": 1, "p50": 4, "p95": 9, "max": 16},
    },
    "labels": {"rare": 10, "frequent": 990},
    "duplicates": {"exact_rows": 3, "near_rows": 2, "removed": 0, "texts": 12000, "near_share": 0.25, "pairs": [
        {"where": "a.jsonl:9", "same_as": "a.jsonl:2", "similarity": 1.0, "kind": "same row"}]},
    "leaks": {"checked": True, "held_out_rows": 50, "rows": 1, "exact": 0, "context": 1, "near": 0, "removed": 0, "near_share": 0.5, "pairs": [
        {"where": "a.jsonl:9", "held_out": "dev.jsonl:5", "kind": "same passage", "similarity": 0.93}]},
    "examples": [EXAMPLE],
    "tokenizer": {"base": "SmolLM2-135M-Instruct", "chat_template_sha256": "cd" * 32},
}  # fmt: skip


def page(report: dict, folder: Path) -> Page:
    write_html(DataReport.from_json(report), folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def printed(show, report: dict, **options) -> str:
    out = io.StringIO()
    show(DataReport.from_json(report) if show is print_report else report, Console(file=out, **options))
    return out.getvalue()


@pytest.mark.parametrize(
    "sentence",
    [
        "Ready to train.",
        "Rows read 12,000",
        "and 2 more",
        "a.jsonl:3: the answer is empty; write one or drop the row",
        "longer than max_length: 3",
        "held out, never",
        "median 300, 95 % up to 700, longest 4,000 tokens",
        "holds 2 examples",
        "max_length 1,024 lies right",
        "frequent 990 99.0 %",
        "4.00 flat tokens",
        "3 exact and 2 near duplicates, 0 of them removed",
        "25.0 % of the 12,000 texts",
        "1 row is also",
        "same passage 0.930",
        "Capital of France?",
        "ab" * 32,
        "cd" * 32,
    ],
)
def test_page_answers(sentence: str, tmp_path: Path) -> None:
    assert sentence in page(FULL, tmp_path).text


@pytest.mark.parametrize(
    "sentence",
    [
        "No defects, no rows",
        "No source was",
        "No lengths were",
        "carry no labels",
        "was not computed",
        "Duplicate rows were not",
        "no leaks to",
        "No example was",
        "Rows read –",
    ],
)
def test_page_says_what_is_missing(sentence: str, tmp_path: Path) -> None:
    assert sentence in page(EMPTY, tmp_path).text


def test_none_found_differs_from_not_searched_for(tmp_path: Path) -> None:
    none = {"texts": 9}
    clean = {"checked": True, "held_out_rows": 50}
    text = page(EMPTY | {"duplicates": none, "leaks": clean}, tmp_path).text
    assert "No duplicate rows." in text
    assert re.search("No row .* 50 held-out rows", text)
    unchecked = EMPTY | {"leaks": clean | {"checked": False}}
    assert "no leaks to" in page(unchecked, tmp_path).text
    assert re.search("leaks +not searched for", printed(print_report, unchecked))


def test_stops_come_first_and_name_the_remedy(tmp_path: Path) -> None:
    report = FULL | {"stops": ["7 rows have no answer; mend them or set data.on_error: skip"]}
    text = page(report, tmp_path).text
    assert re.search("Not ready .* 1 thing .*: 7 rows have no answer; mend them", text)
    assert text.index("Not ready") < text.index("Rows read")
    assert re.search("Not ready .*:\n- 7 rows have no answer; mend them", printed(print_report, report))


def test_a_report_without_verdict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="stops"):
        page({}, tmp_path)


def test_data_stays_text_in_every_field(tmp_path: Path) -> None:
    hostile = "<script>alert('&')</script><img src=x onerror=alert(1)>\"'"

    def poison(value):
        if isinstance(value, dict):
            return {f"{key}{hostile}" if key in FREE else key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return value + hostile if isinstance(value, str) else value

    FREE = {"no answer", "answer offset mended", "longer than max_length", "a.jsonl", "rare", "frequent"}
    parsed = page(poison(copy.deepcopy(FULL)) | {"stops": [hostile]}, tmp_path)
    assert not {tag for tag, _ in parsed.elements} & {"script", "img"}
    assert parsed.text.count("<script>alert('&')</script>") > 20


def test_page_fetches_nothing(tmp_path: Path) -> None:
    parsed = page(FULL, tmp_path)
    assert not {tag for tag, _ in parsed.elements} & {"script", "link", "img", "iframe", "a", "object"}
    assert not [attrs for _, attrs in parsed.elements if {"src", "href"} & set(attrs)]
    style = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[31mred", "␛[31mred"), ("a\u202eb", "a⟨U+202E⟩b"), ("\ud800", "⟨U+D800⟩"), ("a\x00b", "a␀b"),
     ("a\x9bb", "a⟨U+009B⟩b"), ("שלום", "שלום"), ("👩‍🚀 日本", "👩‍🚀 日本")],
)  # fmt: skip
def test_invisible_characters_are_named(text: str, shown: str, tmp_path: Path) -> None:
    example = {"where": "f:1", "tokens": [[text, 0, 0]], "length": 1, "trained": 0}
    assert shown in page(EMPTY | {"examples": [example]}, tmp_path).text
    assert shown in printed(print_example, example)


def test_bars_beyond_max_length_have_their_own_colour(tmp_path: Path) -> None:
    assert len(page(FULL, tmp_path).classed("beyond")) == 1
    assert len(page(FULL | {"max_length": 768}, tmp_path).classed("beyond")) == 2  # a bin that max_length divides
    assert not page(FULL | {"max_length": None}, tmp_path).classed("beyond")


def test_held_out_data_has_no_counts_of_training() -> None:
    report = EMPTY | {"held_out": SOURCE | dict.fromkeys(("weight", "examples", "tokens", "trained_tokens"))}
    assert re.search(r"a.jsonl \(held out\) +12,000 +7 +3 +– +– +–", printed(print_report, report))


def test_sources_without_an_example_have_no_lengths(tmp_path: Path) -> None:
    text = page(EMPTY | {"lengths": {"example": {}, "answer": {}}}, tmp_path).text
    assert text.count("No lengths were") == 2


def test_trained_text_and_special_tokens_are_marked(tmp_path: Path) -> None:
    parsed = page(FULL, tmp_path)
    assert parsed.classed("trained") == ["span"] * 2  # the legend and the answer
    assert parsed.classed("special") == ["span"] * 3


def test_long_contexts_fold_and_keep_their_text(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(1000))
    example = {"where": "f:1", "tokens": [[words, 0, 0], ["yes", 1, 0]], "length": 1001, "trained": 1}
    parsed = page(EMPTY | {"examples": [example]}, tmp_path)
    assert "details" in {tag for tag, _ in parsed.elements}
    assert re.sub(r"[\d,]+ more characters", "", parsed.text).replace(" ", "").count(words.replace(" ", "")) == 1


def test_a_kind_in_several_sources_is_one_finding() -> None:
    other = SOURCE | {"name": "b.jsonl", "defects": {"no answer": 1, "not UTF-8": 9}, "notes": {}, "left_out": {}}
    sources = [SOURCE, other | {"named": {"not UTF-8": ["b.jsonl:1: byte 0xff"]}}]
    findings = find_all(DataReport.from_json(EMPTY | {"sources": sources}))
    assert [(f.severity, f.kind, f.count, len(f.places)) for f in findings] == [
        ("defect", "not UTF-8", 9, 1), ("defect", "no answer", 8, 5), ("left out", "longer than max_length", 3, 0),
        ("note", "answer offset mended", 2, 2),
    ]  # fmt: skip
    assert findings[1].by_source == [("a.jsonl", 7), ("b.jsonl", 1)]


def test_report_in_a_log_is_plain_and_complete() -> None:
    text = printed(print_report, FULL)
    for part in ("12,000", "1,234,567", "61,728", "dev.jsonl (held out)", "a.jsonl:3: the answer is empty; write one",
                 "308,642 executed tokens, 4.00 to 1", "3 exact, 2 near", "1 also in the held-out data", "Ready to train."):  # fmt: skip
        assert part in text
    assert "\x1b" not in text
    assert "─" not in text


def test_rows_that_are_not_chosen_are_in_the_total_only_if_there_are_any() -> None:
    totals = FULL["totals"]
    assert "not chosen" not in printed(print_report, FULL)
    text = printed(print_report, FULL | {"totals": totals | {"not_chosen": 1059}})
    assert re.search("rows +12,000 read, 7 with defects, 3 left out, 1,059 not chosen", text)
    unknown = {name: value for name, value in totals.items() if name != "not_chosen"}
    assert "not chosen" not in printed(print_report, FULL | {"totals": unknown})


def test_markup_in_data_stays_text_in_the_terminal() -> None:
    report = EMPTY | {"stops": ["[bold]x[/bold] [/]"], "sources": [{"name": "[red]a", "defects": {"[/no]": 1}}]}
    text = printed(print_report, report)
    assert all(part in text for part in ("[bold]x[/bold] [/]", "[red]a", "[/no]"))


def test_trained_tokens_show_in_colour_or_in_brackets() -> None:
    plain = printed(print_example, EXAMPLE)
    assert plain.startswith("a.jsonl:1  1,120 tokens, 2 trained (0.2 %)")
    assert "<|im_start|>user\nCapital of France?<|im_end|>⟦Paris⟧" in plain
    coloured = printed(print_example, EXAMPLE, force_terminal=True, color_system="truecolor")
    assert "\x1b[1;32mParis\x1b[0m" in coloured
    assert "⟦" not in coloured
    assert "⟦Paris⟧" in printed(print_example, EXAMPLE, force_terminal=True, color_system="truecolor", no_color=True)
