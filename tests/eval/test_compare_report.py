"""graft compare: data can't become markup, and results that do not fit are refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.breakdown import question_word
from eval.compare import CompareError, compare
from tests.helpers.comparisons import Row, answered, edit, questions, squad_runs, write
from tests.helpers.pages import Page


@pytest.fixture
def squad(tmp_path: Path) -> list[Path]:
    return squad_runs(tmp_path)


def test_text_from_data_cannot_become_markup(tmp_path: Path):
    evil = '<script>alert("x")</script><img src=x onerror=y>|`*\u202e'
    rows = questions("squad_v2")
    for row in rows:
        row |= {"id": row["id"] + evil, "prompt": evil, "gold": [evil] if row["gold"] else []}
    folders = [
        write(tmp_path / f"s{i}", "squad_v2", answered("squad_v2", rows, right, i), name=evil, data=evil, scorer=evil)
        for i, right in enumerate((0.2, 0.9))
    ]
    compare(folders, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    page = Page(html)
    assert not {"script", "img", "link", "iframe"} & {name for name, _ in page.elements}
    assert "\u202e" not in html
    assert "&lt;script&gt;" in html
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert not any("<script" in line.replace("\\<", "") for line in lines)
    tables = [line.replace("\\|", "") for line in lines if line.startswith("| ")]
    assert len({line.count("|") for line in tables if "\\<" in line}) <= 3  # a table each, none broken


def test_page_is_well_formed_and_fetches_nothing(squad: list[Path], tmp_path: Path):
    compare(squad, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    page = Page(html)
    assert not [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")]
    assert "default-src 'none'" in html


def test_bars_are_as_long_as_the_scores(squad: list[Path], tmp_path: Path):
    report = compare(squad, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    bars = Page(html[html.index('<table class="bars">') : html.index("<h2>Scores")])
    widths = [float(attributes["width"]) for _, attributes in bars.elements if attributes.get("class") == "within"]
    assert widths == [s["scores"]["total"]["exact"]["score"] for s in report["systems"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(task="squad_v1"), "task is squad_v2 in {0}/eval, but squad_v1 in {1}/eval; evaluate both"),
        (lambda r: r.update(task_version=2), "task_version is 1 in {0}/eval, but 2 in {1}/eval; evaluate both"),
        (lambda r: r.update(evaluation_sha256="ef"), "evaluation_sha256 is " + "ab" * 32 + " in {0}/eval, but ef in {1}/eval"),
        (lambda r: r.pop("evaluation_sha256"), "evaluation_sha256 is missing; .* `graft eval {1}`"),
        (lambda r: r["scores"]["total"].update(exact=99.0), "scores.total.exact is 99.0, but samples.jsonl gives "),
        (lambda r: r["scores"]["NoAns"].update(f1=99.0), "scores.NoAns.f1 is 99.0, but samples.jsonl gives "),
        (lambda r: r.update(questions=119), "119 questions, but 120 rows in samples.jsonl"),
        (lambda r: r.update(scores={}), "scores.total.exact is None"),
        (lambda r: r.update(system=[1]), r"system is \[1\]; .* `graft eval"),
        (lambda r: r["system"].update(disk_mib="large"), "disk_mib is 'large', no number"),
    ],
)  # fmt: skip
def test_refuses_results_that_do_not_fit(squad: list[Path], tmp_path: Path, change: Callable[[Row], Any], message: str):
    edit(squad[1], change)
    with pytest.raises(CompareError) as error:
        compare(squad, tmp_path / "out")
    assert re.search(message.format(*squad), str(error.value))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"id": "q1"', '"id": "z1"', "samples.jsonl:2: id is 'q1' in {0}/eval, but 'z1' in {1}/eval; evaluate both"),
        ('"cluster": "c0", ', "", "samples.jsonl:1: cluster is missing; .* `graft eval {1}`"),
        ('"exact": 1.0', '"exact": 2.0', "exact is 2.0; .* `graft eval"),
        ('"exact": 1.0', '"exact": NaN', "samples.jsonl:1: exact is nan"),
        ('"probability": null', '"probability": 1.5', "samples.jsonl:1: probability is 1.5"),
        ('"gold": []', '"gold": null', "samples.jsonl:1: gold is None"),
        ('{"id": "q2"', '{"id": q2"', "samples.jsonl:3: "),
    ],
)
def test_refuses_damaged_samples_by_line(squad: list[Path], tmp_path: Path, old: str, new: str, message: str):
    file = squad[1] / "eval" / "samples.jsonl"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(CompareError) as error:
        compare(squad, tmp_path / "out")
    assert re.search(message.format(*squad), str(error.value))


def test_refuses_missing_and_damaged_files(squad: list[Path], tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(CompareError, match="1 folders .* at least 2"):
        compare(squad[:1], out)
    with pytest.raises(CompareError, match=r"nowhere/results.json .*\(No such file"):
        compare([squad[0], tmp_path / "nowhere"], out)
    (squad[1] / "eval" / "results.json").write_text('{\n"task": }')
    with pytest.raises(CompareError, match=r"results.json: Invalid JSON: .* at line 2"):
        compare(squad[:2], out)
    (squad[2] / "eval" / "samples.jsonl").unlink()
    with pytest.raises(CompareError, match="samples.jsonl can't be read"):
        compare([squad[0], squad[2]], out)
    out.write_text("")
    with pytest.raises(CompareError, match=f"--out {out} is a file"):
        compare([squad[0], squad[0]], out)


def test_another_number_of_samples_is_refused(tmp_path: Path):
    folders = [
        write(tmp_path / f"s{n}", "squad_v2", answered("squad_v2", questions("squad_v2", n), 0.5, 1)) for n in (40, 44)
    ]
    with pytest.raises(CompareError, match=r"40 samples in .*s40/eval, but 44 in .*s44/eval; evaluate both"):
        compare(folders, tmp_path / "out")


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Whose idea was it?", "who"),
        ("In which year, and why?", "which"),
        ("Somehow whatever?", "other"),
        ("HOW far?", "how"),
    ],
)
def test_question_word_is_the_first_one(question: str, word: str):
    assert question_word(question) == word


def test_answers_that_were_timed_on_different_machines_are_reported(squad: list[Path], tmp_path: Path):
    compare(squad, tmp_path / "same")
    for i, folder in enumerate(squad):
        edit(folder, lambda results, i=i: results.update(machine=f"CPU {i % 2} <b>, cores: 2"))
    compare(squad, tmp_path / "other")
    for page in ("report.md", "report.html"):
        assert "different machines" not in (tmp_path / "same" / page).read_text()
        assert "different machines" in (tmp_path / "other" / page).read_text()
    assert "<b>" not in (tmp_path / "other" / "report.html").read_text()
