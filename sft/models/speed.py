"""How fast this machine multiplies matrices, and which precision that speaks for."""

import time
from functools import cache

import torch


def matmul_flops_per_s(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.3, size: int | None = None
) -> float:
    """Measured with square matrices, `size` rows each: where it isn't told, as many as fill the device."""
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
    """Whether this CPU multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones. CPUs that have the
    instructions differ: one was measured at 0.5 times the speed, another at 4.4 times."""
    rates = [matmul_flops_per_s(CPU, dtype, 0.05, 1024) for dtype in (torch.bfloat16, torch.float32)]
    return rates[0] > 1.5 * rates[1]
