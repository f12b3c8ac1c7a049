"""The learning rate over training, as a factor of its peak.

Main entry: `Schedule`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a cosine down to `final`; or, for "wsd", level until a linear decay at the end.

    Warm-up-stable-decay: Hu et al. 2024 (arXiv 2404.06395). A level run can be prolonged; a cosine cannot.
    """

    shape: Literal["cosine", "wsd"] = "cosine"
    warmup: int = 20
    """Steps of warm-up."""
    decay: float = 0.4
    """Share of the steps that "wsd" spends decaying."""
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in ("cosine", "wsd"):
            raise ValueError(f"shape is {self.shape!r}; it must be 'cosine' or 'wsd'")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; it must be at least 0")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; it must be a number in (0, 1]")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final is {self.final}; it must be a number in [0, 1]")

    def factor(self, step: int, steps: int) -> float:
        """The factor of step `step` of `steps`, both counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "cosine":
            done = (step - self.warmup) / max(1, steps - self.warmup)
            level = 0.5 * (1 + math.cos(math.pi * done))
        else:
            level = min(1.0, (steps - step) / max(1.0, self.decay * steps))
        return self.final + (1 - self.final) * level
