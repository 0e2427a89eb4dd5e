"""A user's mistakes: one line that names value and remedy, exit code 2, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sft.session import child_environment, graft_command
from tests.helpers.builders import write_recipe
from tests.helpers.graft import run
from tests.helpers.places import ROOT, SAMPLES

pytestmark = pytest.mark.heavy

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
        "unknown key": (["train.learning_rat=1"], "train.learning_rat: unknown key"),
        "wrong type": (["train.learning_rate=abc"], "train.learning_rate:"),
        "missing file": (["data.train=none.json"], "data.train[0].path: none.json: no such file"),
        "wrong offset": ([f"data.train={folder}/bad.json"], "bad.json: q7: answers[0]: 'red' is not at answer_start 1"),
        "broken line": (["task=instruct", f"data.train={folder}/bad.jsonl"], "bad.jsonl:2: column 16: "),
        "cut answer": (["data.max_length=64"], "data.max_length 64 would cut"),
        "folder not writable": ([f"train.output_dir={folder}/file/run"], "train.output_dir: can't write to"),
        "no weights": ([f"model.base={empty}"], "holds no weights (*.safetensors)"),
        "too long for the model": (["data.max_length=9999"], "exceeds the 2048 positions"),
        "absent tracker": (
            ["train.report_to=[trackio]"],
            "train.report_to: trackio is not installed; run: pip install",
        ),
        "unknown method": (["tune.method=lorra"], "tune.method: 'lorra' is none of"),
        "shared prompt tuning": (
            ["tune={method: prompt_tuning, num_virtual_tokens: 4}", "data.share_prefixes=true"],
            "data.share_prefixes: auto",
        ),
    }


MISTAKES = (
    "unknown key", "wrong type", "missing file", "wrong offset", "broken line", "cut answer", "folder not writable",
    "no weights", "too long for the model", "absent tracker", "unknown method", "shared prompt tuning",
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--n", "3"], "--n is for a server"),
        (["http://127.0.0.1:9/v1", "--allow-mismatch"], "--allow-mismatch is for an export"),
    ],
)
def test_verify_refuses_options_of_its_other_use(options, named, tmp_path):
    assert named in run("verify", tmp_path, *options, code=2).output


@pytest.mark.slow
def test_children_are_graft_whatever_modules_lie_in_the_users_folder(tmp_path, tiny):
    """--retries and a ladder start `graft` again, from a folder that may hold an eval.py or data.py of the user's."""
    for name in ("eval", "data", "sft"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user')")
    recipe = write_recipe(tmp_path / "r.yaml", tiny, data=f"{{train: '{SAMPLES}/none.json'}}", eval="{}")
    for command in (graft_command("train", recipe), graft_command("eval", tmp_path)):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, check=False, env=child_environment()
        )
        assert done.returncode == 2, done.stderr
        assert "a module of the user" not in done.stderr


@pytest.mark.slow
def test_a_ladder_and_retries_run_beside_an_eval_of_the_user(tmp_path, tiny):
    (tmp_path / "eval.py").write_text("raise SystemExit('a module of the user')")
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tiny,
        data=f"{{train: '{SAMPLES}/squad_train.json', max_contexts: 4}}",
        eval=f"{{data: '{SAMPLES}/squad_dev.json', limit: 4, max_new_tokens: 2}}",
        train=f"{{examples_per_step: 6, max_steps: 2, output_dir: '{tmp_path / 'run'}'}}",
    )
    retried = graft_command("train", recipe, "--retries", 1)
    climbed = graft_command("ladder", recipe, "--methods", "lora", "--out", tmp_path / "ladder")
    for command in (retried, climbed):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, check=False, env=child_environment()
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "nowhere", "--task", "squad_v2", "--data", "x.json"), "nowhere: no run folder, "),
        (("eval", "o/m", "--task", "squad", "--data", "y"), "name one of squad_v2, squad_v1, newsgroups, instruct"),
        (("eval", "o/m", "--task", "squad_v2"), "--data: name the data"),
        (("eval", "o/m", "--task", "squad_v2", "--data", "none.json"), "none.json: no such file"),
        (("eval", "o/m", "--base"), "--base: o/m is no run"),
        (("export", "nowhere"), "nowhere: no run folder ("),
        (("train", "none.yaml"), "none.yaml: no such recipe"),
        (("chat", "none.gguf"), "none.gguf: no run folder, "),
        (("chat", "data"), "data holds no config.json"),
    ],
)
def test_wrong_target_is_one_line(arguments, message, tmp_path):
    out = ("--out", tmp_path / "o") if arguments[0] in ("eval", "export") else ()
    done = run(*arguments, *out, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("verb", ["train", "dry-run", "eval", "chat"])
def test_broken_model_is_one_line_in_every_command(verb, tmp_path, tiny):
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "frobnicate"}))
    recipe = write_recipe(tmp_path / "r.yaml", base)
    commands: dict[str, tuple[object, ...]] = {
        "train": ("train", recipe),
        "dry-run": ("train", recipe, "--dry-run"),
        "eval": ("eval", base, "--task", "squad_v2", "--data", SAMPLES / "squad_dev.json", "--out", tmp_path / "o"),
        "chat": ("chat", base),
    }
    done = run(*commands[verb], code=2)
    assert f"error: model.base: {base} can't be loaded: " in done.stderr
    assert "frobnicate" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
