"""Calls of tools from a trained model to a score: in-process, over HTTP, and what `graft serve` tells vLLM."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from transformers import Qwen2Config

from data.conversation import Ledger
from data.encode.call_text import PARSER, parser_of
from data.encode.calls import spoken_calls, tool_use_of
from data.encode.chat import encode, training_arguments
from data.readers.source import FileSource, read_all, read_rows
from data.readers.tables import without_padding
from data.tool_calls import answer_text, calls_in
from eval.client import sent, server_predictions
from eval.metrics import further_metrics
from eval.tasks import with_calls
from sft.errors import RecipeError
from sft.recipe.load import load_recipe
from sft.serving.serve import serve_command
from sft.serving.targets import Served, check_served_template
from sft.training.examples import training_tokenizer
from tests.helpers import graft
from tests.helpers.builders import save_tiny, write_recipe
from tests.helpers.fake_server import completion, serving
from tests.helpers.tools import ANSWER, RESULT, ROWS, USER, WITH_TOOLS, call, calling, read, row, template

TOOL = {
    "type": "function",
    "function": {"name": "ferry_times", "parameters": {"properties": {"days": {"type": "integer"}}}},
}


def score(name: str, gold, predicted) -> float:
    texts = [answer_text(*parts) for parts in (gold, predicted)]
    return further_metrics([name], None)[name](texts[:1], texts[1])


def made(name: str = "a", **arguments):
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        (("", [made(x=1, y="b")]), ("", [made(y="b", x=1.0)]), 1, 1),  # order of keys, 1.0 is 1
        (("", [made(x=1), made("b")]), ("Text.", [made("b"), made(x=1)]), 1, 1),  # order of calls, text beside them
        (("", [made(x=1)]), ("", [made(x="1")]), 0, 0.5),  # the name is right
        (("", [made(x=1)]), ("", [made("b", x=1)]), 0, 0),
        (("", [made(x=1, y=2)]), ("", [made(x=1)]), 0, 0.8),
        (("", [made(x=True)]), ("", [made(x=1)]), 0, 0.5),
        (("", [made(x=1)]), ("nine", []), 0, 0),
        (("nine", []), ("", [made(x=1)]), 0, 0),
        (("nine", []), ("ten", []), 1, 1),
        (("", [made()]), ("<tool_call>{", []), 0, 0),
        (("", [made()]), ("", [made(), made()]), 0, 2 / 3),
    ],
)
def test_calls_are_scored_by_names_and_arguments(gold, predicted, exact, f1):
    assert score("call", gold, predicted) == exact
    assert score("call_arguments", gold, predicted) == pytest.approx(f1)


def test_each_call_is_a_question_if_calls_are_scored():
    conversation = read(ROWS["another question"])
    assert with_calls([conversation], ["chrf"]) == [conversation]
    asked, last = with_calls([conversation], ["call"])
    assert last == conversation
    assert [m["role"] for m in asked.messages] == ["user", "assistant"]
    assert calls_in(*asked.answers) == [call()["function"]]
    assert asked.id != last.id
    assert asked.cluster == last.cluster


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_call_that_a_model_writes_is_its_row_s_answer(name):
    tokenizer, conversation = template(name), read(row(USER, calling()))
    example = encode(conversation, tokenizer, 8192)
    written = tokenizer.decode([i for i, m in zip(example.ids, example.loss_mask, strict=True) if m])
    arguments = training_arguments(conversation, tokenizer)
    assert spoken_calls(written, conversation.messages, tokenizer, arguments) == conversation.answers[0]
    assert spoken_calls("nine", conversation.messages, tokenizer, arguments) is None
    assert spoken_calls(written, [USER], tokenizer, {}) is None


PARSERS = {
    "qwen2_5": "hermes", "qwen3": "hermes", "qwen3_5_think": "qwen3_coder", "llama3_1": "llama3_json", "gptoss": "openai",
    "gemma4_v5": "gemma4", "glm4moe_training": "glm45", "lfm2_2_5": "lfm2", "muse_glimmer": "muse_glimmer",
    "deepseekv3": "deepseek_v3", "gemma3": None,
}  # fmt: skip


@pytest.mark.parametrize("name", PARSERS)
def test_parser_of_vllm_follows_from_the_template(name):
    assert parser_of(tool_use_of(template(name)).form) == PARSERS[name]


def test_server_is_asked_with_tools_and_its_calls_are_the_answer():
    seen = []
    function = {"name": "ferry_times", "arguments": '{"days": 3, "harbour": "Lund"}'}
    reply = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "x", "type": "function", "function": function}],
    }

    def answer(request):
        seen.append(request)
        return completion("", "tool_calls", choice={"message": reply})

    conversation = read(row(USER, calling(call(id=None)), {"role": "tool", "content": "nine"}, ANSWER))
    with serving(answer, "m") as url:
        (got,) = server_predictions(url, "m", [conversation], 9)
    assert got.finished
    assert further_metrics(["call"], None)["call"]([answer_text("", [call()["function"]])], got.text) == 1
    (request,) = seen
    assert json.dumps(request["tools"]) == json.dumps(conversation.template_arguments["tools"])
    assert "chat_template_kwargs" not in request
    asked, result = request["messages"][1:]
    assert json.loads(asked["tool_calls"][0]["function"]["arguments"]) == call()["function"]["arguments"]
    assert result["tool_call_id"] == asked["tool_calls"][0]["id"]


def test_ids_of_a_file_are_sent_as_they_are():
    messages = sent([USER, calling(call(id="first01")), {**RESULT, "tool_call_id": "first01"}])
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == "first01"


def test_nulls_that_arrow_puts_into_schemas_are_taken_out(tmp_path):
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": "string"}}}}}
        for name, key in (("a", "x"), ("b", "y"))
    ]
    rows = [{**row(USER, calling(call({key: "v"}, name=name)), tools=[tool])}
            for tool, name, key in zip(tools, "ab", "xy", strict=True)]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert "None" in str(pyarrow.Table.from_pylist(rows).to_pylist()[0]["tools"]), "Arrow pads"
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    padded, plain = (read_all(FileSource(str(tmp_path / f"d.{end}")), "instruct") for end in ("parquet", "jsonl"))
    for one, other in zip(padded, plain, strict=True):
        assert json.dumps(one.messages) == json.dumps(other.messages)
        assert json.dumps(one.template_arguments) == json.dumps(other.template_arguments)
    ledger = Ledger("d")
    list(read_rows(FileSource(str(tmp_path / "d.parquet")), "instruct", ledger))
    assert not ledger.notes
    assert without_padding({"prompt": None, "tools": "[]"}) == {"prompt": None, "tools": "[]"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    tokenizer = template("qwen3")
    tokenizer.pad_token = tokenizer.eos_token
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return save_tiny(config, tmp_path_factory.mktemp("tools") / "base", tokenizer)


def test_answer_token_that_the_tokenizer_lacks_is_refused_before_the_run(base, tmp_path):
    data = "{train: data/samples/instructions.jsonl, answer_tokens: [<tool_calls>]}"
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", base, task="instruct", data=data, eval="{share: 0.2}"))
    with pytest.raises(RecipeError, match=r"data\.answer_tokens: '<tool_calls>' .*did you mean <tool_call>"):
        training_tokenizer(recipe)


@pytest.mark.heavy
def test_model_that_learnt_two_rows_scores_100_and_its_folder_names_the_parser(base, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    result = {**RESULT, "content": "at nine"}
    rows = [row(USER, calling(call({"days": d}), content=""), result, {**ANSWER, "content": a}, tools=[TOOL])
            for d, a in ((3, "at nine"),)]  # fmt: skip
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = write_recipe(
        tmp_path / "r.yaml", base, task="instruct", tune="{method: full}",
        data=f"{{train: '{tmp_path}/train.jsonl', max_length: 1024}}",
        train=f"{{examples_per_step: 2, max_steps: 60, learning_rate: 5e-3, save_strategy: 'no', logging_steps: 60, "
        f"output_dir: '{tmp_path}/run'}}",
        eval=f"{{data: '{tmp_path}/test.jsonl', max_new_tokens: 60, metrics: [call, call_arguments]}}",
    )  # fmt: skip
    graft.run("check", recipe, "--out", tmp_path / "report")
    output = graft.run("train", recipe).output
    assert "hermes" in output
    graft.run("eval", tmp_path / "run", "--out", tmp_path / "eval")
    results = json.loads((tmp_path / "eval/results.json").read_text())
    total = results["scores"]["total"]
    assert (total["questions"], total["call"], total["call_arguments"], total["exact"]) == (2, 100, 100, 100)
    served = Served(str(tmp_path / "run/model"), "m")
    _, parser = check_served_template(served)
    command = serve_command(served, "127.0.0.1", 8000, (), {}, parser)
    assert command[-3:] == ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    own = serve_command(served, "127.0.0.1", 8000, ["--tool-call-parser=xlam"], {}, parser)
    assert "hermes" not in own
    config = tmp_path / "run/model/tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), PARSER: "--tool-parser-plugin=/x"}))
    with pytest.raises(Exception, match=PARSER):
        check_served_template(served)
