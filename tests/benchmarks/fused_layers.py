"""Norms, rotation and gated activation as one kernel each, for training on a GPU.

PyTorch computes each as several passes over the activation, and stores what lies between them for the backward. Each is
compiled here, once for all layers and lengths, and replaces a module only if both compute the same.
"""

import sys
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean of x^2 over the last dimension + eps), in fp32, rounded to x's dtype and then times the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return functional.silu(gate) * up


def fuse_layers(model: nn.Module) -> int:
    """Replace the forward of every RMSNorm and gated MLP that computes what is written above; the number of both."""
    same: dict[type, bool] = {}
    fused = 0
    for module in model.modules():
        home: Any = sys.modules[type(module).__module__]
        if hasattr(module, "q_proj") and hasattr(home, "apply_rotary_pos_emb"):
            rotate = home.apply_rotary_pos_emb
            if not hasattr(rotate, "_torchdynamo_orig_callable"):
                home.apply_rotary_pos_emb = compiled(rotate)
        forward = _forward_of(module)
        if forward is None:
            continue
        if type(module) not in same:
            same[type(module)] = _computes_the_same(module, forward)
        if same[type(module)]:
            setattr(module, "forward", MethodType(forward, module))  # noqa: B010, mypy knows it as a method
            fused += 1
    return fused


def _forward_of(module: Any) -> Callable[..., torch.Tensor] | None:
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight"):
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        return None if eps is None else lambda self, x: compiled(rms_norm)(_any_length(x), self.weight, eps)
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return lambda self, x: self.down_proj(
            compiled(swiglu)(_any_length(self.gate_proj(x)), _any_length(self.up_proj(x)))
        )
    return None


def _computes_the_same(module: Any, forward: Callable[..., torch.Tensor]) -> bool:
    """Whether the module's own forward gives nearly the same on random input."""
    weight = module.weight if hasattr(module, "weight") else module.gate_proj.weight
    width = module.weight.shape[0] if hasattr(module, "weight") else module.gate_proj.in_features
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
    x = torch.randn(1, 8, width, device=weight.device, dtype=dtype)
    with torch.no_grad():
        own, ours = module(x).float(), forward(module, x).float()
    return bool((own - ours).norm() <= 1e-2 * own.norm())


@cache
def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function as one kernel on CUDA; as it is on a CPU."""
    return torch.compile(function) if torch.cuda.is_available() else function


def _any_length(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.maybe_mark_dynamic(x, 1)  # the number of tokens; widths stay constants of the kernel
    return x
