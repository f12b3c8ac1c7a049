"""When a position may stop looping, beyond what the model itself has learned.

Main entries: `ExitRule` and its classes. Rules are plain data; what they remember of a position lies with the position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Memory = dict[str, Tensor]
"""What a rule remembers, tensors (positions, ...)."""


class LoopView(NamedTuple):
    """What a rule may look at after a loop, for n positions, each at its own loop."""

    loop: Tensor
    """(n,): which loop it was, from 0."""
    before: Tensor
    """(n, dim): the state that went in."""
    after: Tensor
    """(n, dim): the state that came out."""
    readout: Callable[[], Tensor]
    """Logits (n, vocab_size) of the states that came out, without the coda; costs a product with the head."""
    memory: Memory
    """What the rule returned after the loop before, zeros for positions in their first; empty if all of them are."""


class ExitRule(Protocol):
    """Decides for each position alone, so that company changes nothing. Rules that are equal are asked together."""

    def exits(self, view: LoopView) -> tuple[Tensor, Memory]:
        """(n,) bool, True where the position stops, and what to remember."""
        ...


@dataclass(frozen=True)
class StateChange:
    """Stops where the state moves less than `tolerance` of its size in a loop (Huginn's latent difference)."""

    tolerance: float = 0.03

    def __post_init__(self) -> None:
        _positive("tolerance", self.tolerance)

    def exits(self, view: LoopView) -> tuple[Tensor, Memory]:
        moved = (view.after - view.before).norm(dim=-1)
        return moved < self.tolerance * view.after.norm(dim=-1), {}


@dataclass(frozen=True)
class PredictionChange:
    """Stops where successive predictions differ by a KL divergence below `tolerance`, in nats (Huginn, 2502.05171)."""

    tolerance: float = 5e-4

    def __post_init__(self) -> None:
        _positive("tolerance", self.tolerance)

    def exits(self, view: LoopView) -> tuple[Tensor, Memory]:
        now = view.readout().float().log_softmax(-1)
        divergence = (now.exp() * (now - view.memory.get("prediction", now))).sum(-1)
        return (divergence < self.tolerance) & (view.loop > 0), {"prediction": now}


@dataclass(frozen=True)
class StableArgmax:
    """Stops where the most likely token has been the same for `loops` loops."""

    loops: int = 3

    def __post_init__(self) -> None:
        _positive("loops", self.loops)

    def exits(self, view: LoopView) -> tuple[Tensor, Memory]:
        best = view.readout().argmax(-1)
        same = (best == view.memory.get("best", best)) & (view.loop > 0)
        runs = torch.where(same, view.memory.get("runs", torch.zeros_like(best)), 0) + 1
        return runs >= self.loops, {"best": best, "runs": runs}


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0")
