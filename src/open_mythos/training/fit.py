"""A short training run in one process: AdamW, a warm-up, a cosine, clipping, and the ponder cost.

Main entry: `fit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.model.mythos import MythosOutput, OpenMythos

_IGNORED = -100


class Batch(NamedTuple):
    """Ids and targets (batch, seq), targets of -100 not counted, and how many loops to run."""

    ids: Tensor
    targets: Tensor
    n_loops: int


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to train; the learning rate rises over `warmup` steps, then falls to 0 along a cosine."""

    steps: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 20
    clip: float = 1.0
    ponder_weight: float = 0.0
    """Weight of the ponder cost (loops per position) in the loss, over the last `ponder_share` of the steps."""
    ponder_share: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")


@dataclass(frozen=True)
class Step:
    """What one step tells its observer."""

    index: int
    loss: float
    accuracy: float
    n_loops: int


def fit(
    model: OpenMythos, draw: Callable[[int], Batch], config: FitConfig, on_step: Callable[[Step], None] | None = None
) -> None:
    """Train the model in place on `draw(step)`; `on_step` is called after every step. Leaves it in evaluation mode.

    Raises `ValueError` with the step if the loss stops being finite; the weights are then those of the step before.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    model.train()
    for index in range(config.steps):
        batch = draw(index)
        output = model(batch.ids, batch.n_loops, full_output=True)
        task_loss = F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten(), ignore_index=_IGNORED)
        value = float(task_loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"loss is {value} at step {index}; a lower learning_rate than {config.learning_rate} may help"
            )
        optimizer.zero_grad(set_to_none=True)
        (task_loss + _ponder(index, output, config)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(Step(index, value, _accuracy(output.logits, batch.targets), batch.n_loops))
    model.eval()


def _rate(step: int, config: FitConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _ponder(step: int, output: MythosOutput, config: FitConfig) -> Tensor | float:
    late = step >= config.steps * (1 - config.ponder_share)
    return config.ponder_weight * output.ponder_cost if late else 0.0


def _accuracy(logits: Tensor, targets: Tensor) -> float:
    counted = targets != _IGNORED
    right = (logits.detach().argmax(-1) == targets) & counted
    return float(right.sum() / counted.sum().clamp_min(1))
