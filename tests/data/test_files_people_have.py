"""Ten files as people have them: from the raw file to a scored adapter, with one recipe each."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.builders import save_tiny_qwen3
from tests.helpers.graft import run as graft
from tests.helpers.tools import template

pytestmark = [pytest.mark.heavy, pytest.mark.slow]

TOWNS = ["Lund", "Ystad", "Malmö", "Kiel", "Gdynia", "Turku"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "its name"}}},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Qwen3 whose template knows thoughts and tools."""
    tokenizer = template("qwen3")
    return save_tiny_qwen3(tmp_path_factory.mktemp("models") / "base", tokenizer, hidden=64)


def chat_of_openai(town: str) -> dict[str, Any]:
    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "weather", "arguments": json.dumps({"town": town})},
    }
    return {
        "messages": [
            {"role": "system", "content": "You answer about the weather."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Yes??", "weight": 0},
            {"role": "user", "content": f"How is the weather in {town}?"},
            {"role": "assistant", "tool_calls": [call]},
        ],
        "tools": [WEATHER],
        "parallel_tool_calls": False,
    }


def tools_of_sharegpt(town: str) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "human", "value": f"How is the weather in {town}?"},
            {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"town": town}})},
            {"from": "observation", "value": '{"degrees": 7}'},
            {"from": "gpt", "value": "It is cold, at 7 degrees."},
        ],
        "system": "",
        "tools": json.dumps([WEATHER["function"]]),
    }


def calls_of_hermes(town: str) -> dict[str, Any]:
    call = json.dumps({"name": "weather", "arguments": {"town": town}})
    return {
        "id": town,
        "conversations": [
            {"from": "human", "value": f"How is the weather in {town}?"},
            {"from": "gpt", "value": f"<tool_call>\n{call}\n</tool_call>"},
            {"from": "tool", "value": '<tool_response>\n{"degrees": 7}\n</tool_response>'},
            {"from": "gpt", "value": "It is cold, at 7 degrees."},
        ],
        "tools": json.dumps([WEATHER]),
    }


def squad_in_chinese(town: str) -> dict[str, Any]:
    context = f"{town}的渡轮每天早上八点出发，码头有十二个蜂箱。"
    answers = [{"text": "八点", "answer_start": context.index("八点")}]
    qas = [{"id": f"Q_{town}", "question": f"去{town}的渡轮几点出发？", "answers": answers}]
    return {"title": town, "paragraphs": [{"context": context, "qas": qas}]}


# format of the file, a row about a town, keys of the source, other keys of the recipe, the scores that are reported
FILES: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any], set[str]]] = {
    "OpenAI's chat, weights and tools": (
        "jsonl", chat_of_openai, {}, {"eval": {"metrics": ["call", "call_arguments"]}}, {"call", "call_arguments"},
    ),
    "ShareGPT with tools": (
        "json", tools_of_sharegpt, {}, {"eval": {"metrics": ["call", "call_arguments"]}}, {"call", "call_arguments"},
    ),
    "Hermes' function calls": ("jsonl", calls_of_hermes, {}, {"eval": {"metrics": ["call"]}}, {"call"}),
    "alpaca": (
        "json",
        lambda town: {"instruction": "Name the country.", "input": town, "output": f"The country of {town}."},
        {}, {}, {"exact", "f1"},
    ),
    "Dolly as CSV": (
        "csv",
        lambda town: {"instruction": f"Where is {town}?", "context": f"{town} is in the north.", "response": "In the north.",
                      "category": "closed_qa"},
        {"columns": {"input": "context", "output": "response"}}, {"eval": {"metrics": ["rouge_l", "chrf"]}},
        {"rouge_l", "chrf"},
    ),
    "one system prompt for a list of lines": (
        "json",
        lambda town: {"instruction": f"小姐，{town}的天气如何？", "input": "", "output": "今儿个天气极好，臣妾欢喜。"},
        {"system": "现在你要扮演皇帝身边的女人。"}, {}, {"exact", "f1"},
    ),
    "text to SQL from columns": (
        "jsonl",
        lambda town: {"schema": "CREATE TABLE ferries (town TEXT, hour INT)", "question": f"When does {town} leave?",
                      "sql": f"SELECT hour FROM ferries WHERE town = '{town}'"},  # noqa: S608, text
        {"prompt": "{schema}\n{question}", "completion": "{sql}"}, {}, {"exact", "f1"},
    ),
    "GSM8K": (
        "jsonl",
        lambda town: {"question": f"{town} has 3 ferries with 4 cars each. How many cars?", "answer": "3 * 4 = 12\n#### 12"},
        {"columns": {"prompt": "question", "completion": "answer"}}, {"eval": {"metrics": ["number"]}}, {"number"},
    ),
    "SQuAD in Chinese": ("squad", squad_in_chinese, {}, {"task": "squad_v1"}, {"exact", "f1"}),
    "thoughts of R1": (
        "jsonl",
        lambda town: {"messages": [
            {"role": "user", "content": f"How many letters has {town}?"},
            {"role": "assistant", "content": f"<think>\nI count them: {', '.join(town)}.\n</think>\n\n{len(town)}"},
        ]},
        {}, {"eval": {"max_new_tokens": 24}}, {"exact", "f1"},
    ),
}  # fmt: skip


def write(file: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    file = file.with_suffix(".json" if kind == "squad" else f".{kind}")
    if kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as handle:
            table = csv.DictWriter(handle, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        tree = {"version": "v2.0", "data": rows} if kind == "squad" else rows
        file.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", FILES)
def test_file_goes_from_raw_to_a_scored_adapter(name, base, tmp_path):
    kind, row, source, more, scores = FILES[name]
    train = write(tmp_path / "train", kind, [row(town) for town in TOWNS[:4]])
    held_out = write(tmp_path / "held_out", kind, [row(town) for town in TOWNS[4:]])
    recipe = {
        "task": more.get("task", "instruct"),
        "model": {"base": str(base), "dtype": "float32"},
        "tune": {"method": "lora", "r": 4, "target_modules": "all-linear"},
        "data": {"train": {"path": str(train), **source}, "max_length": 2048, "leaks": "keep"},
        "train": {"max_steps": 2, "examples_per_step": 4, "report_to": [], "output_dir": str(tmp_path / "run"),
                  "save_strategy": "no"},
        "eval": {"data": {"path": str(held_out), **source}, "max_new_tokens": 8, **more.get("eval", {})},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe, ensure_ascii=False))
    assert "Ready to train" in graft("check", tmp_path / "recipe.yaml").stdout
    graft("train", tmp_path / "recipe.yaml")
    graft("eval", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
    total = results["scores"]["total"]
    assert scores <= total.keys()
    assert all(len(total[f"{score}_95"]) == 2 for score in scores)
    assert total["questions"] == (
        4 if "tools" in row("Lund") and "conversations" in row("Lund") else 2
    )  # answers of a row
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
