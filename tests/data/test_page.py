"""Numbers, shares and ticks of all pages, and Markdown tables."""

import pytest

from data.page import markdown_table, number, place_on, plain_markdown, share, ticks


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234567, "1,234,567"), (1.0, "1.00"), (1234.5, "1,234.50"), (None, "–")]
)
def test_numbers_have_thousands_separators(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"), [(1, 8, "12.5 %"), (1, 0, "–"), (None, 5, "–"), (0, 5, "0.0 %"), (3, 12000, "< 0.1 %")]
)
def test_a_share_of_nothing_is_unknown(part: int | None, whole: int, text: str) -> None:
    assert share(part, whole) == text


@pytest.mark.parametrize("most", [0, 1, 4, 5, 6, 9, 10, 99, 1001, 49_999, 87_599])
def test_ticks_are_round_and_cover_the_largest_bar(most: int) -> None:
    marks = ticks(most)
    assert marks[-1] >= max(most, 1)
    assert len(marks) <= 6
    assert str(marks[1]).rstrip("0") in {"1", "2", "5"}


@pytest.mark.parametrize(("value", "place"), [(0, 0), (5, 0.5), (10, 1), (25, 1.75), (30, 2), (31, None), (None, None)])
def test_a_value_has_its_place_among_uneven_bins(value: int | None, place: float | None) -> None:
    assert place_on(value, [0, 10, 30]) == place


def test_a_markdown_table_aligns_numbers_right_and_keeps_its_columns() -> None:
    lines = markdown_table(["name", "score"], [["a|b\n<i>", "1.5 [1.0 - 2.0]"], ["c", "–"]]).splitlines()
    assert lines[1] == "| --- | --: |"
    assert lines[2] == r"| a\|b \<i\> | 1.5 \[1.0 - 2.0\] |"
    assert markdown_table(["name"], []).splitlines() == ["| name |", "| --: |"]


@pytest.mark.parametrize(("text", "shown"), [("linear_probe", "linear_probe"), ("_it_", r"\_it\_"), ("a_", r"a\_")])
def test_underscores_are_escaped_if_they_mean_emphasis(text: str, shown: str) -> None:
    assert plain_markdown(text) == shown
