"""Train a task's run in memory and measure it: what the benchmarks that change recipes share."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from open_mythos import OpenMythos
from open_mythos.analysis.depth_sweep import SweepRow
from open_mythos.data.tasks import TASKS
from open_mythos.recipes.material import open_material
from open_mythos.recipes.named import named_recipe, recipe_names
from open_mythos.recipes.run_config import TaskRun, changed
from open_mythos.recipes.train import build_model
from open_mythos.training.depth import Asked
from open_mythos.training.records import Observer, StepRecord
from open_mythos.training.trainer import Trainer

RECIPES = [name for name in recipe_names() if isinstance(named_recipe(name), TaskRun)]


class Figures(NamedTuple):
    """What a run has come to."""

    parameters: int
    seconds: float
    """Of the processor, for training."""
    loss: float
    """Mean over the last 50 steps of training."""
    rows: list[SweepRow]


class _Losses(Observer):
    def __init__(self) -> None:
        self.all: list[float] = []

    def on_step(self, record: StepRecord) -> None:
        self.all.append(record.loss)


def trained(run: TaskRun, problems: int, prepare: Callable[[OpenMythos], None] | None = None) -> Figures:
    """Train the run's model, which `prepare` may alter first, and measure so many problems of each of its lengths."""
    material = open_material(run, Path())
    model = build_model(run, material, torch.device("cpu"))
    if prepare is not None:
        prepare(model)
    losses, began = _Losses(), time.process_time()
    Trainer(model, material.source, run.depth, run.training).run([losses])
    seconds = time.process_time() - began
    assert run.sweep_loops is not None
    rows = material.sweep(model, run.sweep_loops, problems)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Figures(parameters, seconds, sum(losses.all[-50:]) / len(losses.all[-50:]), rows)


def needed_loops(run: TaskRun) -> int:
    """How many loops the task asks for in the longest problems of training."""
    return TASKS[run.task]().loops(run.longest)


def most_loops(run: TaskRun) -> int:
    """The most loops of a thousand of the longest problems, as training draws them."""
    asked = Asked(1000, 1.0, torch.full((1000,), needed_loops(run)))
    return int(run.depth.draw(asked, torch.Generator().manual_seed(0)).n_loops.max())


def recipe(name: str) -> TaskRun:
    """A recipe on a task."""
    run = named_recipe(name)
    assert isinstance(run, TaskRun)
    return run


def altered(run: TaskRun, *changes: dict[str, Any]) -> TaskRun:
    """The run with its fields changed by each of the `changes` in turn."""
    for change in changes:
        result = changed(run, change)
        assert isinstance(result, TaskRun)
        run = result
    return run


def options(description: str | None, *, seeds: str) -> argparse.ArgumentParser:
    """The options that these benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--seeds", type=integers, default=integers(seeds))
    parser.add_argument("--steps", type=int, help="In place of the recipe's.")
    parser.add_argument("--problems", type=int, default=256, help="Held out, of each length.")
    return parser


def integers(text: str) -> list[int]:
    """Integers between commas."""
    return [int(word) for word in text.split(",")]


def cell(row: SweepRow) -> str:
    """Accuracy and, in brackets, the share of problems wholly right, rounded down: 1.000 is all of them."""
    return f"{_three_digits(row['accuracy'])} ({_three_digits(row['exact_match'])})"


def _three_digits(share: float | None) -> str:
    assert share is not None
    return f"{math.floor(1000 * share) / 1000:.3f}".removeprefix("0")


def print_row(*cells: object) -> None:
    """A row of a Markdown table, at once: the next may be minutes away."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_headings(*names: object) -> None:
    """The first two lines of a Markdown table."""
    print_row(*names)
    print("|---" * len(names) + "|")
