"""Hub datasets are streamed; errors of their libraries are one line. CSV and Parquet: see test_source, test_malformed."""

import re

import pytest
from pyarrow import ArrowCapacityError

from data.conversation import DataError, Ledger
from data.readers.source import FileSource, read_all, read_rows

GOOD = {"prompt": "p", "completion": "c"}


def hub(monkeypatch, load_dataset) -> None:
    monkeypatch.setattr("datasets.load_dataset", load_dataset)


def test_hub_dataset_is_streamed_and_names_split_and_row(monkeypatch):
    def load_dataset(path, **arguments):
        assert (path, arguments) == (
            "owner/rows",
            {"name": "main", "split": "train", "revision": "v1", "streaming": True},
        )
        return iter([GOOD, GOOD | {"completion": None}])

    hub(monkeypatch, load_dataset)
    ledger = Ledger("owner/rows")
    (row,) = read_rows(FileSource("owner/rows", config="main", revision="v1"), "instruct", ledger)
    assert row.where == "owner/rows[main, train]: row 1"
    (line,) = ledger.explain()
    assert line.startswith("owner/rows[main, train]: row 2: completion: null ")


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (ConnectionError("no route\nto host"), "no route to host", "no such path"),
        (RuntimeError("Dataset scripts are no longer supported, but found rows.py"), "Dataset scripts are no longer", "no such path"),
        (TypeError("Couldn't cast array of type string to int64"), "Couldn't cast array of type string to int64", "no such path"),
        (ArrowCapacityError("array is too large"), "array is too large", "no such path"),
        (EOFError(), "EOFError", "no such path"),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample"),
            "Config name is missing. Please pick one among the available configs: ['main', 'socratic'] Example",
            "set config (",
        ),
        (ValueError("BuilderConfig 'mian' not found. Available: ['main']" + "x" * 300), "BuilderConfig 'mian'", "set config ("),
    ],
)  # fmt: skip
def test_unreadable_hub_dataset_is_one_line(monkeypatch, error, reason, remedy):
    def load_dataset(path, **arguments):
        raise error

    hub(monkeypatch, load_dataset)
    with pytest.raises(DataError) as error_info:
        read_all(FileSource("owner/rows", split="test"), "instruct")
    text = str(error_info.value)
    assert text.startswith(f"owner/rows[test]: can't be read: {reason}")
    assert f"; {remedy}" in text
    assert re.search(r"\(no row [^()]*\)$", text)
    assert "\n" not in text
    assert len(text) < 350


def test_hub_dataset_that_fails_midway_reports_the_rows_before(monkeypatch):
    def load_dataset(path, **arguments):
        yield GOOD
        raise ConnectionError("reset by peer")

    hub(monkeypatch, load_dataset)
    ledger = Ledger("owner/rows")
    assert len(list(read_rows(FileSource("owner/rows"), "instruct", ledger))) == 1
    (line,) = ledger.unread
    assert line.startswith("owner/rows[train]: can't be read: reset by peer")
    assert re.search(r"\(after 1 row, [^()]*\)$", line)
