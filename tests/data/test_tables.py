"""Hub datasets are streamed; errors of their libraries are one line. CSV and Parquet: see test_source, test_malformed."""

import re
import time

import pyarrow
import pytest
import yaml
from pyarrow import ArrowCapacityError, parquet

from data.conversation import DataError, Ledger
from data.readers.source import FileSource, read_all, read_rows

GOOD = {"prompt": "p", "completion": "c"}


class Stream:
    """As `datasets` streams rows."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def decode(self, enable: bool):
        assert not enable
        return self.rows


def hub(monkeypatch, load_dataset) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Stream(load_dataset(*args, **kwargs)))


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


@pytest.mark.parametrize(
    ("header", "reason"),
    [([f"c{i}" for i in range(200_000)], "200,000 columns, the limit is"), (["a"] * 900, "occurs twice")],
)
def test_csv_of_too_many_columns_is_refused_at_once(tmp_path, header, reason):
    file = tmp_path / "d.csv"
    file.write_text(",".join(header) + "\n" + "x\n" * 1000)
    start = time.monotonic()
    with pytest.raises(DataError, match=reason):
        read_all(FileSource(str(file)), "instruct")
    assert time.monotonic() - start < 2


CARDS = {
    "address": "http://127.0.0.1:9/latest/meta-data",
    "file of this machine": "/etc/passwd",
    "address of a file": "file:///etc/passwd",
    "another repository": "hf://datasets/owner/other/rows.jsonl",
    "above the repository": "../other/rows.jsonl",
    "chained": "zip://rows.jsonl::http://127.0.0.1:9/a.zip",
    "other protocol": "ftp://127.0.0.1:9/rows.jsonl",
}


@pytest.mark.parametrize("named", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("key", ["data_files", "splits", "data_dir", "another config"])
def test_card_of_a_hub_dataset_names_files_of_the_dataset_only(named, key, monkeypatch, tmp_path):
    config = {"config_name": "default"}
    if key == "splits":
        config["data_files"] = [{"split": "train", "path": ["rows.jsonl", named]}]
    else:
        config["data_dir" if key == "data_dir" else "data_files"] = named
    configs = [{"config_name": "first", "data_files": "rows.jsonl"}] if key == "another config" else []
    (tmp_path / "README.md").write_text("---\n" + yaml.safe_dump({"configs": [*configs, config]}) + "---\n")
    asked = []

    def download(*args, filename: str = "", **kwargs) -> str:
        return str(tmp_path / filename)

    def cached(*args, **kwargs) -> str:
        raise FileNotFoundError

    def glob(self, path, **kwargs):
        asked.append(path)
        return {path: {"type": "file", "name": path}} if path.endswith("rows.jsonl") else {}

    from datasets import load

    def load_dataset(path, **arguments):
        module = load.HubDatasetModuleFactory("owner/name", "0" * 40).get_module()
        for config in module.builder_configs_parameters.builder_configs or []:
            config._resolve_data_files(module.builder_kwargs["base_path"], None)
        return iter([GOOD])

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", download)
    monkeypatch.setattr(load, "cached_path", cached)
    monkeypatch.setattr("huggingface_hub.HfFileSystem.glob", glob)
    monkeypatch.setattr("datasets.data_files._get_origin_metadata", lambda files, **_: [("x",)] * len(files))
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("asked a server"))
    hub(monkeypatch, load_dataset)
    with pytest.raises(DataError, match=r"owner/name\[train\]: .*file") as error_info:
        read_all(FileSource("owner/name"), "instruct")
    assert "is not of the dataset" in str(error_info.value) or named not in str(error_info.value)
    assert all(path.startswith("datasets/owner/name@") and ".." not in path for path in asked)


def test_image_of_a_row_is_not_fetched(tmp_path, monkeypatch):
    """A Parquet file can name an image by any address, and `datasets` would ask for it."""
    from datasets import Features, Image, Value

    features = Features({"prompt": Value("string"), "completion": Value("string"), "image": Image()})
    row = GOOD | {"image": {"path": "http://127.0.0.1:9/x.png", "bytes": None}}
    parquet.write_table(pyarrow.Table.from_pylist([row], schema=features.arrow_schema), tmp_path / "d.parquet")
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("asked a server"))
    ledger = Ledger("d")
    list(read_rows(FileSource(str(tmp_path / "d.parquet")), "instruct", ledger))
    assert ledger.rows == 1
    assert not ledger.unread
