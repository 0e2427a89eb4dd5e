"""The speed of this machine's matrix products, and the faster precision."""

import time
from functools import cache

import torch


def matmul_flops_per_s(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.3, size: int | None = None
) -> float:
    """Floating-point operations a second, measured on square matrices of `size` rows; the default fills the device."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device, dtype=dtype)
    float((a @ a)[0, 0])
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        float((a @ a)[0, 0])  # reading an element waits for the device
        count += 1
    return 2 * size**3 * count / (time.monotonic() - start)


@cache
def bfloat16_pays() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones.

    Measured, because CPUs with the instructions differ: from 0.5 to 4.4 times the speed.
    """
    cpu = torch.device("cpu")
    bfloat16, float32 = (matmul_flops_per_s(cpu, dtype, 0.05, 1024) for dtype in (torch.bfloat16, torch.float32))
    return bfloat16 > 1.5 * float32
