"""What the tour trains, as data, and how.

Main entries: `TourRecipe`, `train`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch

from open_mythos.config import MythosConfig
from open_mythos.data.tasks import TASKS, Task, TaskBatches
from open_mythos.model.mythos import OpenMythos
from open_mythos.recipes.named import named_recipe
from open_mythos.recipes.run_config import TaskRun
from open_mythos.training.records import Observer, StepRecord
from open_mythos.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class TourRecipe:
    """The run that `mythos train parity` makes, and what the tour then measures."""

    run: TaskRun
    sweep_loops: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
    sweep_lengths: tuple[int, ...] = (24, 48, 96)
    sweep_strings: int = 128

    @property
    def seed(self) -> int:
        """Of the weights and of all data."""
        return self.run.training.seed

    @property
    def task(self) -> Task:
        """Parity."""
        return TASKS[self.run.task]()

    @property
    def model(self) -> MythosConfig:
        """The trained model's sizes."""
        return self.run.model.replace(vocab_size=self.task.vocab_size)

    @property
    def trained_loops(self) -> int:
        """The most loops that training ever runs."""
        return self.task.loops(self.run.longest)


def tour_recipe(seed: int = 0, steps: int | None = None) -> TourRecipe:
    """The tour's recipe with another seed, or fewer steps."""
    run = cast(TaskRun, named_recipe("parity"))
    training = replace(run.training, seed=seed, steps=run.training.steps if steps is None else steps)
    return TourRecipe(run=replace(run, training=training))


@dataclass(frozen=True)
class Trained:
    """The tour's model, and how its training went."""

    model: OpenMythos
    steps: tuple[StepRecord, ...]
    seconds: float


class _Recorder(Observer):
    """Keeps every step."""

    def __init__(self, on_step: Callable[[int, float], None] | None) -> None:
        self.records: list[StepRecord] = []
        self._on_step = on_step

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)
        if self._on_step is not None:
            self._on_step(record.step + 1, record.loss)


def train(recipe: TourRecipe, on_step: Callable[[int, float], None] | None = None) -> Trained:
    """Train the tour's model from the recipe's seed; `on_step` gets the number of steps done and the loss."""
    run = recipe.run
    torch.manual_seed(recipe.seed)
    model = OpenMythos(recipe.model)
    source = TaskBatches(
        recipe.task,
        batch_size=run.batch_size,
        shortest=run.shortest,
        longest=run.longest,
        steps=run.training.steps,
        growth=run.growth,
        seed=recipe.seed,
    )
    recorder = _Recorder(on_step)
    start = time.perf_counter()
    Trainer(model, source, run.depth, run.training).run([recorder])
    return Trained(model, tuple(recorder.records), time.perf_counter() - start)
