"""What the tour trains, as data, and how.

Main entries: `TourRecipe`, `train`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from open_mythos.config import MythosConfig
from open_mythos.data.parity import Parity
from open_mythos.model.mythos import OpenMythos
from open_mythos.training.fit import Batch, FitConfig, Step, fit
from open_mythos.training.halting import HaltingFitConfig, fit_halting


@dataclass(frozen=True, kw_only=True)
class TourRecipe:
    """Model, task and training of the tour. Strings have at most `max_bits` bits, and so at most 4 loops."""

    seed: int = 0
    task: Parity = Parity()
    max_bits: int = 16
    batch_size: int = 64
    sweep_loops: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
    sweep_lengths: tuple[int, ...] = (24, 48, 96)
    sweep_strings: int = 256
    model: MythosConfig = field(
        default_factory=lambda: MythosConfig(
            vocab_size=3,
            dim=64,
            max_seq_len=96,
            max_loop_iters=32,
            window=5,
            outer_window=5,
            n_experts=4,
            expert_dim=32,
        )
    )
    training: FitConfig = field(default_factory=lambda: FitConfig(steps=600, learning_rate=2e-3, weight_decay=0.1))
    halting: HaltingFitConfig = field(
        default_factory=lambda: HaltingFitConfig(steps=60, learning_rate=0.1, extra_loops=12)
    )

    @property
    def trained_loops(self) -> int:
        """The most loops that training ever runs."""
        return self.task.loops(self.max_bits)


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

    def draw(_: int) -> Batch:
        length = int(torch.randint(1, recipe.max_bits + 1, (), generator=random))
        ids, targets = recipe.task.batch(recipe.batch_size, length, random)
        return Batch(ids, targets, recipe.task.loops(length))

    def record(step: Step) -> None:
        steps.append(step)
        if on_step is not None:
            on_step(len(steps), step.loss)

    def record_halting(step: int, loss: float) -> None:
        if on_step is not None:
            on_step(len(steps) + step + 1, loss)

    start = time.perf_counter()
    fit(model, draw, recipe.training, record)
    fit_halting(model, lambda step: (draw(step).ids, recipe.trained_loops), recipe.halting, record_halting)
    return Trained(model, tuple(steps), time.perf_counter() - start)
