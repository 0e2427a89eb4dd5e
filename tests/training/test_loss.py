"""The loss over a vocabulary, against PyTorch's own."""

import pytest
import torch
from torch.nn import functional
from transformers.trainer_pt_utils import LabelSmoother

from sft.training.step import ROWS, SumOfNll


def sum_of_nll(logits: torch.Tensor, target: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    return SumOfNll.apply(logits.float(), target, smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, ROWS, 2 * ROWS + 3])
def test_loss_and_gradient_are_those_of_cross_entropy(rows, dtype, smoothing):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 16, dtype=dtype, requires_grad=True)
    head = torch.randn(1000, 16, dtype=dtype, requires_grad=True)
    target = torch.randint(1000, (rows,))

    def of(loss) -> tuple[torch.Tensor, ...]:
        value = loss((hidden @ head.T * 3).float()) / 7  # logits up to about 50
        return value, *torch.autograd.grad(value, (hidden, head))

    ours = of(lambda logits: sum_of_nll(logits, target, smoothing))
    theirs = of(lambda logits: functional.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_smoothed_loss_is_that_of_transformers():
    torch.manual_seed(0)
    logits, target = torch.randn(9, 50, requires_grad=True), torch.randint(50, (9,))
    theirs = LabelSmoother(0.2)({"logits": logits[None]}, target[None], num_items_in_batch=1)
    torch.testing.assert_close(sum_of_nll(logits * 1, target, 0.2), theirs)


def test_logits_of_a_capped_head_keep_their_gradient():
    """As in Gemma: tanh stores its result for its own backward pass, so the loss must not overwrite it."""
    torch.manual_seed(0)
    raw, target = torch.randn(5, 50, requires_grad=True), torch.arange(5)
    (ours,) = torch.autograd.grad(sum_of_nll(30 * torch.tanh(raw / 30), target), raw)
    loss = functional.cross_entropy(30 * torch.tanh(raw / 30), target, reduction="sum")
    torch.testing.assert_close(ours, torch.autograd.grad(loss, raw)[0])


def test_certain_and_impossible_targets_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]] * 2, requires_grad=True)
    loss = sum_of_nll(logits * 1, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(2e4)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0, 0], [1, -1, 0]]
