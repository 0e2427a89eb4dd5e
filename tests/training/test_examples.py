"""Examples are encoded once and read from the cache, unless anything that they depend on has changed."""

import copy
import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from data.cache import build_once
from data.conversation import DATE, DataError
from data.encode.chat import Example, encode_prompt
from data.encode.example_store import Examples
from data.encode.template import date_arguments
from sft.models.load import load_tokenizer
from sft.models.target import adapter_tokenizer
from sft.recipe.load import load_recipe
from sft.recipe.schema import Model
from sft.training import examples as module
from sft.training.examples import examined, held_out_conversations, load_examples, training_tokenizer
from tests.helpers.builders import stored, write_recipe
from tests.helpers.graft import run as graft

pytestmark = pytest.mark.heavy


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Grows by one with each examination."""
    calls: list[int] = []
    real = module.examine
    monkeypatch.setattr(module, "examine", lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.fixture
def recipe(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "q", "completion": "d"}\n')
    data = f"{{train: '{tmp_path}/rows.jsonl', max_length: 64}}"
    return load_recipe(write_recipe(tmp_path / "r.yaml", tiny, task="instruct", data=data, eval="{limit: 5}"))


def test_examples_read_back_as_they_were_written(tmp_path):
    examples = [Example([1, 2, 3], [0, 1, 1], "c", "f:1"), Example([4], [1], "d", "f:2")]
    read = stored(tmp_path, examples, [1.0, 0.3])
    assert list(read) == examples
    assert [e.where for e in read[0:2]] == ["f:1", "f:2"]
    assert read[-1].ids == [4]
    assert (read.contexts, read.weights) == (["c", "d"], [1.0, 0.3])
    with pytest.raises(IndexError):
        read[2]


def test_second_run_reads_what_the_first_one_encoded(recipe, counted):
    tokenizer = load_tokenizer(recipe.model)
    first, report = load_examples(recipe, tokenizer)
    again, same = load_examples(recipe, tokenizer)
    assert len(counted) == 1
    assert (list(first), report) == (list(again), same)


def test_changed_file_recipe_or_template_is_encoded_again(recipe, counted, tmp_path):
    tokenizer = load_tokenizer(recipe.model)
    load_examples(recipe, tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("You are", "You have always been")
    load_examples(recipe, tokenizer)
    load_examples(recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 65})}), tokenizer)
    tokenizer.eos_token = "<|endoftext|>"  # templates use special tokens
    load_examples(recipe, tokenizer)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "C"}\n{"prompt": "q", "completion": "d"}\n')
    load_examples(recipe, tokenizer)
    assert len(counted) == 5
    load_examples(recipe, tokenizer)
    assert len(counted) == 5


def test_damaged_examples_are_encoded_again_with_a_line(recipe, counted, tmp_path, capsys):
    """Ids in the middle of the file: Arrow itself does not notice."""
    tokenizer = load_tokenizer(recipe.model)
    examples, report = load_examples(recipe, tokenizer)
    written = list(examples)
    (file,) = (tmp_path / "cache" / "examples").glob("*/examples.arrow")
    content, ids = bytearray(file.read_bytes()), np.array(written[0].ids, np.int32).tobytes()
    content[content.index(ids)] ^= 1
    file.write_bytes(content)
    assert Examples(file.parent)[0].ids != written[0].ids
    again, same = load_examples(recipe, tokenizer)
    assert (len(counted), list(again), same) == (2, written, report)
    assert f"{file.parent}: examples.arrow is damaged" in capsys.readouterr().err


def test_digest_of_the_examples_is_that_of_what_is_trained(recipe, tmp_path):
    """Of ids, masks, weights and order, not of names and places; nor of a date that a template renders."""
    rows = [Example([1, 2], [0, 1]), Example([3], [1])]
    others = [
        ([Example([1, 9], [0, 1]), rows[1]], None),
        ([Example([1, 2], [1, 1]), rows[1]], None),
        ([Example([1], [0]), Example([2, 3], [1, 1])], None),
        (rows[::-1], None),
        (rows, [1.0, 0.5]),
        (rows * 3000, None),
    ]
    same = stored(tmp_path / "same", [replace(row, context="c", where="f:1") for row in rows])
    digests = [stored(tmp_path / "rows", rows).sha256()]
    assert same.sha256() == digests[0]
    digests += [stored(tmp_path / str(i), *other).sha256() for i, other in enumerate(others)]
    assert len({*digests}) == 7
    tokenizer = load_tokenizer(recipe.model)
    assert load_examples(recipe, tokenizer)[1].examples_sha256
    tokenizer.chat_template += "{{ strftime_now('%d') if false }}"
    assert load_examples(recipe, tokenizer)[1].examples_sha256 is None


def test_label_that_is_a_folders_name_belongs_to_the_key(recipe, counted, tmp_path):
    for group in ("sci.space", "sci.med"):
        (tmp_path / "news" / group).mkdir(parents=True)
        (tmp_path / "news" / group / "1").write_text(f"From: a\nSubject: b\n\nAll about {group}.\n\n--\na\n")
    data = recipe.data.train[0].model_copy(update={"path": str(tmp_path / "news")})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": (data,), "max_length": 512})})
    tokenizer = load_tokenizer(recipe.model)
    assert set(load_examples(recipe, tokenizer)[1].labels) == {"sci.space", "sci.med"}
    (tmp_path / "news" / "sci.space").rename(tmp_path / "news" / "sci.crypt")
    assert set(load_examples(recipe, tokenizer)[1].labels) == {"sci.crypt", "sci.med"}
    assert len(counted) == 2


def test_file_that_changes_while_it_is_read_is_an_error(recipe, monkeypatch, tmp_path):
    real = module.examine

    def examine(*arguments):
        (tmp_path / "rows.jsonl").write_text('{"prompt": "other", "completion": "c"}\n')
        return real(*arguments)

    monkeypatch.setattr(module, "examine", examine)
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while"):
        load_examples(recipe, load_tokenizer(recipe.model))


def test_data_that_stops_the_run_is_never_cached(recipe, counted, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": ""}\n')
    tokenizer = load_tokenizer(recipe.model)
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl:1: completion"):
            load_examples(recipe, tokenizer)
    assert len(counted) == 2
    assert examined(recipe, tokenizer)[0].stops
    assert not list((tmp_path / "cache" / "examples").iterdir())


def test_two_processes_may_build_one_store_at_once(tmp_path):
    """The second one drops its copy and reads the first one's."""

    def build_while_another_publishes(folder: Path) -> None:
        stored(folder, [Example([1], [1])])
        build_once(tmp_path / "key", lambda other: stored(other, [Example([1], [1])]) and None)

    assert list(Examples(build_once(tmp_path / "key", build_while_another_publishes))) == [Example([1], [1])]
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_broken_build_leaves_nothing(tmp_path):
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "key", build)
    assert not list(tmp_path.iterdir())


def test_held_out_share_is_what_eval_scores(tmp_path, tiny):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny, eval="{share: 0.3}"))
    held_out = held_out_conversations(recipe)
    assert held_out
    examples, _ = load_examples(recipe, load_tokenizer(recipe.model))
    assert not {c.where for c in held_out} & {e.where for e in examples}


def test_share_that_holds_out_nothing_stops_before_training(tmp_path, tiny):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny, eval="{share: 1e-9}"))
    with pytest.raises(DataError, match=r"eval\.share 1e-09 holds out nothing"):
        load_examples(recipe, load_tokenizer(recipe.model))
    with pytest.raises(DataError, match="holds out nothing"):
        held_out_conversations(recipe)


def test_report_names_the_base_of_this_recipe_if_another_encoded_the_same(recipe, counted, tmp_path):
    tokenizer = load_tokenizer(recipe.model)
    load_examples(recipe, tokenizer)
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": "owner/copy"})})
    _, report = load_examples(other, tokenizer)
    assert len(counted) == 1
    assert report.tokenizer["base"] == "owner/copy"


def test_check_writes_report_and_page_and_says_by_its_code_what_stops(tmp_path, tiny):
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "p", "completion": "c"}\n{"prompt": "<script>", "completion": ""}\n'
    )
    data = f"{{train: '{tmp_path}/rows.jsonl', max_length: 64}}"
    recipe = write_recipe(tmp_path / "r.yaml", tiny, task="instruct", data=data, eval="{limit: 5}")

    command = "check", recipe, "--out", tmp_path / "report"
    assert "rows.jsonl:2: completion: empty text" in " ".join(graft(*command, code=1).output.split())
    graft(*command, "--set", "data.on_error=skip")
    report = json.loads((tmp_path / "report" / "data_report.json").read_text())
    assert report["totals"]["examples"] == 1
    assert list(report["sources"][0]["sha256"]) == [f"{tmp_path}/rows.jsonl"]
    page = (tmp_path / "report" / "data_report.html").read_text()
    assert "<script>" not in page.replace("<script>\n", "")


@pytest.mark.parametrize("cache", ["/dev/null/graft", "/proc/graft"])
def test_cache_that_can_not_be_written_costs_time_only(cache, tiny, tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny))
    tokenizer = load_tokenizer(recipe.model)
    expected = list(load_examples(recipe, tokenizer)[0])
    monkeypatch.setenv("GRAFT_CACHE", cache)
    assert list(load_examples(recipe, tokenizer)[0]) == expected


def test_date_of_a_template_is_fixed_once_in_the_recipe_of_the_run(tiny, tmp_path, monkeypatch):
    """A run that is resumed or scored tomorrow sees the prompts of today."""
    base = shutil.copytree(tiny, tmp_path / "base")
    file = base / "chat_template.jinja"
    file.write_text(
        "{{ strftime_now('%d %B %Y') }}"
        + (file.read_text() if file.is_file() else load_tokenizer(Model(base=str(tiny))).chat_template)
    )

    class Day(date):
        now = date(2026, 11, 2)

        @classmethod
        def today(cls):
            return cls.now

    monkeypatch.setattr(module, "date", Day)
    recipe = write_recipe(
        tmp_path / "r.yaml",
        base,
        train=f"{{examples_per_step: 6, max_steps: 4, save_strategy: steps, save_steps: 2, output_dir: '{tmp_path / 'run'}'}}",
    )
    assert "2026-11-02" in graft("check", recipe, "--out", tmp_path / "report").stdout
    graft("train", recipe)
    assert "02 November 2026" in decoded_prompt(tmp_path / "run")
    whole = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(Day, "now", date(2026, 11, 3))
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    graft("train", "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert "02 November 2026" in decoded_prompt(tmp_path / "run")
    graft("export", tmp_path / "run", "--allow-mismatch")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "export").init_kwargs[DATE] == "2026-11-02"
    fresh, _ = load_examples(load_recipe(recipe), training_tokenizer(load_recipe(recipe)))
    assert "03 November 2026" in load_tokenizer(Model(base=str(base))).decode(fresh[0].ids)


def decoded_prompt(run: Path) -> str:
    tokenizer = adapter_tokenizer(run / "adapter")
    return tokenizer.decode(encode_prompt([{"role": "user", "content": "Who?"}], tokenizer))


def test_server_is_given_the_date_by_the_variable_that_a_template_has_for_it(tokenizer):
    llama = copy.deepcopy(tokenizer)
    llama.chat_template = (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}{%- endif %}{{ date_string }}'
    )
    assert date_arguments(llama) == {}
    llama.init_kwargs[DATE] = "2026-11-02"
    assert date_arguments(llama) == {"date_string": "02 Nov 2026"}
    llama.chat_template = "{{ strftime_now('%Y') }}"
    assert date_arguments(llama) == {}
