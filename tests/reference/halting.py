"""Adaptive computation time of one position, in Python floats (Graves 2016, equations 5 to 7), and whether it moved."""

from __future__ import annotations

from torch import Tensor


def has_halted(probabilities: list[float], budget: int, threshold: float) -> bool:
    """Whether a position with these halting probabilities so far runs no further loop."""
    return len(probabilities) >= budget or sum(probabilities) >= threshold


def loop_weights(probabilities: list[float], budget: int, threshold: float) -> list[float]:
    """The weight of every loop that the position runs; the last one takes the remainder."""
    weights: list[float] = []
    for t, p in enumerate(probabilities):
        if has_halted(probabilities[: t + 1], budget, threshold):
            return [*weights, 1 - sum(weights)]
        weights.append(p)
    raise ValueError("the position has not halted yet")


def has_moved(before: Tensor, after: Tensor, tolerance: float) -> bool:
    """Whether a loop changed a state (dim,) by more than that share of its size."""
    return float((after - before).norm()) > tolerance * float(after.norm())
