"""One optimizer step has the same examples and the same loss for any number of packs and processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from data.encode.chat import encode
from data.encode.pack import Layout, make_packs
from sft.models.capabilities import has_virtual_tokens
from sft.models.tune import tune_model
from sft.recipe.schema import Train, Tune
from sft.training.plan import plan_steps
from sft.training.step import shard_packs
from sft.training.trainer import PackTrainer, leave_casts_to_autocast, training_arguments
from tests.helpers.builders import stored, write_recipe
from tests.helpers.places import ROOT

pytestmark = pytest.mark.heavy


@pytest.fixture
def examples(questions, tokenizer, tmp_path):
    return stored(tmp_path, [encode(q, tokenizer, 1024) for q in questions[:24]])


def test_plan_has_the_same_examples_in_a_step_with_and_without_sharing(examples):
    train = Train(examples_per_step=7, num_train_epochs=2)
    shared, flat = plan_steps(examples, train, Layout(True)), plan_steps(examples, train, Layout(False))
    assert shared.steps == flat.steps
    assert (len(shared.steps), shared.steps_per_epoch) == (8, 4)
    assert {i for step in shared.steps[:4] for i in step} == set(range(24))


@pytest.mark.parametrize(("train", "steps"), [({"num_train_epochs": 0.5}, 2), ({"max_steps": 9}, 9), ({}, 4)])
def test_plan_has_the_steps_that_the_recipe_asks_for(examples, train, steps):
    assert len(plan_steps(examples, Train(examples_per_step=7, **train), Layout()).steps) == steps


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_pack_counts_once_over_all_processes(examples, processes):
    packs = make_packs(examples)
    shares = [shard_packs(packs, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    counted = [id(pack) for share in shares for pack, weight in share if weight]
    assert sorted(counted) == sorted(id(pack) for pack in packs)


@pytest.mark.parametrize(("method", "virtual"), [("prompt_tuning", True), ("prefix_tuning", True), ("lora", False)])
def test_virtual_tokens_are_seen_through_ddp(method, virtual, tiny):
    import torch.distributed as dist

    keys = {"r": 4, "target_modules": "all-linear"} if method == "lora" else {"num_virtual_tokens": 4}
    tune = Tune.model_validate({"method": method} | keys)
    model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tune, 0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert has_virtual_tokens(model) is has_virtual_tokens(wrapped) is virtual
    finally:
        dist.destroy_process_group()


def test_casts_left_to_autocast_change_no_gradient_and_store_less(tiny, examples):
    tune = {"method": "lora", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16), Tune.model_validate(tune), 0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    def train() -> tuple[torch.Tensor, int]:
        stored_bytes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            stored_bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.zero_grad()
        ids = torch.tensor([examples[0].ids])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), sum(stored_bytes.values())

    before, bytes_before = train()
    leave_casts_to_autocast(model)
    after, bytes_after = train()
    assert torch.equal(before, after)
    assert bytes_after < bytes_before


def run_losses(tiny, tokenizer, examples, tmp_path, share: bool, held_out=(), **keys) -> list[dict]:
    train = Train(examples_per_step=8, learning_rate=1e-2, save_strategy="no", gradient_checkpointing=False, **keys)
    tune = Tune.model_validate({"method": "lora", "r": 4, "target_modules": "all-linear"})
    model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tune, train.seed)
    plan = plan_steps(examples, train, Layout(share))
    trainer = PackTrainer(model, tokenizer, training_arguments(train, plan, tmp_path, False), plan, held_out)
    trainer.train()
    return trainer.state.log_history


def test_loss_curve_is_the_same_with_and_without_sharing(tiny, tokenizer, examples, tmp_path):
    curves = [
        [row["loss"] for row in run_losses(tiny, tokenizer, examples, tmp_path, share) if "loss" in row]
        for share in (True, False)
    ]
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0][-1] < curves[0][0]


BROUGHT = {
    "label_smoothing_factor": 0.1, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2},
    "warmup_steps": 1, "weight_decay": 0.05,
}  # fmt: skip


def test_smoothing_loraplus_and_schedule_train_as_transformers_and_peft_do(tiny, tokenizer, examples, tmp_path):
    """Against transformers' own Trainer on padded rows, without packs."""
    train = Train(examples_per_step=3, max_steps=3, learning_rate=1e-2, save_strategy="no", **BROUGHT)
    tune = Tune.model_validate({"method": "lora", "r": 4, "target_modules": "all-linear", "loraplus_lr_ratio": 8})
    plan = plan_steps(examples, train, Layout(True))
    arguments = training_arguments(train, plan, tmp_path / "ours", False)

    def model():
        return tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tune, train.seed)

    ours = PackTrainer(
        model(), tokenizer, arguments, plan, tune=tune, smoothing=train.label_smoothing_factor
    )  # fmt: skip
    ours.train()

    def pad(rows):
        rows = [examples[i] for row in rows for i in row["examples"]]
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows])
        mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
        learnt = torch.tensor([[*map(bool, row.loss_mask), *[False] * (width - len(row.ids))] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~learnt, -100)}

    flat = model()
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, flat)
    reference = Trainer(
        flat,
        TrainingArguments(
            output_dir=str(tmp_path / "theirs"),
            max_steps=3,
            per_device_train_batch_size=1,
            use_cpu=True,
            logging_steps=1,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            train_sampling_strategy="sequential",
            learning_rate=1e-2,
            **BROUGHT,
        ),
        data_collator=pad,
        train_dataset=Dataset.from_dict({"examples": [list(step) for step in plan.steps]}),
        optimizers=(
            create_loraplus_optimizer(flat, kind, loraplus_lr_ratio=8, loraplus_weight_decay=0.05, **settings),
            None,
        ),
    )
    reference.train()
    for key in ("loss", "grad_norm", "learning_rate"):
        mine, theirs = ([row[key] for row in trainer.state.log_history if key in row] for trainer in (ours, reference))
        assert len(mine) == 3
        assert mine == pytest.approx(theirs, rel=1e-4)
    for (name, one), (_, other) in zip(ours.model.named_parameters(), flat.named_parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_loraplus_has_a_rate_for_b_and_one_for_an_embedding(tiny, tokenizer, examples, tmp_path):
    train = Train(examples_per_step=8, learning_rate=1e-3, save_strategy="no")
    targets = {"target_modules": ["q_proj", "embed_tokens"], "loraplus_lr_ratio": 16, "loraplus_lr_embedding": 1e-5}
    tune = Tune.model_validate({"method": "lora", "r": 4, **targets})
    model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tune, 0)
    plan = plan_steps(examples, train, Layout(True))
    trainer = PackTrainer(
        model, tokenizer, training_arguments(train, plan, tmp_path / "r", False), plan, tune=tune
    )  # fmt: skip
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert len(rates) == 6
    for name, rate in rates.items():
        assert rate == (1e-5 if "embedding" in name else 16e-3 if "lora_B" in name else 1e-3), name


def test_noise_is_in_training_and_not_in_evaluation(tiny, tokenizer, examples, tmp_path):
    held_out, seen = make_packs(examples[:6]), {}
    for alpha in (None, 5.0):
        train = Train(examples_per_step=8, learning_rate=1e-9, save_strategy="no", eval_strategy="steps", eval_steps=3)
        tune = Tune.model_validate({"method": "lora", "r": 4, "target_modules": "all-linear"})
        model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tune, train.seed)
        plan = plan_steps(examples, train, Layout(True))
        arguments = training_arguments(train, plan, tmp_path, False)
        trainer = PackTrainer(model, tokenizer, arguments, plan, held_out, noise_alpha=alpha)
        trainer.train()
        seen[alpha] = {
            key: row[key] for row in trainer.state.log_history for key in ("loss", "eval_loss") if key in row
        }
    assert abs(seen[None]["loss"] - seen[5.0]["loss"]) > 1e-4
    assert seen[None]["eval_loss"] == pytest.approx(seen[5.0]["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(("named", "shown"), [(None, "run-7"), ("winter", "winter")])
def test_trackers_get_the_name_of_the_run(named, shown, examples, tmp_path):
    train = Train(examples_per_step=8, run_name=named)
    assert training_arguments(train, plan_steps(examples, train, Layout()), tmp_path / "run-7", False).run_name == shown


def test_evaluation_reports_the_mean_over_trained_tokens_and_changes_nothing(tiny, tokenizer, examples, tmp_path):
    held_out = make_packs(examples[:6])
    plain = run_losses(tiny, tokenizer, examples, tmp_path, True)
    evaluated = run_losses(tiny, tokenizer, examples, tmp_path, True, held_out, eval_strategy="steps", eval_steps=1)
    assert [r["loss"] for r in plain if "loss" in r] == [r["loss"] for r in evaluated if "loss" in r]
    held = [r["eval_loss"] for r in evaluated if "eval_loss" in r]
    assert len(held) == 4
    assert held[-1] < held[0] < 12


PROMPT_TUNING = {
    "tune": "{method: prompt_tuning, num_virtual_tokens: 4}",
    "data": "{train: data/samples/squad_train.json, max_contexts: 4, share_prefixes: false}",
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, PROMPT_TUNING], ids=["lora", "prompt_tuning"])
def test_two_processes_give_the_same_losses_as_one(changes, tmp_path, tiny):
    curves = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        recipe = write_recipe(
            folder / "r.yaml",
            tiny,
            model=f"{{base: '{tiny}', dtype: float32, quantization: {{load_in_4bit: true}}}}",
            **changes,
        )
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
