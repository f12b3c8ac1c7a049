"""The positions that are being computed, of all requests, in one structure of arrays.

Main entries: `Flight`, `Running`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from open_mythos.model.rows import Bools

Ints = NDArray[np.int64]


class Running(NamedTuple):
    """Lines that have not halted: first those alone in their request and loop, then runs of several, side by side."""

    lines: Ints
    firsts: Ints
    """The line that each run begins with."""
    lengths: list[int]


class Flight:
    """One line per position: whose it is, where, how far it has come, and its state.

    Lines of one request are in ascending order of position; those that were encoded together lie side by side.
    """

    def __init__(self, dim: int, like: Tensor) -> None:
        """`like` gives dtype and device."""
        self._empty = like.new_empty(0, dim)
        self._clear()

    def _clear(self) -> None:
        self.owner: Ints = np.empty(0, np.int64)
        """Index of the request."""
        self.position: Ints = np.empty(0, np.int64)
        self.loop: Ints = np.empty(0, np.int64)
        """How many loops it has run."""
        self.most: Ints = np.empty(0, np.int64)
        """How many it may run."""
        self.reached: Ints = np.empty(0, np.int64)
        """How many loops the last position has run that the request had encoded before, if anybody asks."""
        self.active: Bools = np.empty(0, np.bool_)
        """False once it has halted."""
        self._running: Running | None = None
        self.h, self.e, self.output, self.mass = self._empty, self._empty, self._empty, self._empty[:, 0]
        """State, encoded input, mean of states so far (lines, dim); halting probability spent (lines,)."""
        self.memory: dict[object, dict[str, Tensor]] = {}
        """What each exit rule remembers, (lines, ...)."""

    def __len__(self) -> int:
        return len(self.owner)

    def add(self, owner: Ints, position: Ints, most: Ints, reached: Ints, h: Tensor, e: Tensor) -> None:
        """New lines that have not run a loop yet."""
        n, self._running = len(owner), None
        begun, active = np.zeros(n, np.int64), np.ones(n, np.bool_)
        mass, output = e.new_zeros(n), torch.zeros_like(e)
        if len(self):
            owner, position = np.concatenate([self.owner, owner]), np.concatenate([self.position, position])
            most, reached = np.concatenate([self.most, most]), np.concatenate([self.reached, reached])
            begun, active = np.concatenate([self.loop, begun]), np.concatenate([self.active, active])
            h, e = torch.cat([self.h, h]), torch.cat([self.e, e])
            mass, output = torch.cat([self.mass, mass]), torch.cat([self.output, output])
        self.owner, self.position, self.most, self.reached = owner, position, most, reached
        self.loop, self.active, self.h, self.e, self.mass, self.output = begun, active, h, e, mass, output
        for memory in self.memory.values():
            for name, kept in memory.items():
                memory[name] = torch.cat([kept, kept.new_zeros(n, *kept.shape[1:])])

    def keep(self, lines: Bools) -> None:
        """Remove all others."""
        n = np.count_nonzero(lines)  # a fourth of the time of `all` or `any`
        if n == len(lines):
            return
        if n == 0:
            self._clear()
            return
        self._running = None
        self.owner, self.position, self.loop = self.owner[lines], self.position[lines], self.loop[lines]
        self.most, self.reached, self.active = self.most[lines], self.reached[lines], self.active[lines]
        index = torch.from_numpy(np.flatnonzero(lines)).to(self.h.device)
        self.h, self.e, self.output, self.mass = (x[index] for x in (self.h, self.e, self.output, self.mass))
        self.memory = {rule: {name: x[index] for name, x in kept.items()} for rule, kept in self.memory.items()}

    def ends(self) -> dict[int, tuple[int, int]]:
        """The first and the last line of every request."""
        ends: dict[int, tuple[int, int]] = {}
        for line, owner in enumerate(self.owner.tolist()):
            first, _ = ends.get(owner, (line, line))
            ends[owner] = first, line
        return ends

    def halt(self, lines: Ints) -> None:
        """These do not run again."""
        if len(lines):
            self.active[lines], self._running = False, None

    @property
    def running(self) -> Running:
        """What has not halted; the same object until that changes."""
        if self._running is None:
            self._running = self._find_running()
        return self._running

    def _find_running(self) -> Running:
        lines = np.flatnonzero(self.active)
        if not len(lines):
            return Running(lines, lines, [])
        owner, loop = self.owner[lines], self.loop[lines]
        ends = np.flatnonzero((owner[1:] != owner[:-1]) | (loop[1:] != loop[:-1])) + 1
        if len(ends) == len(lines) - 1:  # as when all requests are beyond their prompts
            return Running(lines, lines, [1] * len(lines))
        runs = sorted(np.split(lines, ends), key=lambda run: len(run) > 1)
        return Running(np.concatenate(runs), np.array([run[0] for run in runs]), [len(run) for run in runs])
