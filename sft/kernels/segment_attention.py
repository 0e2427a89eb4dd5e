"""Attention over a pack on a GPU: each unbranched run of its tokens is a sequence of FlashAttention, whose keys are the
tokens before the run and the run itself. Nothing is compiled, and no score that the mask forbids is computed but those
of the last tile of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

KERNEL = torch.ops.aten._flash_attention_forward
KERNEL_BACKWARD = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True)
class Segments:
    """The runs of a pack with T tokens; S is the number of runs, K that of the keys of all of them.

    keys: int64 [K], the tokens that each run may see, run after run. first_query, first_key: int32 [S + 1], where each
    run's queries and keys begin. longest, longest_keys: at least the most queries and keys of a run.
    """

    keys: torch.Tensor
    first_query: torch.Tensor
    first_key: torch.Tensor
    longest: int
    longest_keys: int

    def to(self, device: torch.device) -> "Segments":
        """On the GPU, copied without waiting for the work that is queued there."""
        keys, first_query, first_key = (
            (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)
            for t in (self.keys, self.first_query, self.first_key)
        )
        return Segments(keys, first_query, first_key, self.longest, self.longest_keys)


def segments_of(end: Sequence[int]) -> Segments:
    """The runs of a pack by its `end` (data/encode/pack.py): a token continues the run of the token before it if it is
    that token's only child."""
    first_query, first_key, keys = [0], [0], list[int]()
    ancestors: list[tuple[int, int]] = []  # the runs above the present one: start, stop
    start = 0
    longest = longest_keys = 1
    for stop in range(1, len(end) + 1):
        if stop < len(end) and end[stop - 1] == end[stop]:
            continue
        while ancestors and end[ancestors[-1][0]] <= start:
            ancestors.pop()
        for a, b in (*ancestors, (start, stop)):
            keys += range(a, b)
        first_query.append(stop)
        first_key.append(len(keys))
        longest = max(longest, stop - start)
        longest_keys = max(longest_keys, first_key[-1] - first_key[-2])
        ancestors.append((start, stop))
        start = stop
    return Segments(
        torch.tensor(keys),
        torch.tensor(first_query, dtype=torch.int32),
        torch.tensor(first_key, dtype=torch.int32),
        _power_of_two(longest),
        _power_of_two(longest_keys),
    )


def _power_of_two(most: int) -> int:
    """The next one: a compiled layer is compiled again for each value."""
    return 1 << (most - 1).bit_length()


@lru_cache(maxsize=1)  # all layers ask for the same
def _segments_of(end: tuple[int, ...], device: torch.device) -> Segments:
    return segments_of(end).to(device)


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, heads, T, size], key and value [1, key heads, T, size],
    attention_mask [1, 1, 1, T] with the pack's `end` -> [1, T, heads, size].

    segments: of the pack; a model that does not hand it on waits here for the mask to come to the host.
    """
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
    s = segments or _segments_of(tuple(attention_mask.flatten().tolist()), query.device)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, _ = _attend(q, k, v, s.keys, s.first_query, s.first_key, s.longest, s.longest_keys, scale)
    return out[None], None


@torch.library.custom_op("graft::segment_attention", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    first_query: torch.Tensor,
    first_key: torch.Tensor,
    longest: int,
    longest_keys: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, heads, size], k and v [T, key heads, size] -> [T, heads, size], and log-sum-exp [heads, T] in fp32.

    FlashAttention aligns a causal mask to the last query and key, which is what a run after its ancestors needs.
    """
    out, sums, *_ = KERNEL(
        q.contiguous(), k.index_select(0, keys), v.index_select(0, keys), first_query, first_key,
        longest, longest_keys, 0.0, True, False, scale=scale,
    )  # fmt: skip
    return out, sums


@_attend.register_fake
def _shapes(q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("graft::segment_attention_backward", mutates_args=())
def _attend_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    keys: torch.Tensor,
    first_query: torch.Tensor,
    first_key: torch.Tensor,
    longest: int,
    longest_keys: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v. The keys are gathered again: stored, they would grow with the branches of a trunk."""
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
    of_q, of_keys, of_values = KERNEL_BACKWARD(
        gradient.contiguous(), q.contiguous(), k.index_select(0, keys), v.index_select(0, keys), out, sums,
        first_query, first_key, longest, longest_keys, 0.0, True, state, state.new_empty(0), scale=scale,
    )  # fmt: skip

    def add_up(gathered: torch.Tensor) -> torch.Tensor:
        """A token's gradient is the sum over the runs that see it; in fp32, because bf16 loses small terms."""
        total = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        return total.index_add_(0, keys, gathered.float()).to(k.dtype)

    return of_q, add_up(of_keys), add_up(of_values)


@_attend_backward.register_fake
def _backward_shapes(gradient: Any, q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, keys, first_query, first_key, longest, longest_keys, scale = inputs
    ctx.save_for_backward(q, k, v, *output, keys, first_query, first_key)
    ctx.numbers = longest, longest_keys, scale


def _backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = cast(Any, _attend_backward)(gradient, *ctx.saved_tensors, *ctx.numbers)
    return *gradients, None, None, None, None, None, None


_attend.register_autograd(_backward, setup_context=_keep)
