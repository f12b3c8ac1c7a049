"""Sequences that in training go back to their first state once, as if they had begun later and run fewer loops.

Main entry: `Restarts`. With one depth for all, a model could otherwise count its loops and be right after the last one
alone. Loops keep their numbers: where these are counted anew, models learn less (docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from open_mythos.model.budget import LoopBudget


class Restarts:
    """After how many of its loops each sequence goes back, drawn for one pass."""

    def __init__(self, rate: float, budget: LoopBudget) -> None:
        """`rate` is the share of those with more than one loop that go back at all."""
        own, device = budget.n_loops.amax(1, keepdim=True), budget.n_loops.device
        drawn = torch.randint(budget.most - 1, own.shape, device=device)
        after = 1 + drawn * (own - 1) // (budget.most - 1)  # of its own loops, however many the batch has
        chosen = torch.rand(own.shape, device=device) < rate
        self.skipped = after * (chosen & (after < budget.n_loops))
        """How many loops do not count, (batch, 1), or (batch, seq) where positions have depths of their own."""
        self._begins = budget.first + self.skipped

    def state(self, h: Tensor, first: Tensor, t: int) -> Tensor:
        """What goes into loop t in place of the state h (batch, seq, dim): the first state of who begins with it."""
        return h if t == 0 else torch.where((self._begins == t).unsqueeze(-1), first, h)

    def weights(self, p: Tensor, t: int) -> Tensor:
        """The halting probabilities p (batch, seq) of loop t, 0 before a sequence begins."""
        return p * (self._begins <= t)
