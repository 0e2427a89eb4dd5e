"""Packs compute a shared prefix once, stay within the budget, and steps hold the same examples with and without it."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from data.encode.chat import Example, encode
from data.encode.pack import Layout, attention_mask, build_pack, make_packs, step_order
from data.encode.prefix_savings import measure_sharing
from sft.training.step import shard_packs
from tests.helpers.builders import stored


def example(*ids: int, trained: int = 1) -> Example:
    return Example(list(ids), [0] * (len(ids) - trained) + [1] * trained)


def test_common_prefix_occurs_once_in_preorder():
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
        attended = mask[leaf].nonzero().flatten().tolist()
        assert [pack.input_ids[i] for i in attended] == row.ids


def test_every_trained_token_of_every_example_has_a_target():
    same = example(1, 2, 3, trained=2)
    pack = build_pack([[same, same, example(1, 2, 4, trained=1)]])
    assert sorted(pack.target) == [2, 2, 3, 3, 4]
    assert pack.input_ids == [1, 2, 3, 4]


def test_packs_hold_every_example_once_for_any_budget(questions, tokenizer):
    examples = [encode(q, tokenizer, 1024) for q in questions]
    wanted = sorted(t for e in examples for t, m in zip(e.ids, e.loss_mask, strict=True) if m)
    longest = max(len(e.ids) for e in examples)
    for share in (True, False):
        for budget in (100, 700, 5000):
            for attention in ("dense", "sparse", "padded", "alone"):
                packs = make_packs(examples, Layout(share, budget, attention))
                assert sorted(t for p in packs for t in p.target) == wanted
                assert max(len(p.input_ids) for p in packs) <= max(budget, longest)


def test_without_sharing_every_token_is_computed_and_with_sharing_a_part(questions, tokenizer):
    examples = [encode(q, tokenizer, 1024) for q in questions[:12]]
    flat = sum(len(e.ids) for e in examples)
    assert sum(len(p.input_ids) for p in make_packs(examples, Layout(False))) == flat
    assert sum(len(p.input_ids) for p in make_packs(examples, Layout(True))) < 0.4 * flat


def test_without_a_mask_each_example_is_a_row(questions, tokenizer):
    examples = [encode(q, tokenizer, 1024) for q in questions]
    assert [p.rows for p in make_packs(examples, Layout(False, attention="alone"))] == [1] * 96
    packs = make_packs(examples, Layout(False, 1024, "padded"))
    assert len(packs) < 48
    padding = sum(len(p.input_ids) for p in packs) - sum(len(e.ids) for e in examples)
    assert 0 < padding < 32 * 96
    for pack in packs:
        width = len(pack.input_ids) // pack.rows
        rows = [pack.input_ids[i * width : leaf + 1] for i, leaf in enumerate(pack.leaf)]
        assert all(row in [e.ids for e in examples] for row in rows)
        assert pack.position_ids == [*range(width)] * pack.rows


def rows_of(prefix: int, own: int, count: int) -> list[Example]:
    """Examples that share `prefix` tokens and have `own` ones each."""
    return [example(*range(10, 10 + prefix), *(1000 * (i + 1) + n for n in range(own))) for i in range(count)]


@pytest.mark.parametrize(
    ("prefix", "own", "attention", "packs"),
    [
        (200, 25, "dense", 1),  # a passage and its questions
        (30, 300, "dense", 6),  # a system prompt: attention over the joined trees costs more than it saves
        (30, 300, "sparse", 1),  # masked blocks are free, so any prefix is worth sharing
    ],
)
def test_a_prefix_is_shared_if_it_saves_more_than_attention_over_the_joined_trees_costs(prefix, own, attention, packs):
    layout = Layout(True, 4096, attention)
    shared = make_packs(rows_of(prefix, own, 6), layout)
    assert len(shared) == packs
    flat = make_packs(rows_of(prefix, own, 6), Layout(False, 4096, attention))
    assert sum(layout.cost(len(p.input_ids)) for p in shared) <= sum(layout.cost(len(p.input_ids)) for p in flat)


def test_ten_times_the_questions_of_a_context_make_no_larger_pack():
    for count in (10, 100):
        packs = make_packs(rows_of(200, 25, count), Layout(True, 512))
        assert 450 <= max(len(p.input_ids) for p in packs) <= 512


def test_trees_fill_all_packs_except_the_last_if_masked_attention_is_free():
    rows = rows_of(0, 100, 17)
    assert [len(p.input_ids) for p in make_packs(rows, Layout(True, 512, "sparse"))] == [500, 500, 500, 200]
    assert max(len(p.input_ids) for p in make_packs(rows, Layout(True, 512, "dense"))) < 300


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("attention", ["dense", "sparse", "padded"])
def test_a_step_that_fits_into_one_pack_is_divided_among_the_processes(attention, processes, questions, tokenizer):
    examples = [encode(q, tokenizer, 1024) for q in questions]
    layout = Layout(attention != "padded", 50_000, attention)
    packs = make_packs(examples, layout, processes)
    assert sorted(t for p in packs for t in p.target) == sorted(t for p in make_packs(examples) for t in p.target)
    alone = sum(layout.cost(len(p.input_ids)) for p in make_packs(examples, layout))
    shares = [shard_packs(packs, rank, processes) for rank in range(processes)]
    slowest = max(sum(layout.cost(len(pack.input_ids)) for pack, _ in share) for share in shares)
    assert slowest < 1.4 * alone / processes


def test_a_passage_is_not_computed_by_two_processes_if_that_takes_longer():
    layout = Layout(True, 512, "sparse")
    assert len(make_packs(rows_of(400, 2, 30), layout, 2)) == 1
    assert len(make_packs(rows_of(200, 25, 10), layout, 2)) == 2


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


def test_sharing_does_not_pay_if_nothing_is_shared(tmp_path):
    rows = [example(*(100 * i + n for n in range(40))) for i in range(30)]
    sharing = measure_sharing(stored(tmp_path, rows), Layout(True), 8, seed=0)
    assert (sharing.ratio, sharing.gain, sharing.pays) == (1.0, 1.0, False)
