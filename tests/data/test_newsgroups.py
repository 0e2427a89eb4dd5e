"""Posts become prompts that share the list of groups; headers, footers and quotes are stripped as in scikit-learn."""

import gzip
import json
import re

import pytest
from sklearn.datasets import _twenty_newsgroups as loader

from data.conversation import DataError, Ledger
from data.readers.newsgroups import NEWSGROUPS, strip_post, thread
from data.readers.source import FileSource, files_of, read_all, read_rows
from tests.helpers.places import REAL_DATA, SAMPLES, needs_real

POST = "From: ann@example.org\nSubject: Re: Orbits\n\nBob writes:\n> an old line\n\nLow orbits decay.\n\n-- \nAnn\n"


def write(tmp_path, *rows: dict) -> str:
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompt_is_the_list_of_groups_then_the_post(tmp_path):
    (row,) = read_all(
        FileSource(write(tmp_path, {"id": "sci.space/1", "label": "sci.space", "text": POST})), "newsgroups"
    )
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant"]
    assert all(group in row.messages[0]["content"] for group in NEWSGROUPS)
    assert row.messages[1]["content"] == row.context == "\nLow orbits decay.\n"
    assert (row.answer, row.label, row.answers) == ("sci.space", "sci.space", ("sci.space",))
    assert (row.id, row.group) == ("sci.space/1", "orbits")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("Subject: Orbits", "orbits"),
        ("From: a\nsubject:  RE: Re:  fwd: Low   Orbits ", "low orbits"),
        ("Subject: Re^2: Re[3]: FW: Orbits", "orbits"),
        ("Subject: Re: Orbits\n  that decay\nLines: 2", "orbits that decay"),
        ("Subject: Regarding: orbits", "regarding: orbits"),
        ("Subject:", ""),
        ("From: a", ""),
    ],
)
def test_thread_is_the_subject_without_reply_prefixes(headers, expected):
    assert thread(headers + "\n\nSubject: of the body\n") == expected


def test_post_that_is_only_a_quote_stays_and_is_noted(tmp_path):
    path = write(tmp_path, {"label": "sci.space", "text": "Subject: s\n\n> a quote\n"})
    ledger = Ledger(path)
    (row,) = read_rows(FileSource(path), "newsgroups", ledger)
    assert row.context.strip() == ""
    assert [("empty" in note, n) for note, n in ledger.notes.items()] == [(True, 1)]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (" sci.space", r"label: ' sci\.space' .* 20 newsgroups; .* 'sci\.space'\?"),
        ("Comp.Graphics", r"label: 'Comp\.Graphics' .* 'comp\.graphics'\?"),
        (7, "label: number 7 where text"),
    ],
)
def test_label_that_is_no_group_is_a_defect(tmp_path, label, message):
    with pytest.raises(DataError, match=message):
        read_all(FileSource(write(tmp_path, {"label": label, "text": POST})), "newsgroups")


@pytest.mark.parametrize(
    "text",
    [
        "Low orbits decay.\n\n> why?\n\n-- \nAnn",
        "Note: low orbits decay.\n\nHigh ones do not.",
        "\n\nThey decay.",
        "no",
    ],
)
def test_post_of_a_stripped_copy_is_taken_as_it_is(tmp_path, text):
    path = write(tmp_path, {"label": "sci.space", "text": text})
    ledger = Ledger(path)
    (row,) = read_rows(FileSource(path), "newsgroups", ledger)
    assert (row.context, row.group) == (text, "")
    assert [("post without headers" in note, n) for note, n in ledger.notes.items()] == [(True, 1)]


@pytest.mark.parametrize(
    "headers", ["From: a", "Subject: s", "Xref: x\nPath: p\n\tq\nFrom: a", " relay.edu!host!a\nSubject: s", "X-To: b\nsubject: s"]
)  # fmt: skip
def test_headers_are_cut_in_any_order(tmp_path, headers):
    (row,) = read_all(
        FileSource(write(tmp_path, {"label": "sci.space", "text": f"{headers}\n\nThey decay."})), "newsgroups"
    )
    assert row.context == "They decay."


def test_folder_of_groups_is_read_as_latin_1_and_a_misspelled_group_is_a_defect(tmp_path):
    posts = {"sci.space/2": "caf\xe9", "sci.space/1": "one", "alt.atheism/9": "two", "sci.spaec/3": "three"}
    for name, text in posts.items():
        post = tmp_path / "20news" / name
        post.parent.mkdir(parents=True, exist_ok=True)
        post.write_bytes(f"Subject: s\n\n{text}\n\n--\n".encode("latin-1"))
    (tmp_path / "20news" / "sci.space" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "20news" / "sci.space" / "old").mkdir()
    source = FileSource(str(tmp_path / "20news"))
    assert len(files_of(source)) == 4
    ledger = Ledger(source.path)
    rows = list(read_rows(source, "newsgroups", ledger))
    assert [(row.id, row.label, row.context) for row in rows] == [
        ("alt.atheism/9", "alt.atheism", "two\n"),
        ("sci.space/1", "sci.space", "one\n"),
        ("sci.space/2", "sci.space", "caf\xe9\n"),
    ]
    assert next(places for kind, places in ledger.places.items() if "unread" in kind) == [
        f"{source.path}/sci.space/{name}" for name in (".DS_Store", "old")
    ]
    (line,) = ledger.explain()
    assert re.search(r"sci\.spaec/3: label: 'sci\.spaec' .* 20 newsgroups; .* 'sci\.space'\?$", line)


def test_scikit_learn_that_can_not_download_is_one_clear_error(tmp_path, monkeypatch):
    def no_network(**_):
        raise OSError("no route to host")

    monkeypatch.setattr("sklearn.datasets.fetch_20newsgroups", no_network)
    with pytest.raises(
        DataError, match=r"sklearn:20newsgroups: not in scikit-learn's cache .*no route to host.*; give the path"
    ):
        read_all(FileSource("sklearn:20newsgroups"), "newsgroups")
    with pytest.raises(DataError, match="split 'validation'; .* train, test, all"):
        read_all(FileSource("sklearn:20newsgroups", split="validation"), "newsgroups")


def test_sample_is_read_whole():
    rows = read_all(FileSource(str(SAMPLES / "newsgroups.jsonl")), "newsgroups")
    assert (len(rows), len({row.label for row in rows})) == (200, 20)


@needs_real("20newsgroups/train.jsonl.gz")
def test_real_posts_are_stripped_exactly_as_by_scikit_learn():
    path = REAL_DATA / "20newsgroups" / "train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        raw = [json.loads(line)["text"] for line in file]
    expected = [loader.strip_newsgroup_header(text) for text in raw]
    expected = [loader.strip_newsgroup_footer(text) for text in expected]
    expected = [loader.strip_newsgroup_quoting(text) for text in expected]
    assert [strip_post(text) for text in raw] == expected
    rows = read_all(FileSource(str(path)), "newsgroups")
    assert [row.context for row in rows] == [row.messages[1]["content"] for row in rows] == expected
    assert (len(rows), sum(not row.context.strip() for row in rows)) == (11314, 301)
