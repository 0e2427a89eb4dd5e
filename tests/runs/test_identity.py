"""What a run is made from: no change of its data or base passes for the same run."""

import json
import shutil
from pathlib import Path

import pytest

from sft.errors import RunError
from sft.models.resolve import model_files
from sft.runs.manifest import identity
from sft.runs.resume import check_unchanged, made_from

MADE = {"recipe": {}, "data": {}, "base": {}, "processes": 1, "packages": {}}


@pytest.mark.parametrize(
    ("then", "now", "shown"),
    [
        ({"a": "1", "b": "1"}, {"a": "1"}, 'b: then "1", now nothing'),
        ({"a": "1", "b": "1"}, {"b": "1"}, 'a: then "1", now nothing'),
        ({"a": "1"}, {"a": "1", "b": "1"}, 'b: then nothing, now "1"'),
        ({"a": "1", "b": "1", "c": "2"}, {"x": "1", "y": "2", "z": "2"}, 'b: then "1", now nothing'),
        ({"a": "1", "b": "1", "c": "2"}, {"a": "1", "b": "2", "c": "2"}, 'b: then "1", now "2"'),
        ({"a": "1", "b": "2"}, {"c": "2", "d": "1"}, "the same contents in other places"),
        ({"a": "1"}, {}, 'a: then "1", now nothing'),
    ],
)
def test_each_content_counts_as_often_as_it_occurs(then, now, shown):
    """Two of three equal files are other data than three."""
    for kind in ("data", "base"):
        with pytest.raises(RunError, match=f"(?s){kind} changed.*{shown}") as caught:
            check_unchanged(Path("run"), MADE | {kind: then}, MADE | {kind: now})
        assert len(str(caught.value).splitlines()) < 3 + len(then)


def test_moved_files_are_the_same_data():
    then, now = {"a": "1", "b": "1", "c": "2"}, {"x/a": "1", "x/b": "1", "x/c": "2"}
    assert check_unchanged(Path("run"), MADE | {"data": then}, MADE | {"data": now}) == []


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "model.safetensors",
    ],
)
def test_every_file_that_is_read_of_a_base_belongs_to_its_identity(name, tiny, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    first = identity(str(base), None)["sha256"]
    (base / "README.md").write_text("not read")
    (base / "pytorch_model.bin").write_text("not read")
    assert identity(str(base), None)["sha256"] == first
    (base / name).parent.mkdir(exist_ok=True)
    if name.endswith(".json"):
        content = json.loads((base / name).read_text()) if (base / name).is_file() else {}
        (base / name).write_text(json.dumps(content | {"eos_token": "<|endoftext|>"}))
    else:
        with (base / name).open("ab") as file:
            file.write(b" ")
    assert {key for key, _ in first.items() ^ identity(str(base), None)["sha256"].items()} == {name}


def test_hub_id_has_no_files():
    assert model_files(Path("owner/name")) == []


def test_other_examples_of_the_same_files_are_other_data(tmp_path, tiny):
    """Such as labels that are the names of folders."""
    from tests.helpers.builders import write_recipe

    recipe = write_recipe(tmp_path / "recipe.yaml", tiny)
    facts = {"data_sha256": {}, "data_revision": {}, "base": {"sha256": {}, "commit": None}, "packages": {}}
    then, now = (made_from(recipe.parent, facts | {"examples_sha256": digest}, 1) for digest in "12")
    with pytest.raises(RunError, match="data: encoded examples: then"):
        check_unchanged(tmp_path, then, now)
