"""How fast this machine multiplies matrices, and which precision is faster."""

import time
from functools import cache

import torch


def matmul_flops_per_s(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.3, size: int | None = None
) -> float:
    """Floating-point operations a second, measured on square matrices of `size` rows; by default enough to fill the
    device."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device, dtype=dtype)
    float((a @ a)[0, 0])
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        float((a @ a)[0, 0])  # reading an element waits for the device
        count += 1
    return 2 * size**3 * count / (time.monotonic() - start)


CPU = torch.device("cpu")


@cache
def bfloat16_pays() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones.

    Measured, because CPUs that have the instructions differ: from 0.5 to 4.4 times the speed.
    """
    rates = [matmul_flops_per_s(CPU, dtype, 0.05, 1024) for dtype in (torch.bfloat16, torch.float32)]
    return rates[0] > 1.5 * rates[1]
