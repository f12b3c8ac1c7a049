"""When each sequence of a batch, or each position, runs its loops.

Main entry: `LoopBudget`. All begin together; or, where only the last loops are to be learned from, end together.
Shapes are (batch, 1) where `n_loops` is one number per sequence, (batch, seq) where it is one per position.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LoopBudget:
    """`most` loops in all, of which each sequence or position runs its own number."""

    def __init__(self, n_loops: Tensor, device: torch.device, *, end_together: bool = False) -> None:
        """`n_loops`, (batch,) or (batch, seq), on the CPU, is how many loops each sequence or position runs."""
        self.fewest, self.most = int(n_loops.min()), int(n_loops.max())
        self.n_loops = n_loops.to(device).view(len(n_loops), -1)
        self._delayed = end_together and self.fewest < self.most
        self._first = self.most - self.n_loops if self._delayed else torch.zeros_like(self.n_loops)

    def running(self, t: int) -> Tensor | None:
        """False where loop t is not one of the sequence's own; None if it is everybody's."""
        if self.fewest == self.most or (t < self.fewest and not self._delayed):
            return None
        return (t >= self._first) & (t < self._first + self.n_loops)

    def begin_after(self, t: int) -> Tensor | None:
        """True where the first loop comes after loop t; None if everybody's loops have begun."""
        return self._first > t if self._delayed else None

    def end_at(self, t: int) -> Tensor:
        """True where loop t is the last."""
        return self._first + self.n_loops == t + 1

    def none_ends_at(self, t: int) -> bool:
        """Whether nobody's last loop is t."""
        return t + 1 < (self.most if self._delayed else self.fewest)

    def all_end_at(self, t: int) -> bool:
        """Whether t is everybody's last loop, and all began with the first."""
        return self.fewest == self.most == t + 1

    @property
    def next_index(self) -> int | Tensor:
        """The loop after the last, as each sequence or position counts its own; a tensor where they differ."""
        return self.most if self.fewest == self.most else self.n_loops.unsqueeze(-1)

    def own_index(self, t: int) -> int | Tensor:
        """Loop t as each sequence counts its own, from 0; a tensor with one more dimension where they differ."""
        return (t - self._first).clamp_min(0).unsqueeze(-1) if self._delayed else t
