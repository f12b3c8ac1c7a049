"""Adaptive computation time: when each position stops, and how its loops are weighed (Graves 2016, arXiv 1603.08983).

Main entries: `ACTHalting` predicts, `ACTAccumulator` decides. A halted position is frozen: its state no longer changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ACTHalting(nn.Module):
    """A halting probability per position from the state: `sigmoid(w . h / rms(h) + b)`."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.halt = nn.Linear(dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        """h (batch, seq, dim) to halting probabilities (batch, seq)."""
        size = torch.linalg.vector_norm(h, dim=-1) * h.shape[-1] ** -0.5
        return torch.sigmoid(F.linear(h, self.halt.weight).squeeze(-1) / (size + self.eps) + self.halt.bias)


class ACTAccumulator:
    """Weighs the states of successive loops so that every position's weights sum to exactly 1.

    Each loop weighs as much as its halting probability, until the sum reaches the threshold or the position's loops
    are used up: that loop takes what remains, and the position has halted.
    """

    def __init__(self, threshold: float, budget: Tensor) -> None:
        """`budget` (batch, seq) is the most loops that each position may run."""
        self.threshold, self.budget = threshold, budget
        self.active = budget > 0
        self.exit_loops = torch.zeros_like(budget)
        self.remainder: Tensor | None = None
        self.output: Tensor | None = None
        self._mass: Tensor | None = None

    def update(self, h: Tensor, p: Tensor, t: int) -> None:
        """Take loop t's state h (batch, seq, dim) and halting probability p (batch, seq)."""
        mass = torch.zeros_like(p) if self._mass is None else self._mass
        rest = 1 - mass
        stops = self.active & ((mass + p >= self.threshold) | (self.budget == t + 1))
        weight = torch.where(stops, rest, p) * self.active
        weighed = weight.unsqueeze(-1) * h
        self.output = weighed if self.output is None else self.output + weighed
        self.remainder = rest * stops if self.remainder is None else self.remainder + rest * stops
        self._mass = mass + weight
        self.exit_loops = self.exit_loops + self.active.to(self.exit_loops.dtype)
        self.active = self.active & ~stops

    @property
    def ponder_cost(self) -> Tensor:
        """Mean over positions of the loops run plus the remainder (Graves 2016, equation 12); a scalar."""
        assert self.remainder is not None
        return (self.exit_loops + self.remainder).mean()
