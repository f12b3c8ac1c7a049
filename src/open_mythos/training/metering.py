"""From the sums of a step to the figures that people read.

Main entries: `StepSums`, `Meter`.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.cost import forward_flops
from open_mythos.training.depth import LoopPlan
from open_mythos.training.objective import Contribution
from open_mythos.training.records import StepRecord


class StepSums(NamedTuple):
    """What a step left, its tensors perhaps still on their way from the device."""

    step: int
    figures: Tensor
    """Sums of loss, z, ponder cost, right answers, exit loops and state norms, and the norm of the gradients."""
    load: Tensor
    """(loops, layers, experts)."""
    a: Tensor
    """(dim,): the diagonal of A."""
    counted: int
    """Tokens in the loss."""
    positions: int
    plan: LoopPlan
    learning_rate: float
    seconds: float
    """Since the step before ended."""
    skipped: bool

    def finite(self) -> bool:
        """Whether loss and gradients are finite; waits for the device."""
        return bool(self.figures.isfinite().all())

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return float(self.figures[0]) / self.counted

    @property
    def grad_norm(self) -> float:
        """Before clipping."""
        return float(self.figures[-1])


class Meter:
    """Turns sums into records, and measures the time that steps take."""

    def __init__(self, config: MythosConfig, peak_flops: float | None, bytes_per_token: float | None) -> None:
        """`peak_flops` is of all devices together, None where it is not known."""
        self._config, self._peak, self._bytes = config, peak_flops, bytes_per_token
        self.restart()

    def restart(self) -> None:
        """Begin to measure time now."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or restart."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    def read(self, sums: StepSums) -> StepRecord:
        """The record of a step."""
        loss, _, ponder, right, exits, state_norm, grad_norm = sums.figures.tolist()
        mean_loss = loss / sums.counted
        return StepRecord(
            step=sums.step,
            loss=mean_loss,
            bits_per_byte=None if self._bytes is None else mean_loss / math.log(2) / self._bytes,
            accuracy=right / sums.counted,
            grad_norm=grad_norm,
            learning_rate=sums.learning_rate,
            tokens_per_second=sums.positions / sums.seconds,
            flop_utilisation=None if self._peak is None else self._flops(sums) / sums.seconds / self._peak,
            mean_loops=float(sums.plan.n_loops.float().mean()),
            mean_exit_loops=exits / sums.positions,
            ponder_cost=ponder / sums.positions,
            state_norm=state_norm / sums.positions,
            a_low=float(sums.a.min()),
            a_mean=float(sums.a.mean()),
            a_high=float(sums.a.max()),
            skipped=sums.skipped,
            load=_shares(sums.load),
        )

    def _flops(self, sums: StepSums) -> float:
        """FLOPs of a step's products; the backward has two for each one of the forward."""
        per_token = forward_flops(self._config, sums.positions // len(sums.plan.n_loops))
        loops = sums.plan.n_loops.float()
        learned = loops if sums.plan.grad_loops is None else loops.clamp_max(sums.plan.grad_loops)
        return sums.positions * (3 * per_token.total(0) + per_token.loop * float((loops + 2 * learned).mean()))


def scalars(sums: Contribution) -> Tensor:
    """The sums that are single numbers, in the order of `StepSums.figures`."""
    return torch.stack([sums.loss, sums.z, sums.ponder, sums.right, sums.exit_loops, sums.state_norm])


def add(total: Contribution | None, new: Contribution, plan: LoopPlan) -> Contribution:
    """The sum of micro-batches, their loads aligned as the whole batch's loops are; A is taken from the newest."""
    absent = int(plan.n_loops.max()) - new.load.shape[0]
    before, after = (0, absent) if plan.grad_loops is None else (absent, 0)
    load = nn.functional.pad(new.load, (0, 0, 0, 0, before, after))
    new = Contribution(*(tensor.detach() for tensor in new))._replace(load=load)
    if total is None:
        return new
    return Contribution(*(a + b for a, b in zip(total, new, strict=True)))._replace(a=new.a)


def _shares(load: Tensor) -> list[list[list[float]]] | None:
    if not load.shape[-1]:
        return None
    return (load / load.sum(-1, keepdim=True).clamp_min(1)).tolist()  # type: ignore[no-any-return]
