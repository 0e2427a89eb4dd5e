"""LoRA's products and their gradients in one step, for layers that read the same input together.

PEFT computes a low-rank path in fp32 and adds it to the base's: casts, scaling and sums that each read and write the
whole activation. Here the base's product accumulates the low rank, the backward is written out, and layers with a
common input (q, k and v; gate and up) share one product with their stacked A and one gradient of the input.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import nn

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names of siblings that read one tensor


class Group:
    """LoRA layers of one parent that read the same input. The first one that is called computes all of them; each of
    the others then takes its output."""

    def __init__(self, layers: list[Linear]) -> None:
        self.layers = layers
        self.input: torch.Tensor | None = None
        self.outputs: list[torch.Tensor | None] = []

    def output(self, x: torch.Tensor, position: int, dtype: torch.dtype) -> torch.Tensor:
        if self.input is not x or self.outputs[position] is None:
            names = [layer.active_adapters[0] for layer in self.layers]
            pairs = list(zip(self.layers, names, strict=True))
            low = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer, name in pairs]
            bases = [layer.base_layer for layer in self.layers]
            scalings = [layer.scaling[name] for layer, name in pairs]
            flat = [weight for pair in low for weight in pair]
            self.input, self.outputs = x, list(_Lora.apply(x.to(dtype), bases, scalings, *flat))
        output, self.outputs[position] = self.outputs[position], None
        if not any(o is not None for o in self.outputs):
            self.input = None  # nothing may outlive the layer's call
        return cast(torch.Tensor, output)


class _Lora(torch.autograd.Function):
    """x [..., in] -> for each layer x W^T + bias + scaling x A^T B^T [..., out]; W is frozen, A [r, in], B [out, r]."""

    @staticmethod
    def forward(ctx: Any, x: Any, bases: Any, scalings: Any, *low: Any) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        ranks = [a.shape[0] for a in low[::2]]
        stacked = torch.cat([a.to(x.dtype) for a in low[::2]]) if len(ranks) > 1 else low[0].to(x.dtype)
        scaled = [(b * s).to(x.dtype) for b, s in zip(low[1::2], scalings, strict=True)]
        hidden = flat @ stacked.t()
        outputs = []
        for base, part, b in zip(bases, hidden.split(ranks, 1), scaled, strict=True):
            weight = dense_weight(base)
            out = flat @ weight.t() if base.bias is None else torch.addmm(base.bias, flat, weight.t())
            outputs.append(out.addmm_(part, b.t()).view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, stacked, hidden, *scaled)
        ctx.bases, ctx.scalings, ctx.ranks, ctx.shape = bases, scalings, ranks, x.shape
        ctx.dtypes = [p.dtype for p in low]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        flat, stacked, hidden, *scaled = ctx.saved_tensors
        ranks = ctx.ranks
        ofs = [g.reshape(-1, g.shape[-1]) for g in gradients]
        back = flat.new_empty(flat.shape[0], sum(ranks))
        for of, b, part in zip(ofs, scaled, back.split(ranks, 1), strict=True):
            torch.mm(of, b, out=part)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = back @ stacked
            for of, base in zip(ofs, ctx.bases, strict=True):
                of_x.addmm_(of, dense_weight(base))
            of_x = of_x.view(ctx.shape)
        of_low: list[torch.Tensor] = []
        parts = zip((back.t() @ flat).split(ranks), ofs, hidden.split(ranks, 1), ctx.scalings, strict=True)
        for i, (of_a, of, part, scaling) in enumerate(parts):
            of_low += [of_a.to(ctx.dtypes[2 * i]), (of.t() @ part).to(ctx.dtypes[2 * i + 1]) * scaling]
        return of_x, None, None, *of_low


def dense_weight(base: nn.Module) -> torch.Tensor:
    """The frozen weight [out, in]; a 4-bit one is dequantized, again in the backward, so that it is never stored."""
    weight = cast(Any, base.weight)
    if getattr(weight, "quant_state", None) is None:
        return cast(torch.Tensor, weight)
    from bitsandbytes.functional import dequantize_4bit

    return cast(torch.Tensor, dequantize_4bit(weight.data, weight.quant_state))


def fuse_lora(model: nn.Module) -> int:
    """Replace the forward of every plain LoRA layer; the number of layers. Others (DoRA, dropout, several adapters, a
    trained base layer, 8-bit weights) stay PEFT's."""
    fused = 0
    for parent in model.modules():
        for layers in _groups(parent):
            group = Group(layers)
            for position, layer in enumerate(layers):
                forward = _forward_of(group, position, type(layer).forward)
                setattr(layer, "forward", MethodType(forward, layer))  # noqa: B010, mypy knows it as a method
                fused += 1
    return fused


def _groups(parent: nn.Module) -> Iterator[list[Linear]]:
    """The plain LoRA layers among the children, those with a common input together."""
    plain = {name: child for name, child in parent.named_children() if _is_plain(child)}
    for names in SAME_INPUT:
        together = [plain.pop(name) for name in names if name in plain]
        if len({layer.in_features for layer in together}) == 1:
            yield cast(list[Linear], together)
        else:
            yield from ([cast(Linear, layer)] for layer in together)
    yield from ([cast(Linear, layer)] for layer in plain.values())


def _is_plain(layer: Any) -> bool:
    """Whether the layer is a frozen linear one, dense or 4-bit, with one LoRA adapter and nothing else."""
    if type(layer).__name__ not in ("Linear", "Linear4bit") or not hasattr(layer, "lora_A"):
        return False
    base, adapters = layer.base_layer, layer.active_adapters
    known = type(base) is nn.Linear or type(base).__name__ == "Linear4bit"
    if not known or base.weight.requires_grad or len(adapters) != 1:
        return False
    name = adapters[0]
    return (
        name in layer.lora_A
        and not getattr(layer, "fan_in_fan_out", False)
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and (base.bias is None or not base.bias.requires_grad)
    )


def _forward_of(group: Group, position: int, plain: Any) -> Any:
    def forward(layer: Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, kind = cast(Any, layer.base_layer), x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        wanted = getattr(base, "compute_dtype", None) or base.weight.dtype
        if layer.disable_adapters or layer.merged or dtype != wanted:
            return cast(torch.Tensor, plain(layer, x, *args, **kwargs))
        return group.output(x, position, dtype)

    return forward
