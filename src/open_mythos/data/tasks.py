"""Tasks whose answers are known, by name, and as batches for training.

Main entries: `Task`, `TASKS`, `TaskBatches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from open_mythos.data.addition import Addition
from open_mythos.data.batch import Batch
from open_mythos.data.dyck import Dyck
from open_mythos.data.p_hop import PHop
from open_mythos.data.parity import Parity
from open_mythos.data.reverse import Reverse
from open_mythos.data.seeding import generator
from open_mythos.data.sums import RunningSums
from open_mythos.data.walk import Walk


class Task(Protocol):
    """Random problems of a given length with their exact answers; what length counts is the task's affair."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token."""
        ...

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """`size` problems of that length."""
        ...

    def loops(self, length: int) -> int:
        """How many loops a problem of that length should get."""
        ...

    def positions(self, length: int) -> int:
        """How many tokens a problem of that length has."""
        ...


TASKS: dict[str, Callable[[], Task]] = {
    "parity": Parity,
    "sums": RunningSums,
    "addition": Addition,
    "dyck": Dyck,
    "reverse": Reverse,
    "p_hop": PHop,
    "walk": Walk,
}
"""Every task by its name: what makes it. Add your own, and runs know it."""


class TaskBatches:
    """Batches of problems, each batch of one length, drawn from `shortest` up to a longest that grows to `longest`.

    Growing over the first `growth` of the steps makes the easy problems come first. A pure function of seed and step.
    """

    bytes_per_token = None

    def __init__(
        self,
        task: Task,
        *,
        batch_size: int,
        shortest: int,
        longest: int,
        steps: int,
        growth: float = 0.0,
        seed: int = 0,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("shortest", shortest), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if longest < shortest:
            raise ValueError(f"longest is {longest}; it must be at least shortest ({shortest})")
        if not 0 <= growth <= 1:
            raise ValueError(f"growth is {growth}; it must be a number in [0, 1]")
        self.task, self.batch_size, self.seed = task, batch_size, seed
        self.shortest, self.longest = shortest, longest
        self._growing = growth * steps
        self._easiest = max((n for n in range(1, longest + 1) if task.loops(n) == 1), default=1)
        self.vocab_size = task.vocab_size

    def batch(self, step: int) -> Batch:
        """The batch of a training step."""
        return self.task.batch(self.batch_size, self._length(step), generator(self.seed, step, "problems"))

    def position(self, step: int) -> str:
        """The length of that step's problems."""
        return f"a batch of problems of length {self._length(step)}"

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a batch depends on its step alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes nothing."""

    def _length(self, step: int) -> int:
        """Of one loop's worth at first, of any length in the end."""
        grown = math.ceil(self.longest * (step + 1) / self._growing) if self._growing else self.longest
        longest = max(self.shortest, min(self.longest, max(self._easiest, grown)))
        return int(torch.randint(self.shortest, longest + 1, (), generator=generator(self.seed, step, "length")))
