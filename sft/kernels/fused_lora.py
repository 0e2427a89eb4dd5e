"""LoRA's products and their gradients in one step, for layers that read the same input together.

PEFT computes a low-rank path in fp32 and adds it to the base's: casts, scaling and sums that each read and write the
whole activation. Here the base's product accumulates the low rank, the backward is written out, and layers with a
common input (q, k and v; gate and up) share one product with their stacked A and one gradient of the input.
"""

from collections.abc import Iterator, Sequence
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
        stacked, every_b = _in_dtype(low[::2], low[1::2], x.dtype)
        hidden = flat @ stacked.t()
        outputs = []
        for base, part, b, scaling in zip(bases, hidden.split(ranks, 1), every_b, scalings, strict=True):
            weight = dense_weight(base)
            out = flat @ weight.t() if base.bias is None else torch.addmm(base.bias, flat, weight.t())
            outputs.append(out.addmm_(part, b.t(), alpha=scaling).view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, stacked, hidden, *every_b)
        ctx.bases, ctx.scalings, ctx.ranks, ctx.shape = bases, scalings, ranks, x.shape
        ctx.dtype = low[0].dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        flat, stacked, hidden, *every_b = ctx.saved_tensors
        ranks = ctx.ranks
        ofs = [g.reshape(-1, g.shape[-1]) for g in gradients]
        back = flat.new_empty(flat.shape[0], sum(ranks))
        for of, b, part, scaling in zip(ofs, every_b, back.split(ranks, 1), ctx.scalings, strict=True):
            torch.addmm(part, of, b, beta=0, alpha=scaling, out=part)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = back @ stacked
            for of, base in zip(ofs, ctx.bases, strict=True):
                of_x.addmm_(of, dense_weight(base))
            of_x = of_x.view(ctx.shape)
        of_low: list[torch.Tensor] = []
        parts = zip((back.t() @ flat).split(ranks), ofs, every_b, hidden.split(ranks, 1), ctx.scalings, strict=True)
        for of_a, of, b, part, scaling in parts:
            of_low += [of_a, torch.addmm(b, of.t(), part, beta=0, alpha=scaling)]
        return of_x, None, None, *_cast(of_low, ctx.dtype)


def _in_dtype(
    every_a: Sequence[torch.Tensor], every_b: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """All A stacked [sum of ranks, in], and each B, in the dtype."""
    if every_a[0].dtype == dtype:
        return torch.cat(list(every_a)) if len(every_a) > 1 else every_a[0], list(every_b)
    stacked = every_a[0].new_empty(sum(a.shape[0] for a in every_a), every_a[0].shape[1], dtype=dtype)
    copies = [torch.empty_like(b, dtype=dtype) for b in every_b]
    torch._foreach_copy_([*stacked.split([a.shape[0] for a in every_a]), *copies], [*every_a, *every_b])
    return stacked, copies


def _cast(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors in the dtype, in one kernel on a GPU."""
    if tensors[0].dtype == dtype:
        return tensors
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


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
