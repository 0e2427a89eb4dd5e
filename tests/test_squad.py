"""SQuAD files become instruction pairs; a defect names file and question."""

import gzip
import json
from pathlib import Path

import pytest

from data.chat import DataError
from data.squad import UNANSWERABLE, read_squad
from tests.conftest import REAL_DATA, SAMPLES, needs_real


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
        (
            qa(answers=[{"text": "Paris", "answer_start": 14}]),
            r"s\.json: q1: the answer 'Paris' is not at answer_start 14",
        ),
        (qa(question=" "), "q1: the question is empty"),
        (qa(answers=[{"text": "", "answer_start": 0}]), "q1: an answer's text is empty"),
        (qa(is_impossible=True), "q1: is_impossible contradicts its 2 answers"),
        ({"id": "q1", "question": "Where?"}, "without id, question, answers"),
    ],
)
def test_defect_names_file_and_question(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_squad(squad(tmp_path, [row]))


def test_repeated_id_is_an_error(tmp_path):
    with pytest.raises(DataError, match="q1: question id occurs twice"):
        read_squad(squad(tmp_path, [qa(), qa()]))


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
