"""A pack as a model's arguments, and the attention back ends behind its rule: k <= q < end[k] (see data/pack.py).

forest           trunks and branches of the pack by themselves: PyTorch's fused attention, in bfloat16 plain matrix
                 products, which are 1.7 times as fast; on a CPU
sdpa             PyTorch's fused attention with a dense mask, or none for a single sequence; anywhere
eager            the model's own plain matrix products, with a dense mask
flex_attention   a block mask, blocks that nobody sees cost nothing; CUDA (PyTorch has no CPU backward for it)
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data.pack import Pack, attention_mask, is_chain

Implementation = Literal["forest", "sdpa", "eager", "flex_attention"]
PIECE_TOKENS = 64  # shorter branches are computed together
PLAIN_GIB = 2.0  # most memory for the scores of all layers
LENGTHS = 256  # packs are filled up to a multiple for flex_attention, whose kernels are compiled for few lengths


def choose_attention(model: PreTrainedModel, device: torch.device) -> Implementation:
    """The fastest one."""
    text = model.config.get_text_config()
    if device.type == "cuda":
        drops = bool(text.to_dict().get("attention_dropout"))  # which FlexAttention refuses
        return "flex_attention" if model._supports_flex_attn and not drops else "sdpa"
    replaceable = model.config._attn_implementation == "sdpa" and model._supports_attention_backend
    return "forest" if replaceable else "sdpa"


def pack_inputs(model: nn.Module, pack: Pack, device: torch.device) -> dict[str, Any]:
    """Arguments of the model's forward that give the logits [1, M, vocab] at the pack's sources."""
    source = torch.tensor(pack.source, device=device)
    virtual = virtual_tokens(model)
    if virtual is not None:  # PEFT puts the virtual tokens, their mask and positions in front
        ids = torch.tensor([pack.input_ids], device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": source + virtual}
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    inputs = _inputs(pack, inner.config._attn_implementation, inner.get_input_embeddings().weight.dtype, device)
    return inputs | {"logits_to_keep": source}  # the head on answers only: a few percent of the tokens


def virtual_tokens(model: nn.Module) -> int | None:
    """How far prompt learning shifts the hidden states; None for every other method."""
    tuned = extract_model_from_parallel(model, keep_torch_compile=False)  # DDP hides what PEFT has added
    if not isinstance(tuned, PeftModel) or not tuned.active_peft_config.is_prompt_learning:
        return None
    config = cast(Any, tuned.active_peft_config)
    in_cache = config.peft_type in ("PREFIX_TUNING", "CARTRIDGE")
    return 0 if in_cache else config.num_virtual_tokens


def _inputs(pack: Pack, implementation: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """input_ids, position_ids and attention_mask of the pack, as the implementation takes them."""
    ids, positions, end = pack.input_ids, pack.position_ids, pack.end
    mask: torch.Tensor | BlockMask | None = None
    if implementation == "flex_attention":
        more = -len(ids) % LENGTHS  # tokens that see themselves only and that nothing reads
        end = [*end, *range(len(ids) + 1, len(ids) + 1 + more)]
        ids, positions = [*ids, *[0] * more], [*positions, *[0] * more]
        mask = block_mask(end, device)
    elif implementation == "forest":
        mask = torch.tensor(end, device=device)[None, None, None]
    elif not is_chain(pack):
        mask = attention_mask(pack, device)
        if implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)
    inputs = {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.tensor([positions], device=device),
    }
    return inputs if mask is None else {**inputs, "attention_mask": mask}


def block_mask(end: list[int], device: torch.device) -> BlockMask:
    """The rule as FlexAttention takes it."""
    ends = torch.tensor(end, device=device)

    def sees(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < ends[k])

    return create_block_mask(sees, None, None, len(end), len(end), device=device)


@dataclass(frozen=True)
class Piece:
    """Tokens start..stop of a pack. They see those of all `before`, and each other as `sees` says (None: causally)."""

    before: tuple[tuple[int, int], ...]
    start: int
    stop: int
    sees: torch.Tensor | None  # boolean [stop - start, tokens before + stop - start]


@lru_cache(maxsize=4)  # all layers ask for the same
def pieces_of(end: tuple[int, ...]) -> list[Piece]:
    """The pack, so divided that little is computed which nobody sees: a trunk is a piece, and each branch from it, but
    for short ones, which make a piece together. Together they hold each token once, in order."""
    found: list[Piece] = []

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
        seen = sum(b - a for a, b in before)
        causal = not before and all(e >= stop for e in end[start:stop])
        found.append(Piece(before, start, stop, None if causal else functional.pad(sees, (seen, 0), value=True)))

    start = 0
    while start < len(end):
        divide(start, end[start], ())
        start = end[start]
    return found


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
        more = {"scaling": scaling, "dropout": dropout, **kwargs}
        return cast(Any, sdpa_attention_forward(module, query, key, value, attention_mask, **more))
    heads, tokens = query.shape[1:3]
    scores = cast(Any, module).config.num_hidden_layers * heads * tokens**2
    small = scores * 6 <= PLAIN_GIB * 2**30  # fp32 before the softmax, bf16 after it
    plain = query.dtype == torch.bfloat16 and query.device.type == "cpu" and small and not dropout
    found = []
    for piece in pieces_of(tuple(attention_mask.flatten().tolist())):
        ranges = (*piece.before, (piece.start, piece.stop))
        q = query[:, :, piece.start : piece.stop]
        k, v = (
            torch.cat([t[:, :, a:b] for a, b in ranges], dim=2) if piece.before else t[:, :, piece.start : piece.stop]
            for t in (key, value)
        )
        sees = None if piece.sees is None else piece.sees.to(query.device)
        found.append(_attend(q, k, v, sees, scaling, dropout, plain).transpose(1, 2))
    return torch.cat(found, dim=1), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sees: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    plain: bool,
) -> torch.Tensor:
    if not plain:
        causal = sees is None
        # key heads are not repeated: each piece's copy of its trunk is kept for the backward pass
        return scaled_dot_product_attention(query, key, value, sees, dropout, causal, scale=scaling, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    products = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if sees is None:
        sees = torch.ones(products.shape[2:], dtype=torch.bool, device=query.device).tril()
    weights = products.masked_fill(~sees, torch.finfo(query.dtype).min).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


AttentionInterface.register("forest", forest_attention)
AttentionMaskInterface.register("forest", sdpa_mask)
