"""What the tour trains, as data, and how.

Main entries: `TourRecipe`, `train`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from open_mythos.config import MythosConfig
from open_mythos.data.parity import Parity
from open_mythos.model.mythos import OpenMythos
from open_mythos.training.fit import Batch, FitConfig, Step, fit


@dataclass(frozen=True, kw_only=True)
class TourRecipe:
    """Model, task and training of the tour. Strings have at most `max_bits` bits, and so at most 4 loops."""

    seed: int = 0
    task: Parity = field(default_factory=Parity)
    max_bits: int = 16
    batch_size: int = 64
    growth: float = 0.5
    """Share of the training over which the longest string grows from one loop's worth of bits to `max_bits`."""
    sweep_loops: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
    sweep_lengths: tuple[int, ...] = (24, 48, 96)
    sweep_strings: int = 256
    model: MythosConfig = field(
        default_factory=lambda: MythosConfig(
            vocab_size=3,
            dim=64,
            max_seq_len=96,
            max_loop_iters=32,
            recurrent_layers=2,
            window=3,
            outer_window=3,
            n_experts=4,
            expert_dim=32,
        )
    )
    training: FitConfig = field(default_factory=lambda: FitConfig(steps=800, learning_rate=5e-4, weight_decay=0.1))

    @property
    def trained_loops(self) -> int:
        """The most loops that training ever runs."""
        return self.task.loops(self.max_bits)

    def longest(self, step: int) -> int:
        """The most bits that a string of this training step may have."""
        growing = math.ceil(self.max_bits * (step + 1) / max(1.0, self.growth * self.training.steps))
        return min(self.max_bits, max(self.task.bits_per_loop, growing))


@dataclass(frozen=True)
class Trained:
    """The tour's model, and how its training went."""

    model: OpenMythos
    steps: tuple[Step, ...]
    seconds: float


def train(recipe: TourRecipe, on_step: Callable[[int, float], None] | None = None) -> Trained:
    """Train the tour's model from the recipe's seed; `on_step` gets the number of steps done and the loss."""
    torch.manual_seed(recipe.seed)
    random = torch.Generator().manual_seed(recipe.seed)
    model = OpenMythos(recipe.model)
    steps: list[Step] = []

    def draw(step: int) -> Batch:
        longest = recipe.longest(step)
        length = int(torch.randint(1, longest + 1, (), generator=random))
        ids, targets, _ = recipe.task.batch(recipe.batch_size, length, random)
        return Batch(ids, targets, recipe.task.loops(length))

    def record(step: Step) -> None:
        steps.append(step)
        if on_step is not None:
            on_step(len(steps), step.loss)

    start = time.perf_counter()
    fit(model, draw, recipe.training, record)
    return Trained(model, tuple(steps), time.perf_counter() - start)
