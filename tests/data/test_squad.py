"""SQuAD files become instruction pairs; a defect names file and question."""

import gzip
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from data.conversation import DataError, Ledger
from data.readers.source import FileSource, read_rows
from data.readers.squad import INSTRUCTION_V1, INSTRUCTION_V2, UNANSWERABLE
from tests.helpers.builders import read_squad
from tests.helpers.places import REAL_DATA, SAMPLES, needs_real


def squad(tmp_path: Path, qas: list[dict], context: str = "Ann met Bob in Paris in 1999.") -> Path:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}))
    return path


def qa(**changes) -> dict:
    row = {"id": "q1", "question": "Where?", "answers": [{"text": "in Paris", "answer_start": 12}, {"text": "Paris", "answer_start": 15}]}  # fmt: skip
    return row | changes


def test_answer_is_the_shortest_span_and_passage_comes_before_question(tmp_path):
    (row,) = read_squad(squad(tmp_path, [qa()]))
    assert row.answer == "Paris"
    assert row.answers == ("in Paris", "Paris")
    text = row.messages[1]["content"]
    assert text.index("Ann met") < text.index("Where?")


def test_unanswerable_question_is_answered_by_the_fixed_word(tmp_path):
    (row,) = read_squad(squad(tmp_path, [qa(answers=[], is_impossible=True)]))
    assert row.answer == UNANSWERABLE
    assert row.answers == ()
    assert UNANSWERABLE in row.messages[0]["content"]


def test_version_1_does_not_mention_unanswerable_and_refuses_it(tmp_path):
    (row,) = read_squad(squad(tmp_path, [qa()]), version=1)
    assert UNANSWERABLE not in row.messages[0]["content"]
    with pytest.raises(DataError, match="task: squad_v2"):
        read_squad(squad(tmp_path, [qa(answers=[])]), version=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (qa(answers=[{"text": "Paris", "answer_start": 14}]), "answers[0]: 'Paris' is not at answer_start 14 (the passage has ' Pari')"),
        (qa(answers=[{"text": "Paris", "answer_start": "15"}]), "answers[0].answer_start: text '15'"),
        (qa(answers=[{"text": "", "answer_start": 0}]), "answers[0].text: empty text"),
        (qa(answers=["Paris"]), "answers: ['Paris'] where [{\"text\": ..., \"answer_start\": ...}] is expected"),
        (qa(answers={"text": ["Paris"], "answer_start": []}), "answers: {'text'"),
        (qa(question=" "), "question: only white space"),
        (qa(is_impossible=True), "is_impossible: True contradicts"),
        ({"id": "q1", "question": "Where?"}, "answers: missing"),
    ],
)  # fmt: skip
def test_defect_names_file_and_question(tmp_path, row, message):
    path = squad(tmp_path, [row])
    with pytest.raises(DataError) as error:
        read_squad(path)
    assert str(error.value).startswith(f"{path}: q1: {message}")


def test_all_defects_are_reported_at_once_and_the_other_questions_are_read(tmp_path):
    path = squad(tmp_path, [qa(), qa(id="q2", question=""), qa(id="q3", is_impossible=True), qa(id="q4")])
    with pytest.raises(DataError, match=r"q2: question: empty text.*\n.*q3: is_impossible"):
        read_squad(path)
    ledger = Ledger(str(path))
    assert [c.id for c in read_rows(FileSource(str(path)), "squad_v2", ledger)] == ["q1", "q4"]
    assert ledger.rows == 4


def test_repeated_id_is_an_error(tmp_path):
    with pytest.raises(DataError, match="q1: id: 'q1' occurs"):
        read_squad(squad(tmp_path, [qa(), qa()]))


@pytest.mark.parametrize(
    ("task", "format", "changes", "version"),
    [
        ("squad_v2", None, {}, 2),
        ("squad_v1", None, {}, 1),
        ("squad_v1", None, {"is_impossible": False}, 1),  # training and evaluation use the same prompt for any file
        ("instruct", None, {}, 1),
        ("instruct", None, {"is_impossible": False}, 2),
        ("instruct", "squad_v2", {}, 2),
        ("squad_v2", "squad_v1", {"is_impossible": False}, 1),
    ],
)
def test_version_is_the_recipes_or_else_the_files(tmp_path, task, format, changes, version):
    path = squad(tmp_path, [qa(**changes)])
    (row,) = read_rows(FileSource(str(path), format), task, Ledger(str(path)))
    assert row.messages[0]["content"] == (INSTRUCTION_V2 if version == 2 else INSTRUCTION_V1)


def test_rows_of_the_hub_layout_read_like_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    answers = {"text": ["in Paris", "Paris"], "answer_start": [12, 15]}
    row = {
        "id": "q1",
        "title": "t",
        "context": "Ann met Bob in Paris in 1999.",
        "question": "Where?",
        "answers": answers,
    }
    path.write_text(json.dumps(row))
    (from_row,) = read_rows(FileSource(str(path)), "squad_v2", Ledger(str(path)))
    (from_file,) = read_squad(squad(tmp_path, [qa()]))
    assert replace(from_row, where="") == replace(from_file, where="")


def test_file_is_read_one_article_at_a_time(tmp_path):
    article = {"title": "t", "paragraphs": [{"context": "Ann met Bob in Paris in 1999. " * 300, "qas": []}]}
    path = tmp_path / "s.json"
    peaks = []
    for articles in (100, 2000):
        for i in range(articles):
            article["paragraphs"][0]["qas"] = [qa(id=str(i))]
            with path.open("a" if i else "w") as file:
                file.write(("," if i else '{"data": [') + json.dumps(article))
        with path.open("a") as file:
            file.write("]}")
        tracemalloc.start()
        assert sum(1 for _ in read_rows(FileSource(str(path)), "squad_v2", Ledger(str(path)))) == articles
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"data": [{}]}', b"\xff\xfe", b'{"data": []}'])
def test_file_that_is_no_squad_is_one_clear_error(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json"):
        read_squad(path)


def test_gzipped_file_reads_the_same(tmp_path):
    packed = tmp_path / "s.json.gz"
    packed.write_bytes(gzip.compress((SAMPLES / "squad_dev.json").read_bytes()))
    assert [c.messages for c in read_squad(packed)] == [c.messages for c in read_squad(SAMPLES / "squad_dev.json")]


def test_samples_are_as_large_and_varied_as_promised():
    train, dev = read_squad(SAMPLES / "squad_train.json"), read_squad(SAMPLES / "squad_dev.json")
    contexts = {c.context for c in train}, {c.context for c in dev}
    assert len(contexts[0] | contexts[1]) >= 40
    assert len(train) + len(dev) >= 240
    assert not contexts[0] & contexts[1]
    assert sum(not c.answers for c in train + dev) * 3 == len(train + dev)
    posts = [json.loads(line) for line in (SAMPLES / "newsgroups.jsonl").read_text().splitlines()]
    assert len({p["text"] for p in posts}) == 200
    assert len({p["label"] for p in posts}) == 20


@needs_real("squad_v2/dev.json.gz")
def test_real_dev_set_is_read_whole():
    rows = read_squad(REAL_DATA / "squad_v2" / "dev.json.gz")
    assert (len(rows), sum(not r.answers for r in rows), len({r.context for r in rows})) == (8767, 4458, 874)
