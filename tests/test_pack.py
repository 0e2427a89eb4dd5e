"""Packs: what is shared is computed once, and the loss and every gradient stay those of flat training."""

import random
from collections import Counter

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from data.chat import Example, encode
from data.pack import attention_mask, build_pack, count_executed, is_chain, make_packs, step_order
from sft.model import load_base, tune_model
from sft.recipe import Model, Tune
from sft.trainer import pack_loss
from tests.conftest import REAL_DATA, SMOLLM, needs_real, read_squad


def example(*ids: int, trained: int = 1) -> Example:
    return Example(list(ids), [0] * (len(ids) - trained) + [1] * trained)


def test_common_prefix_stands_once_in_preorder():
    pack = build_pack([[example(1, 2, 3, 4), example(1, 2, 5), example(1, 2, 3, 6, 7)]])
    assert pack.input_ids == [1, 2, 3, 4, 6, 7, 5]
    assert pack.position_ids == [0, 1, 2, 3, 3, 4, 2]
    assert pack.end == [7, 7, 6, 4, 6, 6, 7]
    assert [pack.input_ids[i] for i in pack.leaf] == [4, 5, 7]


def test_each_token_attends_to_its_own_prefix_only():
    rng = random.Random(0)
    trees = [[example(*(rng.randrange(3) for _ in range(rng.randrange(2, 7)))) for _ in range(6)] for _ in range(3)]
    pack = build_pack(trees)
    mask = attention_mask(pack)[0, 0]
    for leaf, row in zip(pack.leaf, [e for tree in trees for e in tree], strict=True):
        seen = mask[leaf].nonzero().flatten().tolist()
        assert [pack.input_ids[i] for i in seen] == row.ids


def test_every_trained_token_of_every_example_has_a_target():
    same = example(1, 2, 3, trained=2)
    pack = build_pack([[same, same, example(1, 2, 4, trained=1)]])
    assert sorted(pack.target) == [2, 2, 3, 3, 4]
    assert pack.input_ids == [1, 2, 3, 4]


def test_packs_hold_every_example_once_whatever_the_budget(questions, tokenizer):
    examples = [encode(q, tokenizer, 1024) for q in questions]
    wanted = sorted(t for e in examples for t, m in zip(e.ids, e.loss_mask, strict=True) if m)
    for share in (True, False):
        for budget in (None, 100, 700, 5000):
            packs = make_packs(examples, share, budget)
            assert sorted(t for p in packs for t in p.target) == wanted
            if budget and budget > max(len(e.ids) for e in examples):
                assert max(len(p.input_ids) for p in packs) <= budget


def test_without_sharing_each_example_is_computed_alone(questions, tokenizer):
    examples = [encode(q, tokenizer, 1024) for q in questions[:12]]
    packs = make_packs(examples, share_prefixes=False)
    assert len(packs) == 12
    assert all(is_chain(p) for p in packs)
    assert sum(len(p.input_ids) for p in packs) == sum(len(e.ids) for e in examples)
    shared = sum(len(p.input_ids) for p in make_packs(examples, share_prefixes=True))
    assert shared < 0.4 * sum(len(e.ids) for e in examples)


def test_steps_cover_each_example_once_and_keep_contexts_together():
    contexts = [f"c{i // 5}" for i in range(53)]
    steps = step_order(contexts, 12, seed=1, epoch=0)
    assert sorted(i for step in steps for i in step) == list(range(53))
    assert max(len(step) for step in steps) == 10
    assert len(steps) == 6
    assert steps != step_order(contexts, 12, seed=1, epoch=1)
    assert steps == step_order(contexts, 12, seed=1, epoch=0)
    assert sum(len({contexts[i] for i in step}) for step in steps) == len(set(contexts))  # none is divided


def test_contexts_of_many_sizes_fill_the_steps():
    rng = random.Random(3)
    contexts = [f"c{i}" for i in range(400) for _ in range(rng.randrange(1, 12))]
    steps = step_order(contexts, 24, seed=0, epoch=0)
    assert sum(len(step) for step in steps[:-2]) > 23.5 * len(steps[:-2])


def test_context_larger_than_a_step_is_divided_and_not_lost():
    steps = step_order(["a"] * 25 + ["b"] * 3, 8, seed=0, epoch=0)
    assert sorted(i for step in steps for i in step) == list(range(28))
    assert sorted(len(step) for step in steps) == [4, 8, 8, 8]


def test_weights_say_how_often_a_source_occurs_in_an_epoch():
    contexts = [f"a{i // 2}" for i in range(40)] + [f"b{i}" for i in range(10)]
    weights = [0.5] * 40 + [2.3] * 10
    epochs = [step_order(contexts, 8, seed=0, epoch=e, weights=weights) for e in (0, 1)]
    counts = [Counter(i for step in steps for i in step) for steps in epochs]
    for count in counts:
        assert sum(count[i] for i in range(40)) == 20  # half of the 20 contexts, each with its two examples
        assert sorted(count[i] for i in range(40, 50)) == [2] * 7 + [3] * 3
    assert all((counts[0][i] + counts[1][i]) == 1 for i in range(40))  # the other half comes next


def test_executed_tokens_are_counted_without_building_the_packs(questions, tokenizer):
    rows = [encode(q, tokenizer, 1024) for q in questions[:24]]
    assert count_executed(rows) == sum(len(p.input_ids) for p in make_packs(rows, share_prefixes=True))


def flat_loss(model, example: Example) -> torch.Tensor:
    """An independent reference: plain causal forward, every position, labels shifted by hand."""
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    labels = torch.tensor([t if m else -100 for t, m in zip(example.ids, example.loss_mask, strict=True)][1:])
    return functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def assert_same_step(model, examples: list[Example], budget: int | None) -> None:
    count = sum(sum(e.loss_mask) for e in examples)
    losses, gradients = [], []
    for mode in ("flat", "shared"):
        model.zero_grad()
        total = 0.0
        parts = (
            (flat_loss(model, e) for e in examples)
            if mode == "flat"
            else (pack_loss(model, p, torch.device("cpu")) for p in make_packs(examples, True, budget))
        )
        for part in parts:
            (part / count).backward()
            total += part.item() / count
        losses.append(total)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert abs(losses[0] - losses[1]) < 1e-5
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-4 * gradient.norm(), name


def random_adapter(model) -> None:
    """LoRA-B starts at zero, where LoRA-A has no gradient to compare."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


LORA = Tune.model_validate({"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"})


@pytest.mark.parametrize("budget", [None, 2000])
def test_one_shared_step_equals_the_flat_one(questions, tokenizer, tiny, budget):
    model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), LORA, seed=0)
    random_adapter(model)
    rows = [encode(q, tokenizer, 1024) for q in [*questions[:14], questions[3]]]  # one question twice
    assert_same_step(model, rows, budget)


@needs_real("squad_v2/train.json.gz")
def test_one_shared_step_on_real_squad_and_the_real_model_equals_the_flat_one(tokenizer):
    rows = read_squad(REAL_DATA / "squad_v2" / "train.json.gz")
    start = next(i for i, r in enumerate(rows) if not r.answers) // 8 * 8
    chosen = rows[start : start + 12]
    assert len({r.context for r in chosen}) >= 2
    model = tune_model(load_base(Model(base=SMOLLM), torch.device("cpu")), LORA, seed=0)
    random_adapter(model)
    assert_same_step(model, [encode(r, tokenizer, 1024) for r in chosen], None)
