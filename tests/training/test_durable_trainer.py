"""Failures within a training: it stops with its own exit code, publishes nothing broken, and keeps its checkpoints."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sft.training.durable_trainer
import sft.training.retries
import sft.training.step
from data.encode.pack import Layout
from data.errors import ExitCode, is_disk_full
from sft.errors import RecipeError, TrainingDiverged
from sft.models.tune import tune_model
from sft.recipe.schema import Train, Tune
from sft.runs.checkpoint import checkpoints, damage, last_checkpoint
from sft.runs.interrupt import locked
from sft.runs.metrics import read_metrics
from sft.runs.monitor import SPIKE_ROWS, Spikes
from sft.runs.state import save_state
from sft.session import is_out_of_memory
from sft.training.durable_trainer import DurableTrainer
from sft.training.plan import plan_steps
from sft.training.trainer import PackTrainer, training_arguments
from tests.helpers.builders import stored, write_recipe
from tests.helpers.graft import run as graft
from tests.helpers.places import ROOT
from tests.helpers.runs import everything, recipe_of

pytestmark = pytest.mark.heavy


def all_finite(run: Path) -> bool:
    return all(
        bool(torch.isfinite(value).all())
        for path in run.rglob("adapter_*.safetensors")
        for value in load_file(path).values()
    )


def test_loss_that_is_not_finite_stops_the_run_and_publishes_nothing(tiny, tmp_path, monkeypatch):
    """R7"""
    original, steps = sft.training.step.pack_loss, []

    def loss(*args):
        steps.append(1)
        return original(*args) * (float("nan") if (tmp_path / "run" / "checkpoint-2").exists() else 1.0)

    monkeypatch.setattr(sft.training.step, "pack_loss", loss)
    done = graft("train", recipe_of(tmp_path, tiny, steps=4, save_steps=2), code=3)
    assert "loss of step 3 is nan" in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert all_finite(tmp_path / "run")
    assert not steps or len(read_metrics(tmp_path / "run")) == 0  # steps 1 and 2 are logged with the third


@pytest.fixture
def trainer(tiny, tokenizer, questions, tmp_path):
    from data.encode.chat import encode

    examples = stored(tmp_path / "store", [encode(q, tokenizer, 1024) for q in questions[:24]])
    train = Train(examples_per_step=6, learning_rate=1e-2, save_strategy="no", gradient_checkpointing=False)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = tune_model(model, Tune.model_validate({"method": "lora", "r": 4, "target_modules": "all-linear"}), 0)
    plan = plan_steps(examples, train, Layout(True, 512, "sparse"))
    return PackTrainer(model, tokenizer, training_arguments(train, plan, tmp_path / "run", False), plan)


def test_gradient_that_is_not_finite_stops_before_the_optimizer_steps(trainer, monkeypatch):
    """R7: the loss is finite, and the weights stay finite."""
    original, weights = PackTrainer.training_step, {}

    def spoil(self, *args):
        loss = original(self, *args)
        if self.state.global_step == 1:
            named = dict(self.model.named_parameters())
            weights.update({name: p.detach().clone() for name, p in named.items() if p.requires_grad})
            next(p for p in named.values() if p.requires_grad).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(PackTrainer, "training_step", spoil)
    with pytest.raises(TrainingDiverged, match="gradient of step 2 "):
        trainer.train()
    assert weights
    assert all(torch.equal(p, weights[n]) for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_weights_that_are_not_finite_are_not_saved(trainer, tmp_path):
    next(p for p in trainer.model.parameters() if p.requires_grad).data[0] = float("nan")
    with pytest.raises(TrainingDiverged, match=r"lora_A\..* is not finite"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list((tmp_path / "run").rglob("*"))


def test_absurd_learning_rate_stops_the_run(tiny, tmp_path):
    """R8"""
    done = graft("train", recipe_of(tmp_path, tiny, steps=8, learning_rate=1e20), code=3)
    assert "lower train.learning_rate" in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()


def test_spike_is_reported_and_needs_enough_rows_before_it(tmp_path, capsys):
    values = [1.0 + 0.01 * (i % 5) for i in range(200)]
    assert [Spikes(values[:n]).add(1.5) is not None for n in (63, 64)] == [False, True]
    assert Spikes(values).add(1.05) is None
    assert Spikes([1.0] * 100).add(1.0) is None
    spikes = Spikes(values)
    assert spikes.add(9.0) > 6
    assert len(spikes.values) == SPIKE_ROWS


def test_too_little_memory_halves_the_packs_and_keeps_the_examples_of_a_step(tiny, tmp_path, monkeypatch):
    plain = write_recipe(tmp_path / "plain.yaml", tiny)
    graft("train", plain, "--set", f"train.output_dir={tmp_path / 'plain'}")
    original, refused = sft.training.step.pack_loss, []

    def loss(model, pack, device, *more):
        if len(pack.input_ids) > 300 and read_metrics(tmp_path / "run"):
            refused.append(len(pack.input_ids))
            raise torch.OutOfMemoryError("no memory")
        return original(model, pack, device, *more)

    monkeypatch.setattr(sft.training.step, "pack_loss", loss)
    done = graft(
        "train",
        write_recipe(
            tmp_path / "r.yaml",
            tiny,
            data="{train: data/samples/squad_train.json, max_contexts: 4, share_prefixes: true}",
        ),
    )
    assert re.search(r"step \d+: out of memory .*data\.pack_tokens", done.stdout)
    assert refused
    rows = [read_metrics(tmp_path / name) for name in ("plain", "run")]
    assert [r["examples"] for r in rows[0]] == [r["examples"] for r in rows[1]]
    assert [r["loss"] for r in rows[0]] == pytest.approx([r["loss"] for r in rows[1]], abs=1e-5)


def test_example_that_alone_does_not_fit_ends_with_the_keys_to_change(tiny, tmp_path, monkeypatch):
    def loss(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(sft.training.step, "pack_loss", loss)
    done = graft("train", recipe_of(tmp_path, tiny), code=6)
    assert "data.pack_tokens or data.max_length" in done.stderr


def test_an_allocators_error_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("another"))


def limit_file_size(number: int) -> None:
    """Like a full disk: the kernel refuses every write beyond this size of a file, to Python and to Rust."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("method", "room"),
    [
        pytest.param("_save_checkpoint", 20_000, marks=pytest.mark.slow),
        pytest.param("_save_rng_state", 100, marks=pytest.mark.slow),
        pytest.param("training_step", 0, marks=pytest.mark.slow),
    ],
)
def test_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on_later(method, room, tiny, tmp_path, monkeypatch):
    """R6: within weights, within the random state, within metrics.jsonl."""
    run = tmp_path / "run"
    original = getattr(PackTrainer, method)

    def full(self, *args):
        if self.state.global_step >= 3:
            limit_file_size(room)
        return original(self, *args)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(PackTrainer, method, full)
            done = graft("train", recipe_of(tmp_path, tiny, steps=4, save_steps=2, logging_steps=1), code=4)
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    assert "disk is full" in done.stderr
    assert "checkpoint-2 is whole" in done.stderr
    assert [p.name for p in checkpoints(run)] == ["checkpoint-2"]
    assert not (run / "adapter").exists()
    graft("train", "--resume", run)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]
    assert not list(run.glob(".*.new"))


def test_full_disk_is_distinguished_from_other_errors():
    assert is_disk_full(OSError(28, "No space left on device"))
    assert is_disk_full(Exception("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(2, "No such file"))
    assert not is_disk_full(Exception("28"))


def test_death_within_a_write_leaves_the_checkpoint_before_it(tiny, tmp_path, monkeypatch):
    """R4: nothing is cleaned up; tests/faults/kills.py does the same with SIGKILL at random moments."""

    class Death(BaseException):
        pass

    def die(path, state):
        save_state(path, state)
        if "checkpoint-4" in str(path):
            raise Death

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(sft.training.durable_trainer, "save_state", die)
        with pytest.raises(Death):
            graft("train", recipe_of(tmp_path, tiny, steps=4, save_steps=2))
    (half,) = run.glob(".checkpoint-4.*.new")
    assert (half / "optimizer.safetensors").is_file()
    assert last_checkpoint(run) == (run / "checkpoint-2", {})
    assert "resumes from checkpoint-2" in graft("train", "--resume", run).stdout
    assert damage(run / "checkpoint-4") is None
    assert not half.exists()


def test_two_runs_on_one_folder_refuse_each_other(tiny, tmp_path):
    """R12"""
    recipe_of(tmp_path, tiny).rename(tmp_path / "recipe.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "recipe.yaml").rename(tmp_path / "run" / "recipe.yaml")
    with locked(tmp_path / "run", main=True):
        done = graft("train", "--resume", tmp_path / "run", code=5)
        assert f"trained by process {os.getpid()} on" in done.stderr
        with locked(tmp_path / "run", main=False):
            pass  # another process of the same run
    with locked(tmp_path / "run", main=True):
        pass


@pytest.mark.parametrize(
    ("codes", "retries", "ends", "started"),
    [
        ([0], 3, 0, ["new"]),
        ([-9, 1, 0], 3, 0, ["new", "resume", "resume"]),
        ([-9, -9, -9], 2, 1, ["new", "resume", "resume"]),
        *(([code], 3, code, ["new"]) for code in (2, 3, 4, 5, 6, 130, 138, 143)),
    ],
)
def test_supervisor_goes_on_after_a_crash_and_after_nothing_else(codes, retries, ends, started, tmp_path, monkeypatch):
    asked, left = [], list(codes)

    def run(arguments):
        asked.append(arguments[0])
        (tmp_path / "recipe.yaml").touch()
        return left.pop(0)

    monkeypatch.setattr(sft.training.retries, "_run", run)
    assert sft.training.retries.supervise(["new"], tmp_path, ["resume"], retries) == ends
    assert asked == started


@pytest.mark.parametrize("training", [["sleep", "30"], ["sh", "-c", "trap 'exit 1' TERM; sleep 30 & wait"]])
def test_supervisor_that_is_asked_to_stop_does_not_begin_again(training, tmp_path, monkeypatch):
    """Also if the training has no handler, or none any more, and dies of the signal, or fails while it saves."""
    begun = []

    def sleep(command, **options):
        begun.append(command)
        return popen(training, **options)

    popen = subprocess.Popen
    monkeypatch.setattr(sft.training.retries.subprocess, "Popen", sleep)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    assert sft.training.retries.supervise(["new"], tmp_path, ["resume"], 3) == ExitCode.TERMINATED
    assert len(begun) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at the end of a parent is Linux's")
@pytest.mark.parametrize("start", ["sft.training.retries._run(child)", "sft.scoring.ladder.run_logged(child, log)"])
def test_training_ends_with_the_process_that_started_it_even_if_that_is_killed(start, tmp_path):
    program = f"""
import sys, pathlib, sft.training.retries, sft.scoring.ladder
child, log = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], pathlib.Path(sys.argv[1])
sft.training.retries.graft_command = lambda name, *command: command
{start}
"""
    log = tmp_path / "log"
    with (tmp_path / "output").open("w") as output:
        parent = subprocess.Popen([sys.executable, "-c", program, log], cwd=ROOT, stdout=output)
    deadline, pid = time.monotonic() + 60, ""
    while not pid and time.monotonic() < deadline:
        time.sleep(0.02)
        lines = [line for path in tmp_path.iterdir() for line in path.read_text().split("\n")[:-1]]
        pid = next((line for line in lines if line.isdigit()), "")
    child = psutil.Process(int(pid))
    parent.kill()
    parent.wait()
    child.wait(10)


def test_supervisor_is_not_for_launchers(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="--retries .*one process"):
        sft.training.retries.supervise(["new"], tmp_path, ["resume"], 1)


@pytest.mark.slow
def test_supervised_training_survives_a_kill_and_passes_signals_on(tiny, tmp_path):
    def start(name: str, steps: int) -> tuple[subprocess.Popen[str], Path]:
        recipe = recipe_of(tmp_path / name, tiny, steps=steps, save_steps=4)
        command = [sys.executable, "-m", "sft.cli", "train", str(recipe), "--retries", "2"]
        process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
        run = tmp_path / name / "run"
        while not checkpoints(run):
            time.sleep(0.01)
            assert process.poll() is None
        return process, run

    graft("train", recipe_of(tmp_path / "whole", tiny, steps=40, save_steps=4))
    process, run = start("killed", 40)
    for child in psutil.Process(process.pid).children():
        child.kill()
    _, errors = process.communicate(timeout=120)
    assert re.search("killed by SIGKILL; .* 1 of 2", errors)
    assert process.returncode == 0
    assert everything(run) == everything(tmp_path / "whole" / "run")
    process, run = start("asked", 400)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


def test_results_of_an_evaluation_are_whole_or_the_old_ones(tmp_path, monkeypatch, questions):
    from eval.prediction import Prediction
    from eval.results import score, write_results

    scored = score("squad_v2", questions[:40], [Prediction("x", 1, True)] * 40)
    write_results(tmp_path, {"n": 40}, scored)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(before) == ["results.json", "samples.jsonl"]
    broken = [*scored[:20], replace(scored[0], prediction=None)]
    with pytest.raises(AttributeError):
        write_results(tmp_path, {"n": 21}, broken)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    write_results(tmp_path, {"n": 3}, scored[:3])
    assert json.loads((tmp_path / "results.json").read_text()) == {"n": 3}


def test_trainers_of_adapters_and_encoders_are_durable():
    from sft.baselines.trainer import EncoderTrainer

    assert issubclass(EncoderTrainer, DurableTrainer)
    assert PackTrainer._save_checkpoint is DurableTrainer._save_checkpoint is EncoderTrainer._save_checkpoint
