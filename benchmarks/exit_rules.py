"""When should a position stop? Rules beside fixed loops, on a run of a task: python benchmarks/exit_rules.py RUN.

All are given the same held-out problems and the same weights; the coda reads every position's last state, and what has
stopped is frozen, so that positions that go on see it as it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from open_mythos import OpenMythos
from open_mythos.analysis.halting import under_halting
from open_mythos.data.batch import IGNORED
from open_mythos.data.seeding import generator
from open_mythos.data.tasks import TASKS
from open_mythos.inference.exit import ExitRule, LoopView, Memory, PredictionChange, StableArgmax, StateChange
from open_mythos.model.budget import LoopBudget
from open_mythos.model.halting import LastState
from open_mythos.recipes.folder import RunFolder
from open_mythos.recipes.run_config import TaskRun

FIXED = (4, 8, 10, 11, 12, 14, 16, 32)
TOLERANCES = (0.3, 0.1, 0.03)
RULES: tuple[ExitRule, ...] = (
    *map(StateChange, TOLERANCES),
    *map(PredictionChange, (0.05, 0.005, 0.0005)),
    *map(StableArgmax, (2, 3, 4)),
)


class Ruled(LastState):
    """Stops each position when an exit rule of the engine says so."""

    def __init__(self, model: OpenMythos, rule: ExitRule, n_loops: Tensor, e: Tensor) -> None:
        super().__init__(LoopBudget(n_loops, e.device), e)
        self._model, self._rule = model, rule
        self._memory: Memory = {}
        self.output = model.recurrent.initial_state(e)
        self.exit_loops = torch.zeros(e.shape[:2], dtype=torch.int32)

    def update(self, h: Tensor, p: Tensor | None, t: int) -> None:
        active = self.active(t)
        self.exit_loops = self.exit_loops + (1 if active is None else active)
        before, self.output = self.output.flatten(0, 1), h
        after = h.flatten(0, 1)
        view = LoopView(
            loop=torch.full(after.shape[:1], t),
            before=before,
            after=after,
            readout=lambda: linear(self._model.norm(after), self._model.head_weight),
            memory=self._memory,
        )
        exits, self._memory = self._rule.exits(view)
        self._stop(exits.view(h.shape[:2]))


class Result(NamedTuple):
    """What became of the problems under a rule."""

    rule: str
    accuracy: float
    all_right: float
    loops: float
    """Mean over the positions that are asked something."""


def results(model: OpenMythos, ids: Tensor, targets: Tensor, most: int) -> Iterator[Result]:
    """Every rule in turn, within `most` loops."""
    asked = targets != IGNORED

    def measured(name: str, model: OpenMythos, n_loops: int) -> Result:
        output = model(ids, n_loops, full_output=True)
        right = (output.logits.argmax(-1) == targets) | ~asked
        loops = output.exit_loops[asked].double().mean()
        return Result(name, float(right[asked].double().mean()), float(right.all(1).double().mean()), float(loops))

    plain = under_halting(model, "none")
    for n_loops in FIXED:
        yield measured(f"{n_loops} loops", plain, n_loops)
    for tolerance in TOLERANCES:
        yield measured(f"settled, {tolerance}", under_halting(model, "settled", tolerance), most)
    for rule in RULES:
        plain.recurrent.accumulator = partial(_ruled, plain, rule)  # type: ignore[method-assign]
        yield measured(str(rule), plain, most)


def _ruled(model: OpenMythos, rule: ExitRule, n_loops: Tensor, e: Tensor, **_: object) -> Ruled:
    return Ruled(model, rule, n_loops, e)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="Folder of a run of mythos train on a task.")
    parser.add_argument("--length", type=int, help="Of the problems; by default twice the longest of training.")
    parser.add_argument("--most", type=int, default=64, help="Loops at which even an undecided position stops.")
    parser.add_argument("--problems", type=int, default=256)
    chosen = parser.parse_args()
    run = RunFolder(chosen.run).read()
    if not isinstance(run, TaskRun):
        parser.error(f"RUN is {chosen.run}, a run on text; it must be one on a task")
    length = chosen.length or 2 * run.longest
    try:
        TASKS[run.task]().positions(length)
    except ValueError as error:
        parser.error(str(error))
    batch = TASKS[run.task]().batch(chosen.problems, length, generator(run.training.seed, length, "exit rules"))
    table = Table("rule", "accuracy", "all right", "loops", title=f"{run.task}, length {length}")
    with torch.inference_mode():
        for rule, accuracy, all_right, loops in results(
            OpenMythos.from_pretrained(chosen.run), batch.ids, batch.targets, chosen.most
        ):
            table.add_row(rule, f"{accuracy:.4f}", f"{all_right:.3f}", f"{loops:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
