"""Adaptive depth beside fixed loops on problems of mixed lengths: python benchmarks/adaptive_depth.py RUN [RUN ...].

Runs of `mythos train` on a task, whose models halt. The baseline runs the same weights for one number of loops at every
position: the fewest that get as much of this very batch right as halting does. Of padding, both sides compute one loop.
They take turns; times are medians of processor time on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from open_mythos import OpenMythos
from open_mythos.analysis import plots
from open_mythos.analysis.depth_sweep import states_by_loop
from open_mythos.analysis.halting import under_halting
from open_mythos.data.batch import IGNORED
from open_mythos.data.seeding import generator
from open_mythos.data.tasks import TASKS, Task
from open_mythos.recipes.folder import RunFolder
from open_mythos.recipes.run_config import TaskRun


@dataclass(frozen=True)
class Problems:
    """Problems of mixed lengths, padded at the end to the longest."""

    ids: Tensor
    targets: Tensor
    """`IGNORED` where nothing is asked."""
    there: Tensor
    """False at padding."""
    needed: Tensor
    """(longest,): loops that the task takes at each position; all are (batch, longest) otherwise."""

    def loops(self, most: int) -> Tensor:
        """Loops per position, 1 at padding."""
        return torch.where(self.there, most, 1)

    def accuracy(self, logits: Tensor) -> float:
        asked = self.targets != IGNORED
        return float((logits.argmax(-1) == self.targets)[asked].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="Folders of runs of mythos train on a task.")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--shortest", type=int, default=4)
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--most", type=int, default=64, help="Loops at which even an undecided position stops.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="Where to draw exit loops against the loops needed.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        "run", "accuracy", "loops", "fixed: accuracy", "loops", "loops, times fewer", "ms", "ms", "times faster"
    )
    exits, fixed_loops = {}, {}
    for run in options.runs:
        problems = mixed(_task(run), options.problems, options.shortest, options.longest, options.seed)
        adaptive = OpenMythos.from_pretrained(run)
        fixed = under_halting(adaptive, "none")
        with torch.inference_mode():
            halted = adaptive(problems.ids, problems.loops(options.most), full_output=True)
            accuracy = problems.accuracy(halted.logits)
            enough, reached = fewest_loops(fixed, problems, accuracy, options.most)
            sides = {"adaptive": (adaptive, problems.loops(options.most)), "fixed": (fixed, problems.loops(enough))}
            times = in_turns(sides, problems.ids, options.rounds)
        spent = halted.exit_loops[problems.there].float().mean().item()
        speedup = times["fixed"] / times["adaptive"]
        cells = [f"{accuracy:.4f}", f"{spent:.2f}", f"{reached:.4f}", str(enough), f"{enough / spent:.2f}"]
        table.add_row(str(run), *cells, *(f"{times[k] * 1e3:.0f}" for k in sides), f"{speedup:.2f}")
        exits[run.name], fixed_loops[run.name] = by_need(halted.exit_loops, problems), enough
    Console().print(table)
    if options.plot is not None:
        plots.exit_loops(exits, fixed_loops).savefig(options.plot)


def _task(run: Path) -> Task:
    described = RunFolder(run).read()
    if not isinstance(described, TaskRun):
        raise ValueError(f"{run} is a run on text; it must be one on a task, whose answers are known")
    return TASKS[described.task]()


def mixed(task: Task, size: int, shortest: int, longest: int, seed: int) -> Problems:
    """`size` problems, all lengths from `shortest` to `longest` equally likely."""
    random = generator(seed, 0, "adaptive depth")
    lengths = torch.randint(shortest, longest + 1, (size,), generator=random).tolist()
    width = task.positions(longest)
    ids, targets = torch.zeros(size, width, dtype=torch.int64), torch.full((size, width), IGNORED)
    for row, length in enumerate(lengths):
        problem = task.batch(1, length, random)
        ids[row, : problem.ids.shape[1]], targets[row, : problem.ids.shape[1]] = problem.ids[0], problem.targets[0]
    widths = torch.tensor([task.positions(length) for length in lengths])
    needed = torch.empty(width)
    for length in range(longest, 0, -1):
        needed[: task.positions(length)] = task.loops(length)
    return Problems(ids, targets, torch.arange(width) < widths.unsqueeze(1), needed)


def fewest_loops(model: OpenMythos, problems: Problems, accuracy: float, most: int) -> tuple[int, float]:
    """The fewest loops that reach this accuracy and what they reach; `most` if none do."""
    context, reached = model.context(problems.ids.shape[1]), 0.0
    for n_loops, state in states_by_loop(model, problems.ids, range(1, most + 1), context):
        reached = problems.accuracy(model.decode(state, context))
        if reached >= accuracy:
            return n_loops, reached
    return most, reached


def in_turns(sides: dict[str, tuple[OpenMythos, Tensor]], ids: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of processor time of each side, a model and its loops, after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, (model, n_loops) in sides.items():
            start = time.process_time()
            model(ids, n_loops)
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def by_need(exit_loops: Tensor, problems: Problems) -> dict[int, float]:
    """The mean exit loop of the positions that need so many loops."""

    def means() -> Iterator[tuple[int, float]]:
        for needed in problems.needed.unique().tolist():
            here = problems.there & (problems.needed == needed)
            yield int(needed), exit_loops[here].float().mean().item()

    return dict(means())


if __name__ == "__main__":
    main()
