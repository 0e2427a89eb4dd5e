"""Frozen embeddings of texts: the mean of an encoder's last token states, normalised, as of a sentence encoder."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from data.encode.tokens import encode_texts
from data.terminal import print
from sft.baselines.encoder import check_positions, load_encoder, load_tokenizer, predict
from sft.errors import RecipeError
from sft.models.load import default_device
from sft.recipe.baseline_schema import EncoderModel


class MeanOfTokens(nn.Module):
    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, attention_mask: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
        states = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        mask = attention_mask[..., None]
        return {"embedding": nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)}


def embedder(model: EncoderModel, max_seq_length: int) -> tuple[Callable[[Sequence[str]], np.ndarray], int]:
    """A function from texts to embeddings [texts, hidden] in float32, and the encoder's number of parameters. It reads
    the first max_seq_length tokens. Raises RecipeError if the base is no encoder or max_seq_length exceeds it."""
    check_positions(model, max_seq_length)
    tokenizer = load_tokenizer(model)
    encoder = load_encoder(model, "features", seed=0)
    if encoder.config.is_encoder_decoder:
        remedy = "name an encoder, as google-bert/bert-base-uncased"
        raise RecipeError(f"model.base: {model.base} has a decoder too; {remedy}")
    mean = MeanOfTokens(encoder).to(default_device())

    def embed(texts: Sequence[str]) -> np.ndarray:
        rows, cut = encode_texts(texts, tokenizer, max_seq_length)
        if cut and len(rows) > 1:
            print(f"{cut} of {len(rows)} texts are embedded by their first {max_seq_length} tokens", flush=True)
        return np.stack([row for (row,) in predict(mean, rows, tokenizer, ("embedding",), bf16=False)])

    return embed, sum(p.numel() for p in mean.parameters())
