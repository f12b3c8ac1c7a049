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

    def __init__(self, threshold: float, n_loops: Tensor, like: Tensor) -> None:
        """`n_loops` (batch,), on the CPU, is each sequence's budget of loops; `like` is a state (batch, seq, dim)."""
        self.threshold = threshold
        self.fewest, self.most = int(n_loops.min()), int(n_loops.max())
        self.budget = n_loops.to(like.device).unsqueeze(-1).expand(like.shape[:2])
        self.active: Tensor | None = None
        """(batch, seq), False where a position has halted; None while none has."""
        self.exit_loops = torch.zeros_like(self.budget)
        """(batch, seq): how many loops each position has run."""
        self._mass = like.new_zeros(like.shape[:2])
        self._remainder = torch.zeros_like(self._mass)
        self._output: Tensor | None = None

    def update(self, h: Tensor, p: Tensor, t: int) -> None:
        """Take loop t's state h (batch, seq, dim) and halting probability p (batch, seq)."""
        rest, mass = 1 - self._mass, self._mass + p
        if self._none_stops(mass, t):
            weight = p
            self.exit_loops = self.exit_loops + 1
        else:
            active = torch.ones_like(p, dtype=torch.bool) if self.active is None else self.active
            stops = active & ((mass >= self.threshold) | (self.budget == t + 1))
            weight = torch.where(stops, rest, p) * active
            self._remainder = self._remainder + rest * stops
            self.exit_loops = self.exit_loops + active
            self.active = active & ~stops
            mass = self._mass + weight
        self._mass = mass
        weight = weight.unsqueeze(-1)
        self._output = weight * h if self._output is None else torch.addcmul(self._output, weight, h)

    def _none_stops(self, mass: Tensor, t: int) -> bool:
        """True if it is certain, without waiting for an accelerator, that every position goes on after loop t."""
        return t + 1 < self.fewest and mass.device.type == "cpu" and float(mass.detach().amax()) < self.threshold

    @property
    def finished(self) -> bool:
        """Whether every position has halted."""
        return self.active is not None and not bool(self.active.any())

    @property
    def output(self) -> Tensor:
        """The weighed mean of the states so far, (batch, seq, dim)."""
        assert self._output is not None
        return self._output

    @property
    def ponder_cost(self) -> Tensor:
        """Mean over positions of the loops run plus the remainder (Graves 2016, equation 12); a scalar."""
        return (self.exit_loops + self._remainder).mean()
