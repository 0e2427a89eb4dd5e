"""Whether a model computes the same for an example in a pack under a mask, or in padded rows, as for it alone; and
whether vLLM can serve its adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from data.encode.chat import Example
from data.encode.pack import attention_mask, build_pack

# settings of an adapter that vLLM 0.32 refuses, or ignores
UNSERVED = (
    "use_dora", "lora_bias", "layer_replication", "modules_to_save", "trainable_token_indices", "use_qalora",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip


def unserved(config: Mapping[str, Any]) -> list[str]:
    """What of an adapter's configuration keeps vLLM from serving it as it was trained."""
    if config["peft_type"] != "LORA":
        return [f"peft_type {config['peft_type']}"]
    biased = config.get("bias", "none") != "none"
    return [key for key in UNSERVED if config.get(key)] + ["bias"] * biased


def sliding_window(model: PreTrainedModel) -> int | None:
    """Tokens that sliding-window layers see, by the config; None if every layer sees all."""
    text = model.config.get_text_config().to_dict()
    window = text.get("sliding_window")
    slides = "sliding_attention" in (text.get("layer_types") or ()) or text.get("use_sliding_window", True)
    return window if slides else None


def _rope_limit(text: dict[str, Any]) -> int | None:
    """Tokens beyond which a rotary angle depends on the longest sequence of the batch, by the text config."""
    ropes = text.get("rope_parameters") or {}
    for rope in (ropes, *(inner for inner in ropes.values() if isinstance(inner, dict))):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            own = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
            return int(own or text.get("max_position_embeddings") or 1)
    return None


def takes_packs(model: PreTrainedModel, longest: int | None = None) -> bool:
    """Whether a pack's mask isolates examples of at most `longest` tokens (None: of any length).

    Checked by the config (sliding windows, rotary scaling) and by a try: the logits of two branches of a small tree
    must equal those of the two sequences alone, up to the rounding that also changes with a sequence's length
    (bfloat16, quantized products). Coarse rounding could hide a leak: then packs of one shape, which round alike, must
    show none. State-space layers, ALiBi and the like fail the try.
    """
    text = model.config.get_text_config().to_dict()
    kinds = set(text.get("layer_types") or ())
    if kinds - {"full_attention", "sliding_attention"} or model.config._attn_implementation == "eager":
        return False
    if any(limit and (longest is None or longest > limit) for limit in (sliding_window(model), _rope_limit(text))):
        return False
    rows = [Example([5, 6, 7, 8, 9, 10], [0] * 6), Example([5, 6, 7, 11, 12], [0] * 5)]
    device = next(model.parameters()).device

    def logits(ids: list[int], positions: Sequence[int], mask: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids, "position_ids": positions}
        tensors = {name: torch.tensor([value], device=device) for name, value in inputs.items()}
        return model(**tensors, attention_mask=mask, use_cache=False).logits[0].float()

    def longer(ids: list[int]) -> torch.Tensor:
        """The logits at the last of the ids, computed with tokens after it and a mask."""
        every = [*ids, 13, 14, 15]
        causal = torch.ones(1, 1, len(every), len(every), dtype=torch.bool, device=device).tril()
        return logits(every, range(len(every)), causal)[len(ids) - 1]

    def packed(*rows: Example) -> torch.Tensor:
        pack = build_pack([rows])
        return logits(pack.input_ids, pack.position_ids, attention_mask(pack, device))[pack.leaf]

    def isolated(together: torch.Tensor, limit: torch.Tensor) -> bool:
        """Whether neither the tokens of the other branch nor the order of the two change more than the limit."""
        first, second = rows
        changed = (
            packed(first, Example([5, 6, 7, 13, 14], [0] * 5))[0],
            packed(Example([5, 6, 7, 13, 14, 15], [0] * 6), second)[1],
        )
        others = torch.stack(changed), packed(second, first).flip(0)
        return all(bool((other - together).std() < limit) for other in others)

    with torch.inference_mode():
        plain = [model(torch.tensor([r.ids], device=device), use_cache=False).logits[0, -1] for r in rows]
        alone = torch.stack(plain).float()
        try:
            rounding = (torch.stack([longer(r.ids) for r in rows]) - alone).std()
            together = packed(*rows)
        except (RuntimeError, ValueError, TypeError):  # the model takes no such mask
            return False
        spread = alone.std()
        moved = (together - alone).std() - 1e-3 * spread
        small = bool(moved < 0.15 * spread)
        return bool(moved < 4 * rounding) and (
            small or isolated(together, (0.01 if _is_half(model) else 1e-3) * spread)
        )


def _is_half(model: PreTrainedModel) -> bool:
    return next(model.parameters()).dtype != torch.float32


def takes_padding(model: PreTrainedModel, longest: int) -> bool:
    """Whether padding after an example of at most `longest` tokens, and other rows, change nothing in it.

    Batches of one shape round alike, so a difference between two is a leak from padding or another row; a batch and the
    example alone may also differ by the rounding of half precision. `model` may have its adapter.
    """
    limit = _rope_limit(model.config.get_text_config().to_dict())
    if limit and longest > limit:
        return False
    short = [5, 6, 7, 11]
    batches = [[[5, 6, 7, 8, 9, 10], [*short, 0, 0]], [[12, 13, 14, 15, 16, 17], [*short, 18, 19]]]
    device, modes = next(model.parameters()).device, [(module, module.training) for module in model.modules()]
    model.eval()  # dropout would differ
    try:
        with torch.inference_mode():
            alone = model(torch.tensor([short], device=device), use_cache=False).logits[0, -4:]
            # from the end: virtual tokens come first
            one, other = (model(torch.tensor(b, device=device), use_cache=False).logits[1, -6:-2] for b in batches)
    finally:
        for module, training in modes:
            module.training = training
    half = alone.dtype != torch.float32 or _is_half(model)
    spread, leaked, moved = (t.float().std() for t in (alone, one - other, one - alone))
    return bool(leaked < (0.01 if half else 1e-3) * spread and moved < (0.15 if half else 1e-3) * spread)


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether prompt learning puts tokens, or their keys and values, before each example."""
    tuned = extract_model_from_parallel(model, keep_torch_compile=False)  # DDP wraps PEFT's model
    return isinstance(tuned, PeftModel) and bool(tuned.active_peft_config.is_prompt_learning)
