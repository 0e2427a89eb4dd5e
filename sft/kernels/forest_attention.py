"""Attention over a pack on a CPU, each trunk and branch by itself: PyTorch's fused kernel, or in bfloat16 plain matrix
products, which are 1.7 times as fast."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

PIECE_TOKENS = 64  # shorter branches are computed together
PLAIN_GIB = 2.0  # most memory that the scores of all layers may take
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Piece:
    """Tokens start..stop of a pack. They see all tokens of `before`, and each other by the mask of 0 and -inf (None:
    causally)."""

    before: tuple[tuple[int, int], ...]
    start: int
    stop: int
    mask: torch.Tensor | None  # float32 [stop - start, tokens before + stop - start]

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        """The part of [1, heads, T, size] that the piece's tokens may see."""
        ranges = (*self.before, (self.start, self.stop))
        return torch.cat([states[:, :, a:b] for a, b in ranges], dim=2) if self.before else self.own(states)

    def own(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, :, self.start : self.stop]

    @property
    def pairs(self) -> int:
        """Number of query-key pairs."""
        own = self.stop - self.start
        return own * (own + sum(b - a for a, b in self.before))


@lru_cache(maxsize=1)  # all layers ask for the same
def pieces_of(end: tuple[int, ...]) -> list[Piece]:
    """The pack as pieces that compute few masked pairs: a trunk is a piece, and so is each branch from it; neighbouring
    short branches make one piece. The pieces hold each token once, in order."""
    pieces: list[Piece] = []

    def divide(start: int, stop: int, before: tuple[tuple[int, int], ...]) -> None:
        fork = start
        while fork < stop and end[fork] == stop:
            fork += 1
        if fork > start:
            add(start, fork, before)
            before = (*before, (start, fork))
        first = branch = fork
        while branch < stop:
            after = end[branch]
            if after - first > PIECE_TOKENS:
                if branch > first:
                    add(first, branch, before)
                if after - branch > PIECE_TOKENS:
                    divide(branch, after, before)
                    first = after
                else:
                    first = branch
            branch = after
        if first < stop:
            add(first, stop, before)

    def add(start: int, stop: int, before: tuple[tuple[int, int], ...]) -> None:
        index, ends = torch.arange(start, stop), torch.tensor(end[start:stop])
        sees = (index[None, :] <= index[:, None]) & (index[:, None] < ends[None, :])
        earlier = sum(b - a for a, b in before)
        causal = not before and all(e >= stop for e in end[start:stop])
        mask = torch.zeros(sees.shape).masked_fill_(~sees, -torch.inf)
        pieces.append(Piece(before, start, stop, None if causal else functional.pad(mask, (earlier, 0))))

    start = 0
    while start < len(end):
        divide(start, end[start], ())
        start = end[start]
    return pieces


@torch.compiler.disable  # the pieces change from pack to pack
def forest_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, heads, T, size], key and value [1, key heads, T, size],
    attention_mask [1, 1, 1, T] with the pack's `end` -> [1, T, heads, size]. Other masks are left to sdpa."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        return cast(Any, sdpa_attention_forward(module, query, key, value, attention_mask, **options))
    if torch.is_autocast_enabled("cpu"):  # which casts the inputs of PyTorch's own attention too
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    pieces = pieces_of(tuple(attention_mask.flatten().tolist()))
    scores = cast(Any, module).config.num_hidden_layers * query.shape[1] * sum(piece.pairs for piece in pieces)
    small = scores * 6 <= PLAIN_GIB * 2**30  # fp32 before the softmax, bf16 after it
    on_cpu = query.device.type == "cpu"
    plain = on_cpu and query.dtype == torch.bfloat16 and small and not dropout
    if not plain and on_cpu and not dropout and _fits(query, key, value):
        return cast(torch.Tensor, _Fused.apply(query, key, value, pieces, scaling)), None
    outputs = []
    for piece in pieces:
        q, k, v, mask = piece.own(query), piece.keys(key), piece.keys(value), _mask(piece, query)
        if plain:
            o = _plain(q, k, v, mask, scaling)
        else:
            o = scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, scale=scaling, enable_gqa=True)
        outputs.append(o.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the fused kernel, which checks nothing, may take these inputs."""
    return value.shape[3] == query.shape[3] and all(t.stride(3) == 1 for t in (query, key, value))


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    products = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    sees = torch.ones(products.shape[2:], dtype=torch.bool).tril() if mask is None else mask == 0
    weights = products.masked_fill(~sees, torch.finfo(query.dtype).min).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


class _Fused(torch.autograd.Function):
    """The fused kernel over the pieces. Autograd would store a copy of the keys and values that each piece sees, and
    memory would grow with the branches of a trunk; here the backward pass gathers them again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pieces: Sequence[Piece],
        scale: float | None,
    ) -> torch.Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
        sums = []
        for piece in pieces:
            output, sum_of_exp = FUSED(
                piece.own(query), piece.keys(key), piece.keys(value),
                0.0, piece.mask is None, attn_mask=_mask(piece, query), scale=scale,
            )  # fmt: skip
            out[:, piece.start : piece.stop] = output.transpose(1, 2)
            sums.append(sum_of_exp)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.pieces, ctx.scale = pieces, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, *sums = ctx.saved_tensors
        of_out, out = gradient.transpose(1, 2), out.transpose(1, 2)
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for piece, sum_of_exp in zip(ctx.pieces, sums, strict=True):
            q, k, v = FUSED_BACKWARD(
                piece.own(of_out), piece.own(query), piece.keys(key), piece.keys(value), piece.own(out), sum_of_exp,
                0.0, piece.mask is None, attn_mask=_mask(piece, query), scale=ctx.scale,
            )  # fmt: skip
            piece.own(of_query).copy_(q)
            first = 0
            for a, b in (*piece.before, (piece.start, piece.stop)):
                of_key[:, :, a:b] += k[:, :, first : first + b - a]
                of_value[:, :, a:b] += v[:, :, first : first + b - a]
                first += b - a
        return of_query, of_key, of_value, None, None


def _mask(piece: Piece, query: torch.Tensor) -> torch.Tensor | None:
    return None if piece.mask is None else piece.mask.to(query)
