"""Instruction rows in jsonl: three layouts, and every defect named with file and line."""

import gzip
import json
from pathlib import Path

import pytest

from data.chat import DataError
from data.jsonl import read_jsonl


def write(tmp_path: Path, *lines: str | dict) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("row", "roles", "prompt"),
    [
        ({"prompt": "p", "completion": "c"}, ["user", "assistant"], "p"),
        ({"instruction": "i", "input": "x", "output": "c"}, ["user", "assistant"], "i\n\nx"),
        ({"instruction": "i", "input": "", "output": "c"}, ["user", "assistant"], "i"),
        ({"instruction": "i", "output": "c", "system": "s"}, ["system", "user", "assistant"], "i"),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "c"}]},
            ["system", "user", "assistant"],
            "u",
        ),
    ],
)  # fmt: skip
def test_layouts_are_told_apart_by_their_keys(tmp_path, row, roles, prompt):
    (conversation,) = read_jsonl(write(tmp_path, row))
    assert [m["role"] for m in conversation.messages] == roles
    assert conversation.prompt[-1]["content"] == prompt
    assert conversation.answers == ("c",)


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "p",}', "not a JSON object"),
        ('{"prompt": "p"} {"prompt": "q"}', "not a JSON object"),
        ("[1]", "list where one JSON object a line"),
        ('{"prompt": "p", "prompt": "q", "completion": "c"}', "duplicate key 'prompt'"),
        ('{"prompt": "p", "completion": NaN}', "NaN is not JSON"),
        ({"prompt": "p", "completion": ""}, "completion must be non-empty text"),
        ({"prompt": "p", "completion": None}, "completion must be non-empty text, found null"),
        ({"question": "p"}, r"keys \['question'\]; need"),
        ({"messages": [{"role": "user", "content": "u"}]}, "the last turn is user's"),
        ({"messages": [{"role": "assistant", "content": "u"}]}, "must take turns"),
        ({"messages": [{"role": "tool", "content": "u"}]}, r"messages\[0\]: role must be one of"),
        ({"messages": "hello"}, "messages must be a list"),
    ],
)
def test_defect_names_file_and_line(tmp_path, bad, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{message}|rows\.jsonl:3: {message}"):
        read_jsonl(write(tmp_path, GOOD, "", bad))


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xe9", "completion": "c"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not UTF-8"):
        read_jsonl(path)


def test_byte_order_mark_crlf_and_gzip_are_read(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n"))
    assert len(read_jsonl(path)) == 1


def test_file_without_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no row"):
        read_jsonl(write(tmp_path, ""))
