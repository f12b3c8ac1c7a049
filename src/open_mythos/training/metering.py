"""From the sums of a step to the figures that people read.

Main entries: `StepSums`, `Meter`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.cost import forward_flops
from open_mythos.training.depth import LoopPlan
from open_mythos.training.objective import Contribution
from open_mythos.training.records import StepRecord


class OnItsWay:
    """Tensors being copied from the device to the CPU while it goes on working."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._shapes = [tensor.shape for tensor in tensors]
        self._packed = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        if self._packed.device.type == "cuda":
            there = torch.empty(self._packed.shape, pin_memory=True)
            there.copy_(self._packed, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            self._packed = there

    def arrived(self) -> list[Tensor]:
        """The tensors, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        flat = self._packed.cpu().split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(flat, self._shapes, strict=True)]


class StepSums(NamedTuple):
    """What a step left."""

    step: int
    sums: OnItsWay
    """`scalars`, and the norm of the gradients; the load (loops, layers, experts); the diagonal of A (dim,)."""
    counted: int
    """Tokens in the loss."""
    positions: int
    plan: LoopPlan
    learning_rate: float
    seconds: float
    """Since the step before ended."""
    skipped: bool


class Meter:
    """Turns sums into records, and measures the time that steps take."""

    def __init__(
        self, config: MythosConfig, peak_flops: float | None, bytes_per_token: float | None, *, with_movement: bool
    ) -> None:
        """`peak_flops` is of all devices together, None where it is not known; a movement takes a loop more."""
        self._config, self._peak, self._bytes, self._with_movement = config, peak_flops, bytes_per_token, with_movement
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
        figures, load, a = sums.sums.arrived()
        loss, _, ponder, movement, right, exits, state_norm, grad_norm = figures.tolist()
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
            movement=movement / sums.positions if self._with_movement else None,
            state_norm=state_norm / sums.positions,
            a_low=float(a.min()),
            a_mean=float(a.mean()),
            a_high=float(a.max()),
            finite=bool(figures.isfinite().all()),
            skipped=sums.skipped,
            load=_shares(load),
        )

    def _flops(self, sums: StepSums) -> float:
        """FLOPs of a step's products; the backward has two for each one of the forward."""
        per_token = forward_flops(self._config, sums.positions // len(sums.plan.n_loops))
        loops = sums.plan.n_loops.float()
        learned = loops if sums.plan.grad_loops is None else loops.clamp_max(sums.plan.grad_loops)
        loops_computed = float((loops + 2 * learned).mean()) + 3 * self._with_movement
        return sums.positions * (3 * per_token.total(0) + per_token.loop * loops_computed)


def scalars(sums: Contribution) -> Tensor:
    """The sums that are single numbers."""
    return torch.stack([sums.loss, sums.z, sums.ponder, sums.movement, sums.right, sums.exit_loops, sums.state_norm])


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
