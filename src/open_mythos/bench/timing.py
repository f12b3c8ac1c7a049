"""Timing that survives a noisy machine: the contestants take turns, and ratios are of their medians.

Main entries: `race`, `read_bandwidth`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch

Contestants = dict[str, Callable[[], object]]


def race(contestants: Contestants, seconds: float, warmup: int = 2, least: int = 5) -> dict[str, list[float]]:
    """Seconds of each call, the contestants called in turn for about `seconds` in all, at least `least` turns each."""
    for run in contestants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or min(map(len, times.values())) < least:
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return times


def median(values: Iterable[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def read_bandwidth(megabytes: int = 256, seconds: float = 1.0) -> float:
    """Measured bytes per second of reading memory that no cache holds, best of many: what the read floor divides by."""
    data = torch.randn(megabytes * 2**20 // 4)
    times = race({"read": lambda: data.sum()}, seconds)["read"]
    return data.numel() * data.element_size() / min(times)
