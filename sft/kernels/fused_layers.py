"""Norms, gated activation and rotation as one kernel each on a GPU.

PyTorch computes each in several passes over the activation, and keeps what lies between them for the backward. Here
the backward is written out and keeps the inputs only. On a CPU the same functions run uncompiled.
"""

import copy
import sys
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean of x^2 over the last dimension + eps), in fp32, rounded to x's dtype and then times the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm_backward(of_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The gradient of x: s (g - x s^2 mean(g x)); s is 1 / sqrt(mean of x^2 + eps), g the gradient times the weight."""
    wide, g = x.float(), (of_y * weight).float()
    s = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (s * (g - wide * s.pow(2) * (g * wide).mean(-1, keepdim=True))).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return functional.silu(gate) * up


def swiglu_backward(of_y: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up; the derivative of silu is s (1 + gate (1 - s)), where s is sigmoid(gate)."""
    g, wide, s = of_y.float(), gate.float(), torch.sigmoid(gate.float())
    return (g * up.float() * s * (1 + wide * (1 - s))).to(gate.dtype), (g * wide * s).to(up.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _run(rms_norm, x, weight, eps)

    @staticmethod
    def backward(ctx: Any, of_y: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return _run(rms_norm_backward, of_y, x, weight, ctx.eps), None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _run(swiglu, gate, up)

    @staticmethod
    def backward(ctx: Any, of_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return _run(swiglu_backward, of_y, *ctx.saved_tensors)


def fuse_layers(model: nn.Module) -> int:
    """Replace the forward of every frozen RMSNorm and gated MLP that computes what is written above, and the rotation
    of their architecture; the number of norms and MLPs. Raises the compiler's errors before it replaces anything."""
    same: dict[type, bool] = {}
    chosen: list[tuple[nn.Module, Callable[..., torch.Tensor]]] = []
    homes: set[Any] = set()
    for module in model.modules():
        if hasattr(module, "q_proj"):
            homes.add(sys.modules[type(module).__module__])
        fused = _fused_forward(module)
        if fused is None or "forward" in module.__dict__:
            continue
        if type(module) not in same:
            same[type(module)] = _computes_the_same(module, fused)
        if same[type(module)]:
            chosen.append((module, fused))
    device = next(model.parameters()).device
    if device.type == "cuda":
        _try_compiler(device)
    for module, fused in chosen:
        setattr(module, "forward", MethodType(fused, module))  # noqa: B010, mypy knows it as a method
    for home in homes:
        if not hasattr(getattr(home, "apply_rotary_pos_emb", _rotation), "rotates"):
            home.apply_rotary_pos_emb = _rotation(home.apply_rotary_pos_emb)
    return len(chosen)


def _fused_forward(module: Any) -> Callable[..., torch.Tensor] | None:
    if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter):
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        if eps is None or module.weight.requires_grad:
            return None
        return lambda self, x: cast(torch.Tensor, _RmsNorm.apply(x, self.weight, eps))
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return lambda self, x: self.down_proj(_SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))
    return None


def _computes_the_same(module: nn.Module, fused: Callable[..., torch.Tensor]) -> bool:
    """Whether the module's own forward gives the same on random input; its products are left out."""
    probe = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 64, generator=generator)
    if "weight" in module._parameters:
        probe._parameters = {"weight": nn.Parameter(torch.randn(64, generator=generator), requires_grad=False)}
    else:
        products = {"gate_proj": nn.Identity(), "up_proj": nn.Tanh(), "down_proj": nn.Identity()}
        probe._modules = {**module._modules, **products}
    with torch.no_grad(), torch.device("cpu"):
        return torch.allclose(type(module).forward(probe, x), fused(probe, x), rtol=1e-5, atol=1e-6)


def _try_compiler(device: torch.device) -> None:
    """Raise what the compiler raises; it needs Triton and a C compiler."""
    x = torch.ones(1, 8, 64, device=device)
    _run(rms_norm, x, x[0, 0], 1e-6)


def _rotation(rotate: Callable[..., Any]) -> Callable[..., Any]:
    """A module's rotation of q and k [1, heads, T, size] by cos and sin [1, T, size], as one kernel; any number of
    models of this architecture use it."""

    def rotated(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if not q.is_cuda or args or kwargs:
            return rotate(q, k, cos, sin, *args, **kwargs)
        for tensor, dimension in ((q, 2), (k, 2), (cos, 1), (sin, 1)):
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        return _compiled(rotate)(q, k, cos, sin)

    cast(Any, rotated).rotates = True
    return rotated


def _run(function: Callable[..., Any], x: torch.Tensor, *rest: Any) -> Any:
    if isinstance(x, FakeTensor):  # memory is counted: one kernel makes its results, and nothing between
        return tuple(map(torch.empty_like, rest)) if function is swiglu_backward else torch.empty_like(x)
    if not x.is_cuda:
        return function(x, *rest)
    for tensor in (x, *(t for t in rest if isinstance(t, torch.Tensor) and t.dim() == x.dim())):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)  # the number of tokens; widths stay constants of the kernel
    return _compiled(function)(x, *rest)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
