"""A model whose template opens each answer with a thought, trained, scored in-process and served by vLLM."""

import importlib.util
import json
from pathlib import Path

import pytest

from sft.serving import serve
from sft.serving.serve import free_port
from tests.helpers.builders import save_tiny_qwen3, write_recipe
from tests.helpers.families import build
from tests.helpers.graft import run as graft

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.serve,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make serve-cpu"),
]

QUESTIONS = [
    ("What leaves at eight?", "ferry"), ("Where does it go?", "Lund"), ("How many hives are there?", "12"),
    ("Whose piano is it?", "mayor"),
]  # fmt: skip
CONTEXT = "The ferry to Lund leaves at eight. The mayor owns a piano and keeps 12 hives behind the school."


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run of a tiny Qwen3 that has learnt four answers by heart; it is exported."""
    folder, tokenizer = tmp_path_factory.mktemp("thinker"), build("qwen3")
    base = save_tiny_qwen3(folder / "base", tokenizer)
    files = {name: folder / f"{name}.json" for name in ("train", "dev")}
    for name, file in files.items():
        qas = [
            {"id": f"{name}-{i}", "question": question, "is_impossible": False,
             "answers": [{"text": answer, "answer_start": CONTEXT.index(answer)}]}
            for i, (question, answer) in enumerate(QUESTIONS)
        ]  # fmt: skip
        file.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    train = {
        "examples_per_step": 4, "max_steps": 150, "learning_rate": 3e-3, "save_strategy": "no", "report_to": [],
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    recipe = write_recipe(
        folder / "recipe.yaml", base, model=f"{{base: '{base}', dtype: float32}}", tune="{method: full}",
        data=f"{{train: '{files['train']}', max_length: 1024, leaks: keep}}",
        train=json.dumps(train), eval=f"{{data: '{files['dev']}', max_new_tokens: 16}}",
    )  # fmt: skip
    graft("train", recipe)
    graft("export", folder / "run")
    return folder / "run"


def exact(results: Path) -> float:
    return json.loads(results.read_text())["scores"]["total"]["exact"]


def test_learnt_answers_score_in_process_and_over_http_and_the_switch_binds_the_server(trained, monkeypatch):
    graft("eval", trained)
    assert exact(trained / "eval" / "results.json") == 100
    bind = serve.check_served_template
    for arguments, right in ((bind, True), (lambda served: ({}, None), False)):
        monkeypatch.setattr(serve, "check_served_template", arguments)
        port = free_port()
        with serve.server([str(trained / "export")], "127.0.0.1", port, trained / f"serve-{port}.log") as running:
            graft("verify", trained, running.url, "--n", 4, code=0 if right else 1)
            out = trained / f"http-{port}"
            graft("eval", running.url, "--run", trained, "--out", out)
            assert (exact(out / "results.json") == 100) == right
