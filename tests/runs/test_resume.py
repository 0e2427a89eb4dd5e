"""A resumed run equals the undisturbed one bit for bit after any stop, and never becomes another run."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from data.atomic import new_folder
from sft.errors import RunError
from sft.runs.checkpoint import MANIFEST, checkpoints, commit_checkpoint, last_checkpoint, read_manifest
from sft.runs.metrics import read_metrics
from sft.runs.resume import check_unchanged
from sft.runs.state import load_state
from sft.training.durable_trainer import OPTIMIZER
from sft.training.trainer import PackTrainer
from tests.helpers.builders import Payload, write_recipe
from tests.helpers.graft import run as graft
from tests.helpers.places import ROOT, SAMPLES
from tests.helpers.runs import HARM, everything, recipe_of, signal_at

pytestmark = pytest.mark.heavy


# what changes loss, embeddings, groups of the optimizer and schedule
BROUGHT = {
    "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5, "loraplus": 16, "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 8, "decay_type": "cosine"}, "warmup_steps": 3, "weight_decay": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, id="shared"),
        pytest.param({"share": False}, id="unshared", marks=pytest.mark.slow),
        pytest.param(BROUGHT, id="smoothing, noise, LoRA+"),
    ],
)
def test_resumed_run_equals_the_undisturbed_one_bit_for_bit(keys, tiny, tmp_path, monkeypatch):
    """R1: 20 steps are 10 and 10; dropout, several packs a step, within an epoch and between two logged rows."""
    graft("train", recipe_of(tmp_path / "whole", tiny, **keys))
    with monkeypatch.context() as patch:
        signal_at(patch, 9, signal.SIGTERM)
        graft("train", recipe_of(tmp_path / "cut", tiny, **keys), code=143)
    cut = tmp_path / "cut" / "run"
    assert [p.name for p in checkpoints(cut)] == ["checkpoint-10"]
    assert not (cut / "adapter").exists()
    assert "resumes from checkpoint-10" in graft("train", "--resume", cut).stdout
    whole, resumed = everything(tmp_path / "whole" / "run"), everything(cut)
    assert whole == resumed
    assert {"optimizer.safetensors", "process-0.safetensors"} <= whole.keys()
    assert len(whole["rows"]) == 6


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)], ids=lambda value: str(int(value))
)
def test_signal_saves_at_the_step_and_ends_with_its_code(number, code, tiny, tmp_path, monkeypatch):
    """R3: as SIGTERM does in R1; afterwards the signals have their earlier handlers."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    signal_at(monkeypatch, 1, number)
    done = graft("train", recipe_of(tmp_path, tiny, steps=4), code=code)
    assert f"graft train --resume {tmp_path / 'run'}" in done.stdout
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_second_interrupt_stops_at_once_and_loses_no_checkpoint(tiny, tmp_path, monkeypatch):
    signal_at(monkeypatch, 3, signal.SIGINT, times=2)
    graft("train", recipe_of(tmp_path, tiny, steps=4, save_steps=2), code=130)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny) -> Path:
    """A finished run of four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    graft("train", recipe_of(folder, tiny, steps=4, save_steps=2, logging_steps=1))
    return folder / "run"


def test_damaged_checkpoint_is_named_and_the_one_before_it_gives_the_same_run(saved, tmp_path):
    """R5: through the command; no file is one that PyTorch would unpickle."""
    assert not [p for p in saved.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    with (copy / "checkpoint-4" / "optimizer.safetensors").open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"\xff")
    done = graft("train", "--resume", copy)
    assert "checkpoint-4: optimizer.safetensors is damaged" in done.stdout
    assert "resumes from checkpoint-2" in done.stdout
    assert everything(copy) == everything(saved)
    assert (copy / "damaged-checkpoint-4").is_dir()


@pytest.mark.parametrize("harm", HARM)
def test_every_file_of_a_real_checkpoint_is_checked(harm, saved, tmp_path):
    """R5"""
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(saved / name, tmp_path / name)
    names = [path.name for path in (saved / "checkpoint-4").iterdir()]
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "process-0.safetensors", "trainer_state.json"):
        assert file in names
    for name in names:
        HARM[harm](tmp_path / "checkpoint-4" / name)
        taken, broken = last_checkpoint(tmp_path)
        assert taken == tmp_path / "checkpoint-2"
        assert name in broken[tmp_path / "checkpoint-4"]
        shutil.copy(saved / "checkpoint-4" / name, tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-4", {})


def test_pickles_of_a_checkpoint_are_not_opened_by_resuming(saved, tmp_path):
    """S2: under the names that PyTorch and transformers would open, in a checkpoint whose manifest lists them."""
    copy, marker = tmp_path / "run", tmp_path / "opened"
    shutil.copytree(saved, copy)
    planted = (copy / "checkpoint-4").rename(copy / "planted")
    facts = {key: value for key, value in read_manifest(planted).items() if key not in ("files", "manifest_sha256")}
    for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt", "training_args.bin"):
        (planted / name).write_bytes(pickle.dumps(Payload(marker)))
    (planted / MANIFEST).unlink()
    commit_checkpoint(planted, copy / "checkpoint-4", facts)
    done = graft("train", "--resume", copy)
    assert re.search("checkpoint-4: .* is a pickle", done.stdout)
    assert "resumes from checkpoint-2" in done.stdout
    assert not marker.exists()
    pickle.loads((copy / "damaged-checkpoint-4" / "optimizer.pt").read_bytes())  # noqa: S301  it would have worked
    assert marker.exists()


def test_run_without_a_checkpoint_begins_again(saved, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(saved / "recipe.yaml", copy)
    half = new_folder(copy / "checkpoint-2")  # it was killed in its first write
    done = graft("train", "--resume", copy)
    assert "its first step" in done.stdout
    assert everything(copy) == everything(saved)
    assert not half.exists()


def changed_recipe(copy: Path) -> None:
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["train"]["learning_rate"] = 0.5
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def changed_data(copy: Path) -> None:
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    data = json.loads((SAMPLES / "squad_train.json").read_text())
    del data["data"][0]["paragraphs"][0]["qas"][0]
    (copy / "data.json").write_text(json.dumps(data))
    recipe["data"]["train"] = [{"path": str(copy / "data.json")}]
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def changed_base(copy: Path) -> None:
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    base = copy / "base"
    shutil.copytree(recipe["model"]["base"], base)
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    recipe["model"]["base"] = str(base)
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize(
    ("change", "kinds", "shown"),
    [
        (changed_recipe, "recipe", "recipe: train.learning_rate: then 0.01, now 0.5"),
        (changed_data, "recipe,data", "data.json: then nothing, now "),
        pytest.param(changed_base, "recipe,base", "base: model.safetensors: then ", marks=pytest.mark.slow),
    ],
    ids=["recipe", "data", "base"],
)
def test_changed_run_is_refused_with_the_difference_unless_allowed(change, kinds, shown, saved, tmp_path):
    """R10"""
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    shutil.rmtree(copy / "checkpoint-4")
    change(copy)
    done = graft("train", "--resume", copy, code=2)
    assert shown in done.stderr
    assert f"--allow-changed {kinds}" in done.stderr
    if "," in kinds:  # one of two is not enough
        assert shown in graft("train", "--resume", copy, "--allow-changed", "recipe", code=2).stderr
    assert "resumes although changed: " in graft("train", "--resume", copy, "--allow-changed", kinds).stdout


def change(run: Path, **sections) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for section, values in sections.items():
        recipe[section] |= values
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_a_changed_recipe_decides_on_rate_schedule_and_optimizer_from_there_on(saved, tmp_path):
    """A finished run of four steps goes on to eight, as a run of eight steps would, with other settings of AdamW."""
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    change(copy, train={"max_steps": 8, "learning_rate": 0.02, "weight_decay": 0.25, "adam_beta2": 0.9})
    graft("train", "--resume", copy, "--allow-changed", "recipe")
    rates = {row["step"]: row["learning_rate"] for row in read_metrics(copy) if "loss" in row}
    assert [rates[step] for step in (5, 6, 7, 8)] == pytest.approx([0.02 * left / 8 for left in (4, 3, 2, 1)])
    groups = load_state(checkpoints(copy)[-1] / OPTIMIZER)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]  # biases and norms have none
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.9)}


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"tune": {"r": 8}}, "tune.r"),
        ({"train": {"optim": "sgd"}}, "train.optim"),
        ({"train": {"examples_per_step": 5}}, "train.examples_per_step"),
        ({"train": {"seed": 1}}, "train.seed"),
    ],
)
def test_what_can_not_change_within_a_run_is_refused_by_name(sections, name, saved, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    change(copy, **sections)
    done = graft("train", "--resume", copy, "--allow-changed", "recipe", code=2)
    assert f"{name} can't change within a run" in done.stderr


def test_contents_that_changed_places_are_a_change(saved):
    """R10: a held-out file that took the name of the training file, and a base of another commit."""
    made = read_manifest(saved / "checkpoint-4")["made_from"]
    then, swapped = made | {"data": {"a.json": "1", "b.json": "2"}}, made | {"data": {"a.json": "2", "b.json": "1"}}
    assert check_unchanged(saved, then, made | {"data": {"moved/a.json": "1", "moved/b.json": "2"}}) == []
    with pytest.raises(RunError, match="data: .* in other places: .*a.json"):
        check_unchanged(saved, then, swapped)
    with pytest.raises(RunError, match='base: commit: then null|base: commit: then nothing, now "f00"'):
        check_unchanged(saved, made, made | {"base": made["base"] | {"commit": "f00"}})


def test_other_number_of_processes_needs_permission(saved, tmp_path):
    made = read_manifest(saved / "checkpoint-4")["made_from"]
    with pytest.raises(RunError, match="trained by 1 processes and has 2 now.*--elastic"):
        check_unchanged(saved, made, made | {"processes": 2})
    assert check_unchanged(saved, made, made | {"processes": 2}, elastic=True) == [
        "resumes with 2 processes instead of 1"
    ]
    newer = made | {"packages": made["packages"] | {"torch": "9.9"}}
    assert "torch is 9.9" in check_unchanged(saved, made, newer)[0]


def test_options_of_resume_are_refused_without_it(saved):
    assert "--allow-changed works only with --resume" in graft("train", saved, "--allow-changed", "data", code=2).stderr
    assert "--elastic works only with --resume" in graft("train", saved, "--elastic", code=2).stderr
    wrong = graft("train", "--resume", saved, "--allow-changed", "date", code=2)
    assert re.search("--allow-changed date: .* recipe,data,base", wrong.stderr)


def test_data_that_changes_during_a_run_is_reported(tiny, tmp_path, monkeypatch):
    data = tmp_path / "train.json"
    shutil.copy(SAMPLES / "squad_train.json", data)
    original = PackTrainer.training_step

    def change(self, *args):
        data.write_text(data.read_text() + " ")
        return original(self, *args)

    monkeypatch.setattr(PackTrainer, "training_step", change)
    settings = {"train": str(data), "max_contexts": 2}
    recipe = write_recipe(tmp_path / "r.yaml", tiny, data=json.dumps(settings))
    done = graft("train", recipe)
    assert f"warning: {data} changed while training" in done.stdout
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["changed_during_run"] == [str(data)]


def torchrun(processes: int, *arguments: object) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launch += ["--master_port", str(29600 + os.getpid() % 300), "sft/train.py", *map(str, arguments)]
    return subprocess.Popen(launch, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit_and_one_process_elastically(tiny, tmp_path):
    """R2: a signal to one of them stops both at the same step."""
    finish(torchrun(2, recipe_of(tmp_path / "whole", tiny, steps=40)))
    cut = tmp_path / "cut" / "run"
    process = torchrun(2, recipe_of(tmp_path / "cut", tiny, steps=40))
    while len(read_metrics(cut)) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "sft/train.py" in p.cmdline()]
    workers[-1].send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    stopped_at = int(checkpoints(cut)[-1].name.split("-")[1])
    assert stopped_at < 40
    elastic = tmp_path / "elastic"
    shutil.copytree(cut, elastic)
    finish(torchrun(2, "--resume", cut))
    whole, resumed = everything(tmp_path / "whole" / "run"), everything(cut)
    assert whole == resumed
    assert {"process-0.safetensors", "process-1.safetensors"} <= whole.keys()
    assert "--elastic" in graft("train", "--resume", elastic, code=2).stderr
    graft("train", "--resume", elastic, "--elastic")
    assert [row["examples"] for row in read_metrics(elastic)] == [row["examples"] for row in whole["rows"]]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_the_other_one_with_a_reason_and_both_resume_bit_for_bit(victim, tiny, tmp_path):
    finish(torchrun(2, recipe_of(tmp_path / "whole", tiny, steps=20)))
    cut = tmp_path / "cut" / "run"
    process = torchrun(2, recipe_of(tmp_path / "cut", tiny, steps=20))
    while not checkpoints(cut):
        time.sleep(0.02)
        assert process.poll() is None
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "sft/train.py" in p.cmdline()]
    (killed,) = [p for p in workers if p.environ()["RANK"] == str(victim)]
    killed.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: process {1 - victim}: another process of this training has ended" in output
    finish(torchrun(2, "--resume", cut))
    assert everything(tmp_path / "whole" / "run") == everything(cut)


@pytest.mark.slow
def test_more_processes_resume_elastically_with_the_same_losses(tiny, tmp_path):
    graft("train", recipe_of(tmp_path, tiny, steps=8, save_steps=4, logging_steps=1, dropout=0.0))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy)
    shutil.rmtree(copy / "checkpoint-8")
    finish(torchrun(2, "--resume", copy, "--elastic"))
    one, two = (read_metrics(run) for run in (tmp_path / "run", copy))
    assert [row["step"] for row in two] == list(range(1, 9))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-4)
    assert [row["examples"] for row in one] == [row["examples"] for row in two]
