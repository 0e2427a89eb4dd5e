"""Packs: what is shared is computed once, and the loss and every gradient stay those of flat training."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from data.chat import Example, encode, encode_turns
from data.conversation import Conversation
from data.pack import Layout, attention_mask, build_pack, is_chain, make_packs, step_order
from data.sharing import measure_sharing
from sft.attention import pack_inputs, pieces_of
from sft.fused_lora import fuse_lora
from sft.model import load_base, tune_model
from sft.recipe import Model, Tune
from sft.trainer import pack_loss
from tests.conftest import REAL_DATA, SMOLLM, needs_real, read_squad, stored


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
    longest = max(len(e.ids) for e in examples)
    for share in (True, False):
        for budget in (100, 700, 5000):
            for attention in ("dense", "sparse", "causal"):
                packs = make_packs(examples, Layout(share, budget, attention))
                assert sorted(t for p in packs for t in p.target) == wanted
                assert max(len(p.input_ids) for p in packs) <= max(budget, longest)


def test_without_sharing_every_token_is_computed_and_with_it_a_part(questions, tokenizer):
    examples = [encode(q, tokenizer, 1024) for q in questions[:12]]
    flat = sum(len(e.ids) for e in examples)
    assert sum(len(p.input_ids) for p in make_packs(examples, Layout(False))) == flat
    assert sum(len(p.input_ids) for p in make_packs(examples, Layout(True))) < 0.4 * flat


def test_where_no_mask_can_be_given_each_example_stands_alone(questions, tokenizer):
    packs = make_packs([encode(q, tokenizer, 1024) for q in questions[:12]], Layout(True, attention="causal"))
    assert len(packs) == 12
    assert all(is_chain(p) for p in packs)


def rows_of(prefix: int, own: int, count: int) -> list[Example]:
    """Examples that share `prefix` tokens and have `own` ones each."""
    return [example(*range(10, 10 + prefix), *(1000 * (i + 1) + n for n in range(own))) for i in range(count)]


@pytest.mark.parametrize(
    ("prefix", "own", "attention", "packs"),
    [
        (200, 25, "dense", 1),  # a passage and its questions
        (30, 300, "dense", 6),  # a system prompt: attention over the joined trees costs more than it saves
        (30, 300, "sparse", 1),  # where masked blocks are free, any prefix is worth sharing
    ],
)
def test_a_prefix_is_shared_where_it_saves_more_than_attention_over_the_joined_trees_costs(
    prefix, own, attention, packs
):
    layout = Layout(True, 4096, attention)
    made = make_packs(rows_of(prefix, own, 6), layout)
    assert len(made) == packs
    flat = make_packs(rows_of(prefix, own, 6), Layout(False, 4096, attention))
    assert sum(layout.cost(len(p.input_ids)) for p in made) <= sum(layout.cost(len(p.input_ids)) for p in flat)


def test_ten_times_the_questions_of_a_context_make_no_larger_pack():
    for count in (10, 100):
        packs = make_packs(rows_of(200, 25, count), Layout(True, 512))
        assert 450 <= max(len(p.input_ids) for p in packs) <= 512


def test_trees_fill_every_pack_but_the_last_where_masked_attention_is_free():
    rows = rows_of(0, 100, 17)
    assert [len(p.input_ids) for p in make_packs(rows, Layout(True, 512, "sparse"))] == [500, 500, 500, 200]
    assert max(len(p.input_ids) for p in make_packs(rows, Layout(True, 512, "dense"))) < 300


def test_small_trees_fill_a_pack_together():
    small = [example(*(100 * i + n for n in range(20))) for i in range(12)]
    assert len(make_packs(small, Layout(True))) < 6


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


def test_a_cap_on_branches_spreads_a_context_over_steps():
    contexts = [f"c{i // 9}" for i in range(90)]
    steps = step_order(contexts, 8, seed=0, epoch=0, max_branches=2)
    assert sorted(i for step in steps for i in step) == list(range(90))
    assert max(Counter(contexts[i] for i in step).most_common(1)[0][1] for step in steps) == 2


@pytest.mark.parametrize("passages", [16, 1])
def test_sharing_is_measured_over_the_steps_that_are_trained(questions, tokenizer, tmp_path, passages):
    rows = [encode(q, tokenizer, 1024) for q in questions[: 6 * passages]]
    examples = stored(tmp_path, [replace(row, context=f"{i // 6:016x}") for i, row in enumerate(rows)])
    layout = Layout(True)
    sharing = measure_sharing(examples, layout, 12, seed=0)
    steps = step_order(examples.contexts, 12, seed=0, epoch=0)
    executed = sum(len(p.input_ids) for step in steps for p in make_packs([examples[i] for i in step], layout))
    assert sharing.ratio == pytest.approx(sum(len(row.ids) for row in rows) / executed)
    assert sharing.pays


def test_sharing_does_not_pay_where_nothing_is_shared(tmp_path):
    rows = [example(*(100 * i + n for n in range(40))) for i in range(30)]
    sharing = measure_sharing(stored(tmp_path, rows), Layout(True), 8, seed=0)
    assert (sharing.ratio, sharing.gain, sharing.pays) == (1.0, 1.0, False)


def flat_loss(model, example: Example) -> torch.Tensor:
    """An independent reference: plain causal forward, every position, labels shifted by hand."""
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    labels = torch.tensor([t if m else -100 for t, m in zip(example.ids, example.loss_mask, strict=True)][1:])
    return functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def assert_same_step(model, examples: list[Example], layout: Layout) -> None:
    count = sum(sum(e.loss_mask) for e in examples)
    losses, gradients = [], []
    for mode in ("flat", "shared"):
        model.zero_grad()
        total = 0.0
        parts = (
            (flat_loss(model, e) for e in examples)
            if mode == "flat"
            else (pack_loss(model, p, torch.device("cpu")) for p in make_packs(examples, layout))
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


@pytest.fixture(params=["forest", "sdpa", "eager"])
def tuned(request, tiny):
    """A tiny model with an adapter that does something, computed the plain way and the fast one."""
    model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), LORA, seed=0)
    random_adapter(model)
    model.set_attn_implementation(request.param)
    if request.param == "eager":
        assert fuse_lora(model) == 14
    return model


@pytest.mark.parametrize("budget", [600, 4000])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_one_shared_step_equals_the_flat_one(questions, tokenizer, tuned, budget, attention):
    rows = [encode(q, tokenizer, 1024) for q in [*questions[:14], questions[3]]]  # one question twice
    assert_same_step(tuned, rows, Layout(True, budget, attention))


def test_one_step_of_branching_conversations_equals_the_flat_one(tokenizer, tuned):
    rng = random.Random(5)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choice(["red", "blue", "seven", "why", "not"]) for _ in range(9))}

    opening = [{"role": "system", "content": "Be brief."}, turn("user"), turn("assistant")]
    middles = [[turn("user"), turn("assistant")] for _ in range(2)]
    talks = [[*opening, *middle, turn("user"), turn("assistant")] for middle in middles for _ in range(3)]
    talks += [opening, [*opening, *middles[0]]]  # some end where others go on
    rows = [
        row
        for i, talk in enumerate(talks)
        for row in encode_turns(Conversation(tuple(talk), str(i), ""), tokenizer, 512)
    ]
    assert_same_step(tuned, rows, Layout(True, 2048, "sparse"))
    packs = make_packs(rows, Layout(True, 2048, "sparse"))
    assert sum(len(p.input_ids) for p in packs) < 0.6 * sum(len(row.ids) for row in rows)


@pytest.mark.parametrize("seed", range(6))
def test_one_step_of_random_forests_equals_the_flat_one(tuned, seed):
    rng = random.Random(seed)
    rows: list[Example] = []
    for _ in range(rng.randrange(3, 12)):
        ids = list(rows[rng.randrange(len(rows))].ids) if rows and rng.random() < 0.7 else []
        ids = [*ids[: rng.randrange(len(ids) + 1)], *(rng.randrange(5, 9) for _ in range(rng.randrange(2, 12)))]
        mask = [0, *(rng.randrange(2) for _ in ids[1:])]
        mask[-1] = 1
        rows.append(Example(ids, mask))
    assert_same_step(tuned, rows, Layout(True, rng.choice([8, 40, 500]), "sparse"))


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_a_pack_see_what_the_mask_lets_them_see(seed):
    rng = random.Random(seed)
    rows: list[Example] = []
    for _ in range(30):
        ids = list(rng.choice(rows).ids) if rows and rng.random() < 0.8 else []
        ids = [*ids[: rng.randrange(len(ids) + 1)], *(rng.randrange(5, 9) for _ in range(rng.randrange(2, 90)))]
        rows.append(Example(ids, [0] * len(ids)))
    (pack,) = make_packs(rows, Layout(True, 10_000, "sparse"))
    seen, found = torch.zeros(len(pack.end), len(pack.end), dtype=torch.bool), pieces_of(tuple(pack.end))
    for piece in found:
        own = range(piece.start, piece.stop)
        columns = [i for a, b in piece.before for i in range(a, b)] + list(own)
        sees = torch.ones(len(own), len(columns), dtype=torch.bool).tril() if piece.sees is None else piece.sees
        seen[piece.start : piece.stop, columns] = sees
    assert torch.equal(seen, attention_mask(pack)[0, 0])
    assert [i for piece in found for i in range(piece.start, piece.stop)] == list(range(len(pack.end)))
    assert (
        sum((p.stop - p.start) * (p.stop - p.start + sum(b - a for a, b in p.before)) for p in found)
        < 0.5 * seen.numel()
    )


@pytest.mark.parametrize("most", [2.0, 0.0])
def test_branches_by_themselves_train_in_bfloat16_as_the_dense_mask_does(questions, tokenizer, tiny, monkeypatch, most):
    """By plain products, and by the fused kernel where the scores would take too much memory."""
    monkeypatch.setattr("sft.attention.PLAIN_GIB", most)
    (pack,) = make_packs([encode(q, tokenizer, 1024) for q in questions[:8]], Layout(True, 4096, "sparse"))
    found = []
    for dtype, implementation in ((torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (torch.bfloat16, "forest")):
        model = tune_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype), LORA, seed=0)
        random_adapter(model)
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        pack_loss(model, pack, torch.device("cpu")).backward()
        found.append(torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad]))
    exact, dense, forest = found
    assert (forest - exact).norm() < 1.5 * (dense - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_sees_what_the_dense_mask_lets_it_see(questions, tokenizer, tiny, dtype):
    """Forward only: PyTorch has no backward for it on a CPU."""
    rows = [encode(q, tokenizer, 1024) for q in questions[:8]]
    (pack,) = make_packs(rows, Layout(True, 4096, "sparse"))
    assert not is_chain(pack)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype).eval()
    logits = []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(**pack_inputs(model, pack, torch.device("cpu")), use_cache=False).logits.float())
    assert logits[0].shape == logits[1].shape == (1, len(pack.target), len(tokenizer))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * logits[0].std()
    assert (logits[0] - logits[1]).abs().max() < tolerance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward needs a GPU, and there is none")
def test_flex_attention_trains_on_a_gpu_as_the_dense_mask_does(questions, tokenizer, tuned):
    device = torch.device("cuda")
    model = tuned.to(device)
    (pack,) = make_packs([encode(q, tokenizer, 1024) for q in questions[:8]], Layout(True, 4096, "sparse"))
    found = []
    for implementation in ("sdpa", "flex_attention"):
        model.get_base_model().set_attn_implementation(implementation)
        model.zero_grad()
        loss = pack_loss(model, pack, device)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        found.append((loss.item(), gradients))
    tuned.to("cpu")
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert (found[1][1] - found[0][1]).norm() < 1e-3 * found[0][1].norm()


@needs_real("squad_v2/train.json.gz")
def test_one_shared_step_on_real_squad_and_the_real_model_equals_the_flat_one(tokenizer):
    rows = read_squad(REAL_DATA / "squad_v2" / "train.json.gz")
    start = next(i for i, r in enumerate(rows) if not r.answers) // 8 * 8
    chosen = rows[start : start + 12]
    assert len({r.context for r in chosen}) >= 2
    model = tune_model(load_base(Model(base=SMOLLM, dtype="float32"), torch.device("cpu")), LORA, seed=0)
    random_adapter(model)
    assert fuse_lora(model) == 210
    assert_same_step(model, [encode(r, tokenizer, 1024) for r in chosen], Layout())
