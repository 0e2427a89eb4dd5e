"""Attention by runs equals attention under the pack's dense mask."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from data.encode.chat import Example
from data.encode.pack import attention_mask, build_pack
from sft.kernels.segment_attention import segment_attention, segments_of


def forest(seed: int):
    """A pack of a few trees, whose examples often begin alike."""
    draw = random.Random(seed)

    def example() -> Example:
        ids = [draw.choice((1, 2)) for _ in range(draw.randint(1, 14))]
        return Example(ids, [0] * len(ids))

    return build_pack([[example() for _ in range(draw.randint(1, 7))] for _ in range(draw.randint(1, 3))])


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_values_and_gradients_of_random_forests_equal_those_of_the_dense_mask(first):
    for seed in range(first, first + 20):
        pack = forest(seed)
        torch.manual_seed(seed)
        states = [torch.randn(1, heads, len(pack.end), 8, requires_grad=True) for heads in (4, 2, 2)]
        dense = scaled_dot_product_attention(*states, attention_mask(pack), scale=0.3, enable_gqa=True).transpose(1, 2)
        mask = torch.tensor(pack.end)[None, None, None]
        ours, _ = segment_attention(torch.nn.Identity(), *states, mask, 0.3, segments=segments_of(pack.end))
        weights = torch.randn_like(dense)
        wanted = torch.autograd.grad(dense, states, weights)
        found = torch.autograd.grad(ours, states, weights)
        for a, b in ((dense, ours), *zip(wanted, found, strict=True)):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-6)


def test_a_model_that_does_not_hand_the_runs_on_gets_the_same():
    pack = forest(3)
    states = [torch.randn(1, heads, len(pack.end), 8) for heads in (4, 2, 2)]
    mask = torch.tensor(pack.end)[None, None, None]
    given, _ = segment_attention(torch.nn.Identity(), *states, mask, segments=segments_of(pack.end))
    found, _ = segment_attention(torch.nn.Identity(), *states, mask)
    assert torch.equal(given, found)


def test_each_run_sees_its_ancestors_and_itself():
    # a trunk of 3 tokens with branches of 1 and 2, then a tree of a single token
    segments = segments_of([6, 6, 6, 4, 6, 6, 7])
    assert segments.first_query.tolist() == [0, 3, 4, 6, 7]
    assert segments.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 4, 5, 6]
    assert segments.first_key.tolist() == [0, 3, 7, 12, 13]
    assert (segments.longest, segments.longest_keys) == (4, 8)  # rounded up


def test_the_operator_is_sound_for_compilation():
    pack = forest(5)
    s = segments_of(pack.end)
    states = [torch.randn(len(pack.end), heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    arguments = (*states, s.keys, s.first_query, s.first_key, s.longest, s.longest_keys, 0.3)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.graft.segment_attention, arguments, test_utils=checks)
