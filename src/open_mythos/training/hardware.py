"""What the device can do at most, for the utilisation that training reports.

Main entries: `peak_flops`, `matmul_peak`, `has_fast_bfloat16`.
"""

from __future__ import annotations

import re
import time

import torch

# Dense bfloat16 FLOP/s of NVIDIA's data sheets.
_KNOWN = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def peak_flops(device: torch.device) -> float | None:
    """Matrix-product FLOP/s: of the data sheet for a known accelerator, measured in float32 on a CPU, else None."""
    if device.type == "cpu":
        return matmul_peak(size=768, seconds=0.05)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((_KNOWN[word] for word in re.split(r"[\s-]", name) if word in _KNOWN), None)


def matmul_peak(size: int = 1024, seconds: float = 1.0) -> float:
    """Measured FLOP/s of float32 products on the CPU, best of about `seconds` of them and of at least five."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        begin = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32: on GPUs from Ampere on, and on CPUs with matrix tiles."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
