"""A pack as arguments of a model, and the attention back ends for its rule k <= q < end[k] (data/encode/pack.py).

forest           each trunk and branch of the pack by itself; on a CPU (sft/kernels/forest_attention.py), and on CUDA in
                 half precision (sft/kernels/segment_attention.py)
sdpa             PyTorch's fused attention with a dense mask, or none for a single sequence; anywhere
eager            the model's own plain matrix products, with a dense mask
flex_attention   a block mask, whose empty blocks cost nothing; CUDA (PyTorch has no CPU backward for it)
"""

from typing import Any, Literal, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from data.encode.pack import Pack, attention_mask, is_chain
from data.errors import UserError
from sft.kernels.forest_attention import forest_attention
from sft.kernels.segment_attention import segment_attention, segments_of
from sft.models.capabilities import has_virtual_tokens

Implementation = Literal["forest", "sdpa", "eager", "flex_attention"]
LENGTHS = 256  # flex_attention packs are padded to a multiple, since its kernels are compiled for each length


def choose_attention(model: PreTrainedModel, device: torch.device, half: bool = False) -> Implementation:
    """The fastest back end that the model supports on the device, in half precision or not."""
    text = model.config.get_text_config()
    replaceable = model.config._attn_implementation == "sdpa" and model._supports_attention_backend
    if device.type == "cpu":
        return "forest" if replaceable else "sdpa"
    if text.to_dict().get("attention_dropout"):  # which neither FlexAttention nor the forest on a GPU takes
        return "sdpa"
    if half and replaceable and takes_flash(text, device):
        return "forest"
    return "flex_attention" if model._supports_flex_attn else "sdpa"


def takes_flash(config: PretrainedConfig, device: torch.device) -> bool:
    """Whether PyTorch's FlashAttention takes the model's heads on this GPU."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    recent = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    return recent and size <= 256 and size % 8 == 0


def source_logits(model: nn.Module, pack: Pack, device: torch.device) -> torch.Tensor:
    """Logits [M, vocab] at the pack's sources. Raises UserError if the model returns another number of them."""
    if pack.rows is None:
        logits: torch.Tensor = model(**pack_inputs(model, pack, device), use_cache=False).logits
    else:
        logits = _logits_of_rows(model, pack, pack.rows, device)
    if logits.shape[:2] != (1, len(pack.source)):
        name = type(extract_model_from_parallel(model, keep_torch_compile=False)).__name__
        rows, tokens = logits.shape[:2]
        problem = f"returns logits of {rows} x {tokens} tokens instead of {len(pack.source)}"
        raise UserError(f"model.base: {name} {problem}; this architecture can't be trained here, use another base")
    return logits[0]


def _logits_of_rows(model: nn.Module, pack: Pack, rows: int, device: torch.device) -> torch.Tensor:
    arrays = pack.tensors(device)
    ids = arrays.input_ids.view(rows, -1)
    source, width = arrays.source, ids.shape[1]
    row, column = source // width, source % width - width  # from the end: virtual tokens may come first

    def gather(head: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0][row, column][None],)

    # transformers' logits_to_keep takes only positions that are the same in all rows
    head = extract_model_from_parallel(model, keep_torch_compile=False).get_output_embeddings()
    hook = head.register_forward_pre_hook(gather)
    try:
        # PEFT extends this mask by its virtual tokens
        mask = {"attention_mask": torch.ones_like(ids)} if has_virtual_tokens(model) else {}
        logits: torch.Tensor = model(input_ids=ids, **mask, use_cache=False).logits
        return logits
    finally:
        hook.remove()


def pack_inputs(model: nn.Module, pack: Pack, device: torch.device) -> dict[str, Any]:
    """Arguments of the model's forward for logits [1, M, vocab] at the sources of a forest."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    implementation = inner.config._attn_implementation
    arrays = pack.tensors(device)
    ids, positions = arrays.input_ids, arrays.position_ids
    mask: torch.Tensor | BlockMask | None = None
    more: dict[str, Any] = {}
    if implementation == "flex_attention":
        padding = -len(ids) % LENGTHS  # tokens that see only themselves and that nothing reads
        own = torch.arange(len(ids) + 1, len(ids) + 1 + padding, device=device)
        ids, positions = pad(ids, (0, padding)), pad(positions, (0, padding))
        mask = block_mask(torch.cat([arrays.end, own]))
    elif implementation == "forest":
        mask = arrays.end[None, None, None]
        if device.type == "cuda":
            more["segments"] = segments_of(pack.end).to(device)
    elif not is_chain(pack):
        mask = attention_mask(pack, device)
        if implementation == "eager":
            dtype = inner.get_input_embeddings().weight.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)
    inputs = {
        "input_ids": ids[None],
        "position_ids": positions[None],
        # the head is computed on answers only, a few percent of the tokens
        "logits_to_keep": arrays.source,
        **more,
    }
    return inputs if mask is None else {**inputs, "attention_mask": mask}


def block_mask(end: torch.Tensor) -> BlockMask:
    """The rule as FlexAttention's block mask."""

    def sees(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < end[k])

    return create_block_mask(sees, None, None, len(end), len(end), device=str(end.device))


def _forest(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **options: Any
) -> tuple[torch.Tensor, None]:
    half = query.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")
    packed = mask is not None and mask.dtype != torch.bool
    attend: Any = forest_attention
    if query.is_cuda and half and packed and not options.get("dropout"):  # what FlashAttention takes
        attend = segment_attention
    return cast(tuple[torch.Tensor, None], attend(module, query, key, value, mask, **options))


AttentionInterface.register("forest", _forest)
AttentionMaskInterface.register("forest", sdpa_mask)
