"""Tool calls, trained and served by vLLM with its parser."""

import importlib.util
import json
from pathlib import Path

import pytest

from sft.serving import serve
from sft.serving.serve import free_port
from tests.helpers.builders import save_tiny_qwen3
from tests.helpers.graft import run as graft
from tests.helpers.tools import template

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.serve,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make serve-cpu"),
]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "its name"}},
            "required": ["town"],
        },
    },
}


def rows(prefix: str) -> str:
    def row(town: str) -> dict:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"town": town}}}
        return {
            "messages": [
                {"role": "user", "content": f"{prefix}Weather in {town}?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ],
            "tools": [WEATHER],
        }

    return "".join(json.dumps(row(town)) + "\n" for town in ("Lund", "Kiel", "Turku", "Oslo"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("caller"), template("qwen3")
    base = save_tiny_qwen3(folder / "base", tokenizer)
    (folder / "train.jsonl").write_text(rows(""))
    (folder / "dev.jsonl").write_text(rows(""))
    recipe = {
        "task": "instruct", "model": {"base": str(base), "dtype": "float32"}, "tune": {"method": "full"},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 4096, "leaks": "keep"},
        "train": {"max_steps": 150, "examples_per_step": 4, "learning_rate": 3e-3, "report_to": [], "save_strategy": "no",
                  "output_dir": str(folder / "run")},
        "eval": {"data": str(folder / "dev.jsonl"), "max_new_tokens": 96, "metrics": ["call", "call_arguments"]},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    graft("train", folder / "recipe.yaml")
    graft("export", folder / "run")
    return folder / "run"


def exact(results: Path) -> float:
    return json.loads(results.read_text())["scores"]["total"]["call"]


def test_learnt_calls_score_in_process_and_through_vllms_parser(trained):
    graft("eval", trained)
    assert exact(trained / "eval" / "results.json") == 100
    port = free_port()
    with serve.server([str(trained / "export")], "127.0.0.1", port, trained / f"serve-{port}.log") as running:
        graft("verify", trained, running.url, "--n", 4)
        graft("eval", running.url, "--run", trained, "--out", trained / "http")
        assert exact(trained / "http" / "results.json") == 100
