"""The whole way on one GPU, by the command line, against a CPU: `make test-gpu`, at most two minutes.

They need no network, no vLLM and no model from a package.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

import sft.training.step
from sft.runs.metrics import read_metrics
from sft.runs.state import load_state
from sft.training.trainer import PackTrainer
from tests.helpers.gpu import gpu_recipe
from tests.helpers.graft import run as graft
from tests.helpers.places import ROOT, SAMPLES

pytestmark = pytest.mark.gpu


def on_cpu(*arguments: object) -> None:
    """`graft` in a process that sees no GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "sft.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(run: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(run) if key in row]


def moments(checkpoint: Path) -> torch.Tensor:
    """AdamW's first moments of all trained parameters: after one step the gradient, up to a factor."""
    states = load_state(checkpoint / "optimizer.safetensors")["optimizer"]["state"]
    return torch.cat([states[i]["exp_avg"].flatten().cpu().double() for i in sorted(states)])


@pytest.fixture(scope="module")
def run(tmp_path_factory, small) -> Path:
    """A run of LoRA in autocast, with a checkpoint for each of its four steps."""
    folder = tmp_path_factory.mktemp("lora")
    graft("train", gpu_recipe(folder, small, bf16=True, save_steps=1))
    return folder / "run"


def test_steps_equal_those_of_a_cpu_within_bfloat16(run, small, tmp_path):
    on_cpu("train", gpu_recipe(tmp_path, small, bf16=False, save_steps=1))
    reference = tmp_path / "run"
    assert losses(run) == pytest.approx(losses(reference), rel=5e-3)
    assert losses(run, "grad_norm") == pytest.approx(losses(reference, "grad_norm"), rel=5e-2)
    for step, least in ((1, 0.999), (2, 0.98)):  # the first AdamW step is +-1, so it enlarges what rounding changed
        name = f"checkpoint-{step}"
        assert cosine_similarity(moments(run / name), moments(reference / name), dim=0) > least
    assert losses(run)[-1] < losses(run)[0]


def test_resume_gives_the_loss_of_the_undisturbed_run(run, tmp_path):
    """The next forward pass computes the same numbers. Later ones do not: backward kernels of a GPU add in any order."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for step in (3, 4):
        shutil.rmtree(copy / f"checkpoint-{step}")
    assert "resumes from checkpoint-2" in graft("train", "--resume", copy).stdout
    assert losses(copy)[:2] == losses(run)[:2]
    assert losses(copy)[2] == pytest.approx(losses(run)[2], rel=1e-5)
    assert losses(copy) == pytest.approx(losses(run), rel=1e-3)
    assert losses(copy, "executed_tokens") == losses(run, "executed_tokens")


def test_evaluation_gives_the_answers_of_a_cpu(run, tmp_path):
    graft("eval", run, "--out", tmp_path / "gpu")
    on_cpu("eval", run, "--out", tmp_path / "cpu")
    gpu, cpu = (
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("gpu", "cpu")
    )
    assert gpu == cpu
    assert len(gpu) == 12


def test_merged_model_answers_like_the_adapter(run):
    graft("export", run)
    parity = json.loads((run / "export" / "parity.json").read_text())
    assert parity["compared_logits_of"] > 0
    assert parity["mean_kl_nats"] < 1e-3


def test_nf4_trains_evaluates_and_trains_on(small, tmp_path):
    graft("train", gpu_recipe(tmp_path, small, quantized=True, dtype="bfloat16", eval_strategy="steps", eval_steps=2))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    first, second = losses(tmp_path / "run", "eval_loss")
    assert second < first
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row] == [2, 4]
    graft("eval", tmp_path / "run", "--limit", 4)
    assert json.loads((tmp_path / "run" / "eval" / "results.json").read_text())


def test_too_little_memory_halves_the_packs(run, small, device, tmp_path, monkeypatch):
    """The allocator's own error, within a backward pass."""
    original, refused = sft.training.step.pack_loss, []

    def loss(model, pack, device, *more):
        result = original(model, pack, device, *more)
        if len(pack.input_ids) > 1200:
            refused.append(len(pack.input_ids))
            result.register_hook(lambda gradient: torch.empty(2**50, device=device))
        return result

    monkeypatch.setattr(sft.training.step, "pack_loss", loss)
    done = graft("train", gpu_recipe(tmp_path, small, bf16=True))
    assert refused
    assert "out of memory" in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(run), rel=5e-3)
    assert losses(tmp_path / "run", "examples") == losses(run, "examples")


def test_step_that_is_not_finite_is_neither_trained_on_nor_saved(small, device, tmp_path, monkeypatch):
    original, before, after = PackTrainer.training_step, {}, {}

    def spoil(self, *args):
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        after.update({name: p.detach().clone() for name, p in named.items()})
        loss = original(self, *args)
        if self.state.global_step == 1:
            assert self.reads_late == (device.type == "cuda")
            before.update(after)
            next(iter(named.values())).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(PackTrainer, "training_step", spoil)
    done = graft("train", gpu_recipe(tmp_path, small, save_steps=3), code=3)
    assert "gradient of step 2 " in done.stderr
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["qwen_lora", "qwen_qlora"])
def test_shipped_recipe_goes_the_whole_way(name, shape, tmp_path):
    settings = {
        "model.base": shape, "data.train": SAMPLES / "squad_train.json", "eval.data": SAMPLES / "squad_dev.json", "eval.limit": 4,
        "eval.max_new_tokens": 8, "train.max_steps": 4, "train.save_steps": 2, "train.examples_per_step": 16,
        "train.output_dir": tmp_path / "run", "train.report_to": "[]",
    }  # fmt: skip
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    graft("train", ROOT / "recipes" / f"{name}.yaml", *overrides)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    graft("eval", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
