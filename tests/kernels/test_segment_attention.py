"""Attention by runs equals attention under the pack's dense mask."""

import random
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from data.encode.chat import Example
from data.encode.pack import attention_mask, build_pack
from sft.kernels import segment_attention as ours
from sft.kernels.segment_attention import segment_attention, segments_of


def runs(q: torch.Tensor, k: torch.Tensor, first_query: torch.Tensor, first_key: torch.Tensor, scale: float) -> Any:
    """Of each run: its slices of queries and of keys, and its scores [key heads, heads a key head, queries, keys]."""
    queries, keys = first_query.tolist(), first_key.tolist()
    for run in range(len(queries) - 1):
        mine, seen = slice(queries[run], queries[run + 1]), slice(keys[run], keys[run + 1])
        scores = torch.einsum("tgrd,sgd->grts", q[mine].unflatten(1, (k.shape[1], -1)), k[seen]) * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + scores.shape[-1] - scores.shape[-2])
        yield mine, seen, scores.masked_fill(hidden, -torch.inf)


def kernel(q, k, v, first_query, first_key, longest, longest_keys, dropout, causal, debug, scale):
    """FlashAttention's forward over sequences, plainly: it is for GPUs only."""
    out, sums = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    for mine, seen, scores in runs(q, k, first_query, first_key, scale):
        out[mine] = torch.einsum("grts,sgd->tgrd", scores.softmax(-1), v[seen]).flatten(1, 2)
        sums[:, mine] = scores.logsumexp(-1).flatten(0, 1).float()
    return out, sums


def kernel_backward(gradient, q, k, v, out, sums, first_query, first_key, *rest, scale):
    """Its backward: gradients of q and of the gathered k and v."""
    of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    groups = (k.shape[1], -1)
    for mine, seen, scores in runs(q, k, first_query, first_key, scale):
        weights = scores.softmax(-1)
        of_out = gradient[mine].unflatten(1, groups)
        of_v[seen] = torch.einsum("grts,tgrd->sgd", weights, of_out)
        of_weights = torch.einsum("tgrd,sgd->grts", of_out, v[seen])
        mean = (of_out * out[mine].unflatten(1, groups)).sum(-1).permute(1, 2, 0)[..., None]
        of_scores = weights * (of_weights - mean) * scale
        of_q[mine] = torch.einsum("grts,sgd->tgrd", of_scores, k[seen]).flatten(1, 2)
        of_k[seen] = torch.einsum("grts,tgrd->sgd", of_scores, q[mine].unflatten(1, groups))
    return of_q, of_k, of_v


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch):
    monkeypatch.setattr(ours, "KERNEL", kernel)
    monkeypatch.setattr(ours, "KERNEL_BACKWARD", kernel_backward)


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
        found, _ = segment_attention(torch.nn.Identity(), *states, mask, 0.3, segments=segments_of(pack.end))
        weights = torch.randn_like(dense)
        wanted = torch.autograd.grad(dense, states, weights)
        of_found = torch.autograd.grad(found, states, weights)
        for a, b in ((dense, found), *zip(wanted, of_found, strict=True)):
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
