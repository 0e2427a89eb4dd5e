"""The commands as a user types them: a tiny run from recipe to export, score, chat and resume."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.prediction import Prediction
from sft.export.parity import compare
from sft.models.target import load_run
from sft.scoring.evaluate import print_scores
from tests.helpers.builders import write_recipe
from tests.helpers.graft import run
from tests.helpers.places import ROOT, SAMPLES

pytestmark = pytest.mark.heavy


def command(*args: object, script: bool = False) -> list[str]:
    entry = [str(ROOT / "sft" / "train.py")] if script else ["-m", "sft.cli"]
    return [sys.executable, *entry, *(str(a) for a in args)]


def start(*args: object, script: bool = False, **more) -> subprocess.CompletedProcess[str]:
    """A new process, as a user starts it."""
    done = subprocess.run(command(*args, script=script), capture_output=True, text=True, cwd=ROOT, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


NF4 = "quantization: {load_in_4bit: true}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny) -> Path:
    """A run folder of three steps on a 4-bit tiny model, made through the script."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(
        folder / "r.yaml",
        tiny,
        model=f"{{base: '{tiny}', {NF4}}}",
        train=f"{{examples_per_step: 6, num_train_epochs: 2, learning_rate: 1e-2, eval_strategy: epoch, "
        f"save_strategy: steps, save_steps: 3, output_dir: '{folder / 'run'}'}}",
    )
    start(recipe, script=True)
    return folder / "run"


def test_run_folder_holds_everything_that_later_steps_need(trained):
    for name in ("recipe.yaml", "manifest.json", "data_report.json", "metrics.jsonl", "loss.png", "tensorboard"):
        assert (trained / name).exists(), name
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"):
        assert (trained / "adapter" / name).is_file(), name
    assert (trained / "checkpoint-6" / "trainer_state.json").is_file()
    assert not list(trained.rglob("training_args.bin"))
    facts = json.loads((trained / "manifest.json").read_text())
    assert len(facts["data_sha256"]) == 2
    assert facts["packages"]["torch"]
    counts = json.loads((trained / "data_report.json").read_text())["totals"]
    assert (counts["examples"], counts["rows_read"], counts["left_out"]) == (24, 288, 0)
    assert counts["flat_tokens_per_executed_token"] > 3
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 9))
    assert len([r for r in rows if "eval_loss" in r]) == 2
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_adapter_is_trained_and_in_fp32(trained):
    model = load_run(trained).model
    weights = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert weights
    assert all(p.dtype == torch.float32 and p.abs().max() > 0 for p in weights)


def test_export_is_a_plain_model_with_proof(trained, tmp_path):
    done = run("export", trained, "--out", tmp_path / "merged")
    parity = json.loads((tmp_path / "merged" / "parity.json").read_text())
    assert parity["base"] == "dequantized, as trained"
    assert parity["answer_argmax_agreement"] >= 0.99
    assert "graft serve" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    again = run("export", trained, "--out", tmp_path / "merged", code=2)
    assert "is not empty" in again.stderr


@pytest.mark.slow
def test_export_into_an_empty_folder_that_is_there(trained, tmp_path, monkeypatch):
    """A mounted folder can't be replaced, nor can the current one without losing its user's shell."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = Path().stat().st_ino
    run("export", trained, "--out", "../here/../here")
    assert Path().stat().st_ino == before
    assert Path("parity.json").is_file()
    assert not list(Path().glob(".*"))


@pytest.mark.slow
def test_export_onto_the_original_base_says_so_and_needs_leave_to_differ(trained, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["export"]["base"] = "original"
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(
        "sft.export.parity.compare", lambda *traces: compare(*traces) | {"answer_argmax_agreement": 0.5}
    )
    refused = run("export", copy, code=2)
    assert re.search(r"agree on 50\.00% .* export\.min_agreement 99\.00%", refused.stderr)
    assert not (copy / "export").exists()
    run("export", copy, "--allow-mismatch")
    parity = json.loads((copy / "export" / "parity.json").read_text())
    assert (parity["base"], parity["answer_argmax_agreement"]) == ("original", 0.5)
    assert parity["max_logit_difference"] > 0.001  # the weights that NF4 has rounded away


@pytest.mark.slow
def test_export_counts_held_out_rows_that_are_too_long(trained, tmp_path):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "word " * 1100, "completion": "c"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("export", trained, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "merged", "--allow-mismatch")
    parity = json.loads((tmp_path / "merged" / "parity.json").read_text())
    assert (parity["held_out_examples"], parity["held_out_too_long"]) == (1, 1)


def test_adapter_that_learnt_nothing_is_not_exported(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    file = copy / "adapter" / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    done = run("export", copy, code=2)
    assert "equals its base" in done.stderr
    assert not (copy / "export").exists()
    assert not list(copy.glob(".export.*"))


def test_eval_writes_scores_and_samples(trained, tmp_path):
    done = run("eval", trained, "--out", tmp_path / "scores")
    assert "HasAns" in done.stdout
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["questions"] == 12
    assert len((tmp_path / "scores" / "samples.jsonl").read_text().splitlines()) == 12
    run("eval", trained, "--base", "--limit", 6, "--out", tmp_path / "base")
    assert json.loads((tmp_path / "base" / "results.json").read_text())["questions"] == 6


def test_eval_of_a_run_whose_data_is_gone_says_how_to_name_other_data(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace(str(SAMPLES / "squad_dev.json"), "/gone/dev.json"))
    done = run("eval", copy, "--out", tmp_path / "o", code=2)
    assert "/gone/dev.json" in done.stderr
    assert "other data with --data" in done.stderr


def test_scores_are_printed_by_the_names_that_the_task_gives(capsys):
    part = {"questions": 3, "exact": 50.0, "exact_95": [40.0, 60.0], "valid": 99.0, "valid_95": [98.0, 100.0]}
    counts = {"questions": 3, "cut_at_max_new_tokens": 0, "too_long_for_model": 1}
    results = {"target": "t", "data": "d", "task": "newsgroups", "scores": {"total": part}} | counts
    print_scores(results)
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "valid labels" in shown
    assert "98.0 - 100.0" in shown
    assert "F1" not in shown
    assert "1 of 3 prompts" in shown


def test_server_is_asked_what_the_run_holds_out(trained, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sft.scoring.answerers.served_model", lambda url, wanted: "m")
    monkeypatch.setattr(
        "sft.scoring.answerers.server_predictions",
        lambda url, name, questions, *more: [seen.append(q) or Prediction("x", 1, True) for q in questions],
    )
    run("eval", "http://127.0.0.1:1/v1", "--run", trained, "--out", tmp_path / "served")
    run("eval", trained, "--out", tmp_path / "local")
    local = [json.loads(line)["id"] for line in (tmp_path / "local" / "samples.jsonl").read_text().splitlines()]
    assert [q.id for q in seen] == local


def test_chat_answers_in_the_terminal(trained):
    done = run("chat", trained, "--max-new-tokens", 4, input="Hello\n\n")
    assert "you" in done.stdout


def test_chat_goes_on_after_a_line_that_is_too_long(trained):
    done = run("chat", trained, "--max-new-tokens", 4, input=f"{'word ' * 2100}\nHello\n\n")
    assert "exceed the model's 2048 positions" in " ".join(done.stdout.split())
    assert done.stdout.count("you") == 3


@pytest.mark.slow
def test_quickstart_keeps_its_results_where_serving_fails(tmp_path, tiny, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "vllm" else find(name))
    monkeypatch.setattr(
        "sft.serving.serve.serve_command", lambda *a: [sys.executable, "-c", "raise SystemError('no memory')"]
    )
    recipe = write_recipe(tmp_path / "r.yaml", tiny)
    done = run("quickstart", recipe)
    table, _, after = done.stdout.partition("and serve")
    for word in ("base", "adapter", "HasAns EM", "merged and adapter agree", f"graft chat {tmp_path / 'run'}"):
        assert word in table, word
    assert "not served: vLLM stopped with code 1" in after
    assert f"log: {tmp_path / 'run' / 'serve.log'}" in after


@pytest.mark.slow
def test_full_fine_tuning_exports_too(tmp_path, tiny):
    recipe = write_recipe(tmp_path / "r.yaml", tiny, tune="{method: full}", export="{dtype: float32}")
    run("train", recipe)
    assert (tmp_path / "run" / "model" / "README.md").is_file()
    run("export", tmp_path / "run")
    assert (tmp_path / "run" / "export" / "parity.json").is_file()


@pytest.mark.slow
def test_prompt_tuning_trains_scores_and_says_that_it_cannot_be_merged(tmp_path, tiny):
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tiny,
        tune="{method: prompt_tuning, num_virtual_tokens: 4}",
        data="{train: data/samples/squad_train.json, max_contexts: 2, share_prefixes: false}",
    )
    run("train", recipe)
    run("eval", tmp_path / "run", "--limit", 4, "--out", tmp_path / "scores")
    assert "can't be merged" in run("export", tmp_path / "run", code=2).stderr


def test_run_folder_is_never_overwritten(trained, tiny):
    done = run("train", trained / "recipe.yaml", code=2)
    assert "is not empty" in done.stderr
    assert "--resume" in done.stderr


def test_schema_and_env_print_json():
    assert json.loads(run("schema").output)["title"] == "Recipe"
    assert json.loads(start("env").stdout)["packages"]["torch"]


def test_mistyped_run_is_not_asked_of_the_hub(trained):
    done = run("chat", trained.with_name("rum"), code=2)
    assert f"did you mean {trained}?" in done.stderr


def test_broken_adapter_is_one_line(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    done = run("export", copy, code=2)
    assert f"{copy}/adapter can't be loaded: " in done.stderr


def test_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, tiny):
    done = run("train", write_recipe(tmp_path / "r.yaml", tiny), "--dry-run")
    for word in ("task: squad_v2", "optimizer steps", "estimated time", "estimated memory"):
        assert word in done.stdout, word
    assert not (tmp_path / "run").exists()
