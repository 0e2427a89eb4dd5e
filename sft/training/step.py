"""One optimizer step: its packs on this process, and what they compute.

The loss of a step is the sum over its trained tokens, in all packs on all processes, divided by their number.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from data.encode.pack import Pack
from sft.training.attention import source_logits
from sft.training.noise import noisy_embeddings

ROWS = 64  # rows of logits handled at a time, so that temporary copies stay small


def shard_packs(packs: Sequence[Pack], rank: int, processes: int) -> list[tuple[Pack, float]]:
    """This process's packs with weight 1. Sharded training gathers parameters in every forward, so every process gets
    the same number of packs: a pack of weight 0 fills up."""
    order = sorted(packs, key=lambda p: -len(p.input_ids))
    mine = [(pack, 1.0) for pack in order[rank::processes]]
    most = -(-len(order) // processes)
    return mine + [(order[-1], 0.0)] * (most - len(mine))


def train_step(
    model: nn.Module,
    packs: Sequence[tuple[Pack, float]],
    trained_tokens: int,
    accelerator: Accelerator,
    smoothing: float = 0.0,
    noise_alpha: float | None = None,
) -> torch.Tensor:
    """Forward and backward of this process's packs with their weights; its part of the step's loss, a scalar.

    trained_tokens: of the whole step, over all processes. smoothing: see SumOfNll. noise_alpha: of NEFTune.
    """
    model.train()
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    total = torch.zeros((), device=accelerator.device)
    for i, (pack, weight) in enumerate(packs):
        last = i == len(packs) - 1
        accelerator.gradient_state._set_sync_gradients(last)
        with contextlib.nullcontext() if last or deepspeed else accelerator.no_sync(model):
            # sum, not mean: packs hold different counts of trained tokens. Times the number of processes, because
            # gradients are averaged over them
            with noisy_embeddings(model, pack, noise_alpha, accelerator.device):
                loss = pack_loss(model, pack, accelerator.device, smoothing) * weight
            loss = loss * accelerator.num_processes / trained_tokens
            accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
        total += loss.detach()
    return total


def pack_loss(model: nn.Module, pack: Pack, device: torch.device, smoothing: float = 0.0) -> torch.Tensor:
    """Sum over the pack's trained tokens of -log p(target | its own example's prefix), a scalar in fp32; smoothed as
    SumOfNll says."""
    logits = source_logits(model, pack, device)
    return cast(torch.Tensor, SumOfNll.apply(logits.float(), pack.tensors(device).target, smoothing))


class SumOfNll(torch.autograd.Function):
    """Sum over rows of -log p(target), a scalar. logits [M, vocab] in float32 are overwritten; one backward pass.

    smoothing: the share of a target that is spread evenly over the vocabulary (label smoothing, Szegedy et al. 2016).
    Turns the logits into their gradient in place, already in the forward pass. PyTorch's own loss stores the logits,
    their log-softmax and its gradient: with a vocabulary of 150,000 each takes 0.6 MB a token.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        total = logits.new_zeros(())
        spread = smoothing / logits.shape[1]
        for first in range(0, len(target), ROWS):
            rows, wanted = logits[first : first + ROWS], target[first : first + ROWS, None]
            rows.copy_(rows.log_softmax(dim=-1))
            log_p = rows.gather(1, wanted)
            total -= (1 - smoothing) * log_p.sum() + (spread * rows.sum() if smoothing else 0)
            # d(-log p(target)) / d logits = softmax - onehot(target), without p - 1, which rounds if p is near 1
            rows.exp_().scatter_(1, wanted, log_p.expm1() + smoothing)
            if smoothing:
                rows.sub_(spread)
        ctx.save_for_backward(logits.detach())
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(scale), None, None
