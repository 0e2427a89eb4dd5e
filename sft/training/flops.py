"""Floating-point operations of a training.

Weights that multiply are counted, not parameters: the input embedding is looked up, the head runs on trained tokens
only, and frozen weights get no gradient. LoRA then takes 4 FLOPs a frozen weight and token, 6 a trained one.
"""

from torch import nn
from transformers import PreTrainedModel

from sft.models.capabilities import has_virtual_tokens


def training_flops(model: PreTrainedModel, tokens: int, trained_tokens: int, checkpointing: bool) -> float:
    """2 FLOPs a weight and token for each product: the forward, the gradient of its input if something before it is
    trained (with checkpointing also a second forward), and its own gradient if it is trained.

    Without attention, see attention_flops.
    """
    embedding, head, body = split_weights(model)
    # parameters are registered in the order of the forward pass; virtual tokens come last and are used first
    reached = has_virtual_tokens(model) or any(p.requires_grad for p in embedding)
    flops = 0.0
    for p in body:
        flops += 2 * p.numel() * tokens * (1 + reached * (1 + checkpointing) + p.requires_grad)
        reached = reached or p.requires_grad
    return flops + sum(2 * p.numel() * trained_tokens * (1 + reached + p.requires_grad) for p in head)


def attention_flops(model: PreTrainedModel, pairs: int) -> float:
    """FLOPs of `pairs` (query, key) pairs: each layer has 2 products of hidden size forward and 4 backward."""
    config = model.config.get_text_config()
    width = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return 12.0 * pairs * config.num_attention_heads * width * config.num_hidden_layers


def split_weights(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the input embedding, of the head (the same if tied), and all others."""
    embedding = list(model.get_input_embeddings().parameters())
    head = list(model.get_output_embeddings().parameters())
    ends = {id(p) for p in (*embedding, *head)}
    return embedding, head, [p for p in model.parameters() if id(p) not in ends]
