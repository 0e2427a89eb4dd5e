"""Exports in fewer bits, and how they are checked. Fake tools damage them in planted ways; llama.cpp itself runs if
LLAMA_CPP names it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sft.export.formats
from sft.errors import RunError
from sft.export.parity import least_agreement
from sft.models.target import run_recipe
from tests.helpers.exports import chatml_base, command, make_run
from tests.helpers.places import ROOT
from tests.helpers.processes import gone

pytestmark = pytest.mark.heavy

ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    run_folder = make_run(folder / "run", chatml_base(folder / "base"), quantized=False)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = run_folder / "recipe.yaml"
    text = recipe.read_text().replace("data/samples/squad_train.json, max_contexts: 4", str(folder / "train.jsonl"))
    recipe.write_text(text)
    return run_folder


def compressor(folder: Path, damage: str, monkeypatch) -> None:
    """Replace llm-compressor's Python by a program that copies the model and then damages the copy."""
    program = folder / "python"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, shutil, sys\n"
        "from pathlib import Path\n"
        "if '-c' in sys.argv:  # whether it has llm-compressor\n"
        "    sys.exit()\n"
        "_, _, script, model, out, scheme, rows = sys.argv\n"
        "assert Path(script).name == 'compress.py' and scheme == 'W4A16', sys.argv\n"
        "rows, out = json.loads(Path(rows).read_text()), Path(out)\n"
        "assert len(rows) == 40 and all(isinstance(i, int) for row in rows for i in row), rows\n"
        "shutil.copytree(model, out)\n"
        "(out / 'recipe.yaml').write_text('default_stage: {}')\n"
        "(out / 'chat_template.jinja').write_text('{{ messages }}')\n" + damage
    )
    program.chmod(0o755)
    monkeypatch.setenv("GRAFT_LLMCOMPRESSOR", str(program))
    find = sft.export.formats.importlib.util.find_spec
    monkeypatch.setattr(sft.export.formats.importlib.util, "find_spec", lambda n: n == "compressed_tensors" or find(n))


def test_format_is_written_with_its_own_parity(run, tmp_path, monkeypatch):
    compressor(tmp_path, "", monkeypatch)
    out = tmp_path / "out"
    done = command(run, "--format", "w4a16", "--out", out)
    parity = json.loads((out / "parity.json").read_text())
    assert parity["format"]["name"] == "w4a16"
    assert parity["format"]["calibration_rows"] == 40
    assert parity["format"]["answer_argmax_agreement"] == parity["answer_argmax_agreement"]  # the copy is the merge
    assert "w4a16" in (out / "README.md").read_text()
    assert f"next: graft serve {out}" in done.stdout.replace("\n", "")
    assert not (out / "recipe.yaml").exists()  # a folder with one is a run
    assert (out / "chat_template.jinja").read_text() != "{{ messages }}"  # it is the run's
    assert "rounded them" in command(out, "--run", run, name="verify").stderr
    weights = load_file(out / "model.safetensors")
    save_file({name: torch.zeros_like(w) for name, w in weights.items()}, out / "model.safetensors", {"format": "pt"})
    assert "w4a16 and adapter agree" in command(out, "--run", run, code=2, name="verify").stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("sys.exit('no space for the scales')\n", r"llm-compressor failed \(1\): no space for the scales; see "),
        (
            "from safetensors.torch import load_file, save_file\n"
            "w = load_file(out / 'model.safetensors')\n"
            "save_file({k: v * 0 for k, v in w.items()}, out / 'model.safetensors', {'format': 'pt'})\n",
            "export.min_format_agreement 95.00%; nothing was written",
        ),
        (
            "from safetensors.torch import load_file, save_file\n"
            "w = load_file(out / 'model.safetensors')\n"
            "del w['model.layers.0.mlp.down_proj.weight']\n"
            "save_file(w, out / 'model.safetensors', {'format': 'pt'})\n",
            "down_proj.weight, .*config.json .* missing",
        ),
    ],
)
def test_what_a_compressor_breaks_is_not_written(damage, message, run, tmp_path, monkeypatch):
    compressor(tmp_path, damage, monkeypatch)
    done = command(run, "--format", "w4a16", "--out", tmp_path / "out", code=2)
    assert re.search(message, " ".join(done.stderr.split()))
    assert not (tmp_path / "out").exists()
    log = run / "export-w4a16.log"
    assert log.exists() == ("failed" in message)
    log.unlink(missing_ok=True)


def test_tool_ends_with_its_caller(tmp_path):
    pid = tmp_path / "pid"
    tool = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    caller = "import sys; from pathlib import Path; from sft.child_process import run_tool\n"
    caller += f"run_tool('tool', [sys.executable, '-c', {tool!r}], Path({str(tmp_path / 'log')!r}))"
    parent = subprocess.Popen([sys.executable, "-c", caller], cwd=ROOT)
    while not (pid.is_file() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert gone([int(pid.read_text())])


@pytest.mark.parametrize(("name", "key"), [("gguf-f32", "min_agreement"), ("gguf-q8_0", "min_format_agreement")])
def test_format_that_rounds_nothing_must_agree_as_much_as_a_merge(name, key, run):
    assert least_agreement(run_recipe(run), name)[0] == key


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w3a16", "write one of w4a16, w8a8, fp8, or gguf-TYPE"),
        ("gguf-../x", "write one of"),
        ("w8a8", "python3 -m venv lc && lc/bin/pip install llmcompressor"),
        (
            "gguf-q8_0",
            "convert_hf_to_gguf.py, .* PATH; run: git clone https://github.com/ggml-org/llama.cpp",
        ),
    ],
)
def test_missing_tool_is_reported_before_anything_is_merged(name, message, run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("GRAFT_LLMCOMPRESSOR", "LLAMA_CPP"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sft.export.pipeline.read_trained", lambda run: pytest.fail("read the run first"))
    assert re.search(
        message, " ".join(command(run, "--format", name, "--out", tmp_path / "out", code=2).stderr.split())
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_converter_gets_no_model_that_names_code(file, tmp_path, monkeypatch):
    """llama.cpp's converter lets transformers run it."""
    (tmp_path / "convert_hf_to_gguf.py").write_text("open('ran', 'w')\n")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setattr(
        sft.export.formats.importlib.util, "find_spec", lambda name: object()
    )  # sentencepiece is installed
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / file).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil/repo--t.T", None]}}))
    with pytest.raises(RunError, match=rf"{file} .* names code .*\(auto_map\)"):
        sft.export.formats.find_writer("gguf-f16")(merged, tmp_path / "out", [], tmp_path / "log")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no llama.cpp folder")
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_gguf_holds_weights_template_and_stop_of_the_run(kind, smollm, tmp_path):
    run = make_run(tmp_path / "run", smollm, quantized=False)
    out = tmp_path / "out"
    command(run, "--format", f"gguf-{kind}", "--out", out)
    assert sorted(f.name for f in out.iterdir()) == ["README.md", "model.gguf", "parity.json"]
    facts = json.loads((out / "parity.json").read_text())["format"]
    assert facts["answer_argmax_agreement"] >= 0.95
    assert (facts["bytes"] < 0.7 * facts["merged_bytes"]) == (kind == "q8_0")
    command(out, "--run", run, name="verify")
