"""NEFTune (Jain et al. 2023): noise on the embeddings while a language model is trained, for packs.

The paper adds uniform noise of at most alpha / sqrt(L * d) to a row of L tokens and width d. transformers' own hook
reads L off the batch, which for a pack is the length of all its examples together.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn.functional import pad

from data.encode.pack import Pack


@contextlib.contextmanager
def noisy_embeddings(model: nn.Module, pack: Pack, alpha: float | None, device: torch.device) -> Iterator[None]:
    """Forwards of the pack within the block have noise on their embeddings; None: no noise.

    A prefix that examples share has one embedding and so one draw, the same for all of them.
    """
    if alpha is None:
        yield
        return
    bound = torch.from_numpy(alpha * noise_scale(pack)).to(device, torch.float32)

    def add_noise(embedding: nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        tokens, width = embedded.shape[:-1].numel(), embedded.shape[-1]
        # FlexAttention's padding has no noise
        limit = pad(bound, (0, tokens - len(bound))).view(*embedded.shape[:-1], 1) / width**0.5
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * limit.to(embedded.dtype)

    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    hook = inner.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


def noise_scale(pack: Pack) -> np.ndarray:
    """1 / sqrt(L) for each token of the pack, where L is the length of its example; 0 for padding.

    For a token of several examples the square is the mean of theirs, so its noise has the mean of their variances.
    """
    leaf, end = np.array(pack.leaf), np.array(pack.end)
    lengths = np.array(pack.position_ids)[leaf] + 1
    sums, counts = np.zeros(len(end) + 1), np.zeros(len(end) + 1)
    np.add.at(sums, leaf + 1, 1 / lengths)
    np.add.at(counts, leaf + 1, 1)
    sums, counts = sums.cumsum(), counts.cumsum()
    start = np.arange(len(end))
    examples = counts[end] - counts[start]
    return np.sqrt((sums[end] - sums[start]) / np.maximum(examples, 1))
