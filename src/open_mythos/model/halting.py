"""When each position stops, and how its loops are weighed; a halted position is frozen: its state no longer changes.

Main entries: `ACTHalting` predicts and `ACTAccumulator` decides (adaptive computation time, Graves 2016, arXiv
1603.08983); `SettledState` asks whether anything still moves (`has_moved`); `LastState`
stops nobody.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.model.budget import LoopBudget


class ACTHalting(nn.Module):
    """A halting probability per position from the state: `sigmoid(w . h / rms(h) + b)`."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.halt = nn.Linear(dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        """h (batch, seq, dim) to halting probabilities (batch, seq)."""
        root = h.shape[-1] ** 0.5
        norm = torch.linalg.vector_norm(h, dim=-1)
        logit = F.linear(h, self.halt.weight).squeeze(-1)
        return torch.sigmoid(torch.addcdiv(self.halt.bias, logit, norm + root * self.eps, value=root))


class Stopping:
    """Which positions still run: each its loops of the budget, unless it stops before; here nobody does."""

    def __init__(self, budget: LoopBudget, like: Tensor) -> None:
        """`like` is a state (batch, seq, dim)."""
        self.budget, self._shape = budget, like.shape[:2]
        self._going_on: Tensor | None = None
        """(batch, seq), False where a position has stopped; None before any has."""

    def active(self, t: int) -> Tensor | None:
        """(batch, seq), False where a position does not run loop t; None if all do."""
        running = self.budget.running(t)
        if running is None or self._going_on is None:
            return self._going_on if running is None else running.expand(self._shape)
        return running & self._going_on

    @property
    def finished(self) -> bool:
        """Whether every position has stopped."""
        return self._going_on is not None and not bool(self._going_on.any())

    def _stop(self, stops: Tensor) -> None:
        """Positions where `stops` (batch, seq) is True run no further loop."""
        self._going_on = ~stops if self._going_on is None else self._going_on & ~stops


class ACTAccumulator(Stopping):
    """Weighs the states of successive loops so that every position's weights sum to exactly 1.

    Each loop weighs as much as its halting probability, until the sum reaches the threshold or the position's loops
    are used up: that loop takes what remains, and the position has halted.
    """

    def __init__(self, threshold: float, budget: LoopBudget, like: Tensor) -> None:
        """`like` is a state (batch, seq, dim)."""
        super().__init__(budget, like)
        # Rounded as comparing a tensor with a number does: what is compared in Python must not stop elsewhere.
        self.threshold = torch.tensor(threshold, dtype=like.dtype, device="cpu").item()
        self._mass = like.new_zeros(like.shape[:2])
        self._exit_loops: Tensor | int = 0  # a number for as long as it is the same everywhere
        self._remainder: Tensor | float = 0.0
        self._output: Tensor | None = None

    def update(self, h: Tensor, p: Tensor | None, t: int) -> None:
        """Take loop t's state h (batch, seq, dim) and halting probability p (batch, seq)."""
        assert p is not None
        active, mass = self.active(t), self._mass + p
        if active is None and self._none_stops(mass, t):
            weight, self._exit_loops = p, self._exit_loops + 1
        elif active is None and self.budget.all_end_at(t) and not p.requires_grad:  # zero is a gradient, too
            weight = self._remainder = 1 - self._mass
            self._exit_loops, self._going_on = self._exit_loops + 1, torch.zeros_like(p, dtype=torch.bool)
        else:
            weight = self._stop_some(torch.ones_like(p, dtype=torch.bool) if active is None else active, p, t)
            mass = self._mass + weight
        self._mass = mass
        weight = weight.unsqueeze(-1)
        self._output = weight * h if self._output is None else torch.addcmul(self._output, weight, h)

    def _stop_some(self, active: Tensor, p: Tensor, t: int) -> Tensor:
        """Each position's weight, some of which may be the last."""
        rest, mass = 1 - self._mass, self._mass + p
        stops = active & ((mass >= self.threshold) | self.budget.end_at(t))
        self._remainder = self._remainder + rest * stops
        self._exit_loops = self.exit_loops + active
        self._stop(stops)
        return torch.where(stops, rest, p) * active

    def _none_stops(self, mass: Tensor, t: int) -> bool:
        """True if it is certain, without waiting for an accelerator, that every position goes on after loop t."""
        on_cpu = mass.device.type == "cpu"
        return self.budget.none_ends_at(t) and on_cpu and float(mass.detach().amax()) < self.threshold

    @property
    def exit_loops(self) -> Tensor:
        """(batch, seq): how many loops each position has run."""
        if isinstance(self._exit_loops, Tensor):
            return self._exit_loops
        return torch.full_like(self._mass, self._exit_loops, dtype=torch.int32)

    @property
    def output(self) -> Tensor:
        """The weighed mean of the states so far, (batch, seq, dim)."""
        assert self._output is not None
        return self._output

    def output_if_ended(self, h: Tensor) -> Tensor:
        """What `output` would be if the last loop, whose state is h, had been everybody's last."""
        rest = 1 - self._mass if self._going_on is None else (1 - self._mass) * self._going_on
        return torch.addcmul(self.output, rest.unsqueeze(-1), h)

    @property
    def ponder_cost(self) -> Tensor:
        """Mean over positions of the loops run plus the remainder (Graves 2016, equation 12); a scalar."""
        return (self.exit_loops + self._remainder).mean()


class LastState(Stopping):
    """What `ACTAccumulator` is to a model with halting, for one without: the last loop's state is the output."""

    ponder_cost: Tensor

    def __init__(self, budget: LoopBudget, like: Tensor) -> None:
        """`like` is a state (batch, seq, dim)."""
        super().__init__(budget, like)
        self.output = like
        self.exit_loops = budget.n_loops.expand(self._shape)
        self.ponder_cost = like.new_zeros(())

    def update(self, h: Tensor, p: Tensor | None, t: int) -> None:
        """Take loop t's state h (batch, seq, dim)."""
        self.output = h

    def output_if_ended(self, h: Tensor) -> Tensor:
        """The last loop's state h."""
        return h


class SettledState(LastState):
    """Stops a position once a loop moves neither it nor any position before it by more than `tolerance` of its size.

    A position by itself may rest while information is still on its way to it. But attention is causal: the states up to
    a position follow from one another alone. Where every loop is the same function (no loop embedding, no adapter) and
    leaves them exactly as they were, so does every further loop. A tolerance makes this a heuristic: states that creep
    by less than it are stopped too early.
    """

    def __init__(self, tolerance: float, budget: LoopBudget, like: Tensor, reached: Tensor | None = None) -> None:
        """`like` is a state (batch, seq, dim); `reached` (batch, 1): what the position before the first one ran."""
        super().__init__(budget, like)
        self.tolerance, self._reached = tolerance, reached
        self.exit_loops = torch.zeros(self._shape, dtype=torch.int32, device=like.device)

    def update(self, h: Tensor, p: Tensor | None, t: int) -> None:
        """Take loop t's state h (batch, seq, dim)."""
        active = self.active(t)
        self.exit_loops = self.exit_loops + (1 if active is None else active)
        before, self.output = self.output, h
        if t > 0:  # before loop 0 there is no state that a loop has left
            settled = self._settled(before, h, t)
            if self._going_on is not None or bool(settled.any()):
                self._stop(settled)

    def _settled(self, before: Tensor, h: Tensor, t: int) -> Tensor:
        """(batch, seq): whether loop t has moved no position up to this one; halted ones do not move."""
        moved = has_moved(before, h, self.tolerance)
        if self._reached is not None:
            moved = moved | (self._reached > t + 1)
        return moved.cummax(1).values.logical_not()


def has_moved(before: Tensor, after: Tensor, tolerance: float) -> Tensor:
    """Whether states (..., dim) are further apart than `tolerance` of the later one's size; what is NaN never rests."""
    size = torch.linalg.vector_norm(after, dim=-1)
    return ~(torch.linalg.vector_norm(after - before, dim=-1) <= tolerance * size)
