"""Files, globs, folders, tables and Hub datasets in any format give the same conversations."""

import gzip
import json
import re
from pathlib import Path

import pytest

from data.conversation import DataError, Ledger
from data.readers import strict_json
from data.readers.row_formats import FORMATS
from data.readers.source import FileSource, files_of, hub_revision, is_hub_id, read_all, read_rows
from tests.helpers.places import SAMPLES

GOOD = {"prompt": "p", "completion": "c"}
USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "c"}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "p", "completion": "c"}, "user: p | assistant: c"),
        ({"prompt": [{"role": "system", "content": "s"}, USER], "completion": [ANSWER]}, "system: s | user: u | assistant: c"),
        ({"instruction": "i", "input": "x", "output": "c"}, "user: i\n\nx | assistant: c"),
        ({"instruction": "i", "input": "", "output": "c", "history": [], "system": None}, "user: i | assistant: c"),
        ({"instruction": "i", "output": "c", "system": "s"}, "system: s | user: i | assistant: c"),
        (
            {"instruction": "i", "output": "c", "system": "s", "history": [["u1", "a1"], ["u2", "a2"]]},
            "system: s | user: u1 | assistant: a1 | user: u2 | assistant: a2 | user: i | assistant: c",
        ),
        ({"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}, "system: s | user: u | assistant: c"),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, "user: u | assistant: c | user: u | assistant: c"),
        ({"conversations": [USER, ANSWER]}, "user: u | assistant: c"),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "c"}], "system": "s"},
            "system: s | user: u | assistant: c",
        ),
        ({"conversations": [{"from": "user", "value": "u"}, {"from": "chatgpt", "value": "c"}]}, "user: u | assistant: c"),
    ],
)  # fmt: skip
def test_format_is_recognised_by_the_keys(tmp_path, row, turns):
    (conversation,) = read_all(FileSource(write(tmp_path / "rows.jsonl", row)), "instruct")
    assert " | ".join(f"{m['role']}: {m['content']}" for m in conversation.messages) == turns
    assert conversation.answers == ("c",)


def test_row_is_named_by_its_id_or_its_place(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"id": 7} | GOOD, GOOD)
    assert [c.id for c in read_all(FileSource(path), "instruct")] == ["7", f"{path}:2"]


def test_named_format_wins_over_other_keys(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER], "instruction": "i", "output": "o"})
    assert [read_all(FileSource(path, f), "instruct")[0].answer for f in (None, "alpaca")] == ["c", "o"]
    with pytest.raises(DataError, match="format 'alpacca'; .*" + ", ".join(FORMATS)):
        read_all(FileSource(path, "alpacca"), "instruct")


def test_columns_rename_the_columns_of_the_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "a"}, {"question": "r", "answer": "b"})
    rows = read_all(FileSource(path, columns={"prompt": "question", "completion": "answer"}), "instruct")
    assert [(row.prompt[0]["content"], row.answer) for row in rows] == [("q", "a"), ("r", "b")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "question"}, r"columns: 'promt' .* prompt\?"),
        ({"prompt": "qestion"}, r"columns\.prompt: .* 'qestion'; .* question, answer; .* question\?"),
        ({"prompt": "question", "completion": "answer", "input": "context"}, r"columns\.input: .* 'context'; .* question, answer; check"),
    ],
)  # fmt: skip
def test_column_that_does_not_exist_is_one_clear_error(tmp_path, columns, message):
    path = write(tmp_path / "rows.jsonl", *[{"question": "q", "answer": "a"}] * 3)
    with pytest.raises(DataError) as error:
        list(read_rows(FileSource(path, columns=columns), "instruct", Ledger(path)))
    assert re.match(f"{path}: {message}", str(error.value))


def test_optional_column_may_be_absent_from_the_first_rows(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        {"instruction": "i", "output": "o"},
        {"instruction": "i", "context": "x", "output": "o"},
    )
    rows = read_all(FileSource(path, columns={"input": "context"}), "instruct")
    assert [row.prompt[0]["content"] for row in rows] == ["i", "i\n\nx"]


def test_required_column_that_only_some_rows_lack_is_their_defect(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"answer": "a"}, {"question": "q", "answer": "b"})
    ledger = Ledger(path)
    source = FileSource(path, columns={"prompt": "question", "completion": "answer"})
    assert [row.answer for row in read_rows(source, "instruct", ledger)] == ["b"]
    (line,) = ledger.explain()
    assert re.match(f"{path}:1: prompt: missing, .* completion", line)


def test_keys_that_are_null_do_not_decide_the_format(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        {"messages": None, "conversations": None, "prompt": "p", "completion": "c"},
        {"messages": None, "conversations": [USER, ANSWER], "prompt": None, "completion": None},
        {"messages": [USER, ANSWER], "conversations": [7], "prompt": "p", "completion": None},
        {"messages": None, "conversations": None, "prompt": "p", "completion": None},
    )
    ledger = Ledger(path)
    assert [row.answer for row in read_rows(FileSource(path), "instruct", ledger)] == ["c", "c", "c"]
    assert ledger.formats == {"prompt_completion": 1, "messages": 2}
    (line,) = ledger.explain()
    assert line.startswith(f"{path}:4: completion: null ")


def test_system_turn_is_no_part_of_the_context(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", {"messages": [{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER]}
    )
    (row,) = read_all(FileSource(path), "instruct")
    assert row.context == "u\nc\nu"


def test_lines_a_list_a_table_and_their_gzip_give_the_same(tmp_path):
    from datasets import Dataset

    rows = [{"instruction": f"i{n}\nä", "input": "", "output": f'"o", {n}'} for n in range(3)]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_bytes((tmp_path / "a.jsonl").read_bytes())  # one object a line, as in many .json files
    quoted = ['"{}"'.format('","'.join(v.replace('"', '""') for v in row.values())) for row in rows]
    (tmp_path / "d.csv").write_text("instruction,input,output\n" + "\n".join(quoted) + "\n")
    for file in list(tmp_path.iterdir()):
        (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    Dataset.from_list(rows).to_parquet(tmp_path / "e.parquet")
    read = {p.name: [c.messages for c in read_all(FileSource(str(p)), "instruct")] for p in tmp_path.iterdir()}
    assert len(read) == 9
    assert all(messages == read["a.jsonl"] for messages in read.values())
    assert len(read["a.jsonl"]) == 3


def test_lines_are_counted_in_lists_and_in_quoted_cells(tmp_path):
    (tmp_path / "a.json").write_text('[\n\n{"prompt": "p",\n "completion": "c"},\n{"prompt": "p", "completion": "c"}]')
    (tmp_path / "b.csv").write_text('prompt,completion\n"p\n\np",c\n\np,c\n')
    for file, lines in (("a.json", [3, 5]), ("b.csv", [2, 6])):
        path = str(tmp_path / file)
        assert [c.where for c in read_all(FileSource(path), "instruct")] == [f"{path}:{line}" for line in lines]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_list_reads_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(strict_json, "CHUNK", chunk)
    rows = [{"prompt": f'"ä{n}\u2028😀', "completion": "c", "n": 12.5e3, "flag": True} for n in range(5)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    assert [c.prompt[0]["content"] for c in read_all(FileSource(str(path)), "instruct")] == [r["prompt"] for r in rows]


def test_glob_and_folder_are_read_file_after_file(tmp_path):
    write(tmp_path / "b.jsonl", GOOD)
    write(tmp_path / "a.jsonl", GOOD, GOOD)
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "c.jsonl", GOOD)
    (tmp_path / "LICENSE").write_text("free")
    wheres = [c.where for c in read_all(FileSource(f"{tmp_path}/*.jsonl"), "instruct")]
    assert wheres == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.jsonl:1"]
    assert len(files_of(FileSource(f"{tmp_path}/**/*.jsonl"))) == 3
    assert len(files_of(FileSource(f"{tmp_path}/**/**/*.jsonl"))) == 3
    ledger = Ledger(str(tmp_path))
    assert [c.where for c in read_rows(FileSource(str(tmp_path)), "instruct", ledger)] == wheres
    assert [(places, "unread" in kind) for kind, places in ledger.places.items()] == [
        ([f"{tmp_path}/LICENSE", f"{tmp_path}/deep"], True)
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/samples/squad_trian.json", r"no such file; .* data/samples/squad_train\.json\?"),
        ("nowhere/x.jsonl", "no such file; give .* Hub id"),
        ("data/samples/*.foo", "no file matches"),
        ("recipes", "a folder without .json, .jsonl, .csv, .parquet files"),
    ],
)
def test_source_that_does_not_exist_is_one_clear_error(path, message):
    for read in (files_of, lambda source: read_all(source, "instruct")):
        with pytest.raises(DataError) as error:
            read(FileSource(path))
        assert re.match(f"{re.escape(path)}: {message}", str(error.value))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rajpurkar/squad_v2", True),
        ("SetFit/20_newsgroups", True),
        ("owner/data-v1.1", True),
        ("data/samples", False),
        ("nowhere/rows.jsonl", False),
        ("nowhere/rows.json.gz", False),
        ("squad", False),
        ("/etc/x", False),
        ("a/b/c", False),
    ],
)
def test_hub_id_is_owner_and_name_and_no_path(name, expected):
    assert is_hub_id(name) is expected


@pytest.mark.parametrize(
    ("path", "setting", "message"),
    [
        ("data/samples/squad_dev.json", {"split": "test"}, "split 'test': a file"),
        ("data/samples/squad_*.json", {"revision": "v1"}, "revision 'v1': a file"),
        ("data/samples", {"config": "main"}, "config 'main': a file"),
        ("sklearn:20newsgroups", {"config": "main"}, "config 'main': sklearn:20newsgroups"),
    ],
)
def test_setting_that_the_source_does_not_have_is_refused(path, setting, message):
    with pytest.raises(DataError) as error:
        read_all(FileSource(path, **setting), "squad_v2")
    assert str(error.value).startswith(f"{path}: {message} has no ")


def test_commit_of_a_hub_dataset_stands_for_itself():
    assert (
        hub_revision("owner/rows", "0123456789abcdef0123456789abcdef01234567")
        == "0123456789abcdef0123456789abcdef01234567"
    )


def test_hub_that_does_not_answer_gives_no_commit(monkeypatch):
    from huggingface_hub.errors import HTTPError

    def no_network(*_, **__):
        raise HTTPError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    assert hub_revision("owner/rows", "main") is None


def test_samples_hold_no_defect_and_nothing_is_lost():
    ledger = Ledger(str(SAMPLES))
    source = FileSource(str(SAMPLES / "squad_*.json"))
    assert len(list(read_rows(source, "squad_v2", ledger))) == ledger.rows == 384
    assert not ledger.defects
    assert not ledger.notes
