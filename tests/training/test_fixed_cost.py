"""What a step costs beside its products: packs are made a step ahead, and the host reads no number that CUDA still
computes. The way of CUDA is switched on by `reads_late`; a GPU isn't needed."""

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback

import sft.training.step
import sft.training.trainer
from data.encode.chat import encode
from data.encode.pack import Layout, Pack
from sft.errors import TrainingDiverged
from sft.models.tune import tune_model
from sft.recipe.schema import Train, Tune
from sft.runs.state import random_state
from sft.training.plan import plan_steps
from sft.training.trainer import PackTrainer, training_arguments
from tests.helpers.builders import stored

pytestmark = pytest.mark.heavy

READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "_unique2")


@pytest.fixture
def make(tiny, tokenizer, questions, tmp_path):
    examples = stored(tmp_path / "store", [encode(q, tokenizer, 1024) for q in questions[:24]])

    def trainer(reads_late: bool, layout: Layout = Layout(True, 512), **settings) -> PackTrainer:
        train = Train(**{"examples_per_step": 4, "learning_rate": 1e-2, "save_strategy": "no"} | settings)
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="sdpa")
        model = tune_model(model, Tune.model_validate({"method": "lora", "r": 4, "target_modules": "all-linear"}), 0)
        plan = plan_steps(examples, train, layout)
        result = PackTrainer(model, tokenizer, training_arguments(train, plan, tmp_path / "run", False), plan)
        result.reads_late = reads_late
        return result

    return trainer


def trained(trainer: PackTrainer) -> dict[str, torch.Tensor]:
    named = trainer.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_values_read_late_are_the_same_and_belong_to_their_steps(make, logging_steps):
    early, late = (make(way, logging_steps=logging_steps) for way in (False, True))
    results = [trainer.train() for trainer in (early, late)]
    assert results[0].training_loss == results[1].training_loss
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "executed_tokens", "examples")
    rows = [[{k: row.get(k) for k in keys} for row in t.state.log_history if "loss" in row] for t in (early, late)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 6 // logging_steps
    assert all(torch.equal(value, trained(late)[name]) for name, value in trained(early).items())


@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
@pytest.mark.parametrize("save_steps", [2, 3, 4])
def test_step_that_is_not_finite_changes_no_weight_and_is_never_saved(make, monkeypatch, tmp_path, spoiled, save_steps):
    """R7, on CUDA's way: the third step is spoiled, the host sees it after the fourth or before it saves."""
    original, before, trained_steps = PackTrainer.training_step, {}, []

    def spoil(self, *args):
        loss = original(self, *args)
        trained_steps.append(self.state.global_step)
        if self.state.global_step == 2:
            before.update(trained(self))
            if spoiled == "loss":
                return self.check_loss(loss * float("nan")) or loss
            next(p for p in self.model.parameters() if p.requires_grad).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(PackTrainer, "training_step", spoil)
    trainer = make(True, save_strategy="steps", save_steps=save_steps)
    with pytest.raises(TrainingDiverged, match=f"{spoiled} of step 3 "):
        trainer.train()
    assert trained_steps == ([0, 1, 2] if save_steps == 3 else [0, 1, 2, 3])
    assert before
    assert all(torch.equal(value, before[name]) for name, value in trained(trainer).items())
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"] * (save_steps == 2)
    assert all("nan" not in str(row) and "inf" not in str(row) for row in trainer.state.log_history)


class HostReads(TorchDispatchMode):
    """Lists the operators for which a host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in READS:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def count_reads(trainer: PackTrainer, monkeypatch) -> dict[int, list[str]]:
    """Host reads of each step, keyed by its number; the values of UnreadStep are on the host already."""
    mode, by_step = HostReads(), {}
    for name in ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__"):

        def counted(self, *args, original, name, **kwargs):
            mode.seen.append(name)
            return original(self, *args, **kwargs)

        patched = partial(counted, original=getattr(torch.Tensor, name), name=name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, patched=patched, **kw: patched(self, *args, **kw))

    def hide(function, *args):
        """The function reads what is on the host on a GPU too: random states, and values that were copied."""
        seen = len(mode.seen)
        result = function(*args)
        del mode.seen[seen:]
        return result

    monkeypatch.setattr(PackTrainer, "_read", partial(hide, trainer._read))
    monkeypatch.setattr(sft.training.trainer, "random_state", partial(hide, random_state))

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            by_step[state.global_step] = list(mode.seen)  # since the last step began
            mode.seen.clear()

    trainer.add_callback(Steps())
    with mode:
        trainer.train()
    by_step[trainer.state.global_step] = list(mode.seen)
    return by_step


def test_no_step_waits_for_a_number(make, monkeypatch):
    trainer = make(True, report_to=())
    trainer.gradients = []  # for CPUs only
    reads = count_reads(trainer, monkeypatch)
    assert sorted(reads) == list(range(7))
    assert all(not reads[step] for step in range(1, 6)), reads  # before the first step, and at the end, it may
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_the_count_sees_reads(make, monkeypatch):
    reads = count_reads(make(False), monkeypatch)
    assert all(reads[step] for step in range(1, 6))


def test_packs_are_made_in_another_thread_and_draw_no_random_number(make, monkeypatch):
    original, threads = PackTrainer._pack_row, []

    def pack(self, row, processes):
        threads.append(threading.current_thread())
        before = random_state()
        packed = original(self, row, processes)
        assert str(random_state()) == str(before)
        return packed

    monkeypatch.setattr(PackTrainer, "_pack_row", pack)
    make(False).train()
    assert len(threads) == 6
    assert threading.main_thread() not in threads
    assert len(set(threads)) == 1


def test_rows_packed_ahead_are_packed_again_when_packs_become_smaller(make, monkeypatch):
    original, sizes = sft.training.step.pack_loss, []

    def loss(model, pack, device, *more):
        sizes.append(len(pack.input_ids))
        if len(sizes) == 3:
            raise torch.OutOfMemoryError("no memory")
        return original(model, pack, device, *more)

    monkeypatch.setattr(sft.training.step, "pack_loss", loss)
    trainer = make(False, Layout(True, 1024, "sparse"))
    trainer.train()
    longest = max(len(example.ids) for example in trainer.plan.examples)
    smaller = trainer.plan.layout.pack_tokens
    assert smaller < 1024
    assert max(sizes[:3]) > max(smaller, longest)
    assert max(sizes[3:]) <= max(smaller, longest)


def test_pack_tensors_equal_the_lists_and_are_copied_once():
    pack = Pack([5, 6, 7], [0, 1, 1], [3, 2, 3], [0, 0], [6, 7], [1, 2])
    tensors = pack.tensors(torch.device("cpu"))
    for name in ("input_ids", "position_ids", "end", "source", "target"):
        assert getattr(tensors, name).tolist() == getattr(pack, name)
        assert getattr(tensors, name).dtype == torch.int64
    assert pack.tensors(torch.device("cpu")) is tensors
    assert pack.tensors(torch.device("meta")).end.device.type == "meta"
    assert replace(pack, rows=None) == Pack([5, 6, 7], [0, 1, 1], [3, 2, 3], [0, 0], [6, 7], [1, 2])
