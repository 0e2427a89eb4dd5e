"""The commands as a user types them: a tiny run from recipe to export, and one line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sft.cli import app
from sft.load import load_run
from tests.conftest import ROOT, SAMPLES, write_recipe


def command(*args: object, script: bool = False) -> list[str]:
    entry = [str(ROOT / "sft" / "train.py")] if script else ["-m", "sft.cli"]
    return [sys.executable, *entry, *(str(a) for a in args)]


def start(*args: object, script: bool = False, **more) -> subprocess.CompletedProcess[str]:
    """A new process, as a user starts it."""
    done = subprocess.run(command(*args, script=script), capture_output=True, text=True, cwd=ROOT, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run(*args: object, code: int = 0, **more) -> Result:
    """The same command line in this process, which has imported the libraries already."""
    done = CliRunner().invoke(app, [str(a) for a in args], **more)
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
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
    report = json.loads((trained / "data_report.json").read_text())
    assert (report["examples"], report["rows_read"], report["rows_left_out"]) == (24, 288, 0)
    assert report["flat_tokens_per_executed_token"] > 3
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


def test_adapter_that_learnt_nothing_is_not_exported(trained, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    file = copy / "adapter" / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    done = run("export", copy, code=2)
    assert "equals its base" in done.stderr
    assert not (copy / "export").exists()
    assert not (copy / ".export.new").exists()


def test_eval_writes_scores_and_samples(trained, tmp_path):
    done = run("eval", trained, "--out", tmp_path / "scores")
    assert "HasAns" in done.stdout
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["questions"] == 12
    assert len((tmp_path / "scores" / "samples.jsonl").read_text().splitlines()) == 12
    run("eval", trained, "--base", "--limit", 6, "--out", tmp_path / "base")
    assert json.loads((tmp_path / "base" / "results.json").read_text())["questions"] == 6


def test_chat_answers_in_the_terminal(trained):
    done = run("chat", trained, "--max-new-tokens", 4, input="Hello\n\n")
    assert "you" in done.stdout


def test_two_processes_give_the_same_losses_as_one(tmp_path, tiny):
    curves = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        recipe = write_recipe(folder / "r.yaml", tiny, model=f"{{base: '{tiny}', {NF4}}}")
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        port = ["--master_port", str(29600 + os.getpid() % 300)]
        done = subprocess.run(
            [*launch, *port, "sft/train.py", str(recipe)], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        curves.append([(r["loss"], r["grad_norm"]) for r in rows])
    assert len(curves[0]) == 4
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, abs=1e-4)


def test_interrupt_saves_and_resume_ends_like_the_undisturbed_run(tmp_path, tiny):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train = "{{examples_per_step: 2, num_train_epochs: 2, learning_rate: 1e-2, save_strategy: 'no', output_dir: '{}'}}"
    recipe = write_recipe(tmp_path / "r.yaml", tiny, train=train.format(whole))
    start("train", recipe)
    process = subprocess.Popen(
        command("train", recipe, "--set", f"train.output_dir={cut}"), stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    while not (cut / "metrics.jsonl").is_file() or len((cut / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"graft train --resume {cut}" in output
    start("train", "--resume", cut)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, cut)
    ]
    assert losses[0] == losses[1]
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, cut)]
    assert adapters[0] == adapters[1]


def test_full_fine_tuning_exports_too(tmp_path, tiny):
    recipe = write_recipe(tmp_path / "r.yaml", tiny, tune="{method: full}", export="{dtype: float32}")
    run("train", recipe)
    assert (tmp_path / "run" / "model" / "README.md").is_file()
    run("export", tmp_path / "run")
    assert (tmp_path / "run" / "export" / "parity.json").is_file()


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


BAD_SQUAD = {
    "data": [
        {
            "paragraphs": [
                {"context": "It is red.", "qas": [{"id": "q7", "question": "?", "answers": [{"text": "red", "answer_start": 1}]}]}
            ]
        }
    ]
}  # fmt: skip


def mistakes(folder: Path, tiny: Path) -> dict[str, tuple[list[str], str]]:
    """Overrides that break a good recipe, and what the one line must say."""
    (folder / "bad.json").write_text(json.dumps(BAD_SQUAD))
    (folder / "bad.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p", \n')
    empty = folder / "no-weights"
    empty.mkdir()
    (empty / "config.json").write_text((tiny / "config.json").read_text())
    (folder / "file").write_text("")
    return {
        "unknown key": (["train.learning_rat=1"], "train.learning_rat: unknown key, did you mean learning_rate?"),
        "wrong type": (["train.learning_rate=abc"], "train.learning_rate:"),
        "missing file": (["data.train=none.json"], "data.train[0].path: no such file: none.json"),
        "wrong offset": ([f"data.train={folder}/bad.json"], "bad.json: q7: the answer 'red' is not at answer_start 1"),
        "broken line": (["task=instruct", f"data.train={folder}/bad.jsonl"], "bad.jsonl:2: not a JSON object"),
        "cut answer": (["data.max_length=64"], "data.max_length 64 would cut the answer away"),
        "folder not writable": ([f"train.output_dir={folder}/file/run"], "train.output_dir: can't write to"),
        "no weights": ([f"model.base={empty}"], "holds no weights (*.safetensors)"),
        "too long for the model": (["data.max_length=9999"], "exceeds the 2048 positions"),
        "unknown method": (["tune.method=lorra"], "tune.method: 'lorra' is none of"),
        "shared prompt tuning": (["tune={method: prompt_tuning, num_virtual_tokens: 4}"], "data.share_prefixes: false"),
    }


MISTAKES = (
    "unknown key", "wrong type", "missing file", "wrong offset", "broken line", "cut answer", "folder not writable",
    "no weights", "too long for the model", "unknown method", "shared prompt tuning",
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_with_one_line_and_code_2_and_leaves_nothing(mistake, tmp_path, tiny):
    overrides, message = mistakes(tmp_path, tiny)[mistake]
    recipe = write_recipe(tmp_path / "r.yaml", tiny)
    before = sorted(p.name for p in tmp_path.iterdir())
    sets = [part for override in overrides for part in ("--set", override)]
    done = run("train", recipe, *sets, code=2)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_run_folder_is_never_overwritten(trained, tiny):
    done = run("train", trained / "recipe.yaml", code=2)
    assert "is not empty" in done.stderr
    assert "--resume" in done.stderr


def test_schema_and_env_print_json():
    assert json.loads(run("schema").output)["title"] == "Recipe"
    assert json.loads(start("env").stdout)["packages"]["torch"]


def test_works_from_another_folder_whatever_packages_are_installed(tmp_path, tiny):
    """A package `data` elsewhere, or `sft/` first on the path, must not hide ours."""
    (tmp_path / "site" / "data").mkdir(parents=True)
    (tmp_path / "site" / "data" / "__init__.py").write_text("raise SystemExit('a foreign package named data')")
    recipe = write_recipe(tmp_path / "r.yaml", tiny, data=f"{{train: '{SAMPLES}/none.json'}}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "sft" / "train.py"), str(recipe)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "no such file" in done.stderr


def test_changed_data_is_not_resumed(trained, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    facts = json.loads((copy / "manifest.json").read_text())
    facts["data_sha256"] = dict.fromkeys(facts["data_sha256"], "0")
    (copy / "manifest.json").write_text(json.dumps(facts))
    done = run("train", "--resume", copy, code=2)
    assert "data_sha256 has changed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "nowhere", "--task", "squad_v2", "--data", "data/samples/squad_dev.json"), "nowhere is no folder"),
        (("eval", "x", "--task", "squad", "--data", "y"), "name one of squad_v2, squad_v1, instruct"),
        (("eval", "x", "--task", "squad_v2"), "--data: name the file"),
        (("eval", "x", "--task", "squad_v2", "--data", "none.json"), "none.json: no such file"),
        (("eval", "x", "--task", "squad_v2", "--data", "data"), "data: no such file; it is a folder"),
        (("export", "nowhere"), "nowhere: no run folder"),
        (("train", "none.yaml"), "none.yaml: no such recipe file"),
        (("chat", "none.gguf"), "none.gguf is no folder"),
    ],
)
def test_wrong_target_is_one_line(arguments, message, tmp_path):
    out = ("--out", tmp_path / "o") if arguments[0] in ("eval", "export") else ()
    done = run(*arguments, *out, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
