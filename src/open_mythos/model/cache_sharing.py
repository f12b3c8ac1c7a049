"""Which loops keep keys and values of their own.

Main entries: `CacheSharing` and its classes. A loop writes to a slot; loops that share one overwrite each other, which
saves bytes and changes numbers (docs/inference.md has by how much). Only `EveryLoop` is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class CacheSharing(Protocol):
    """Maps loops to slots so that the first loop to write to slot s is loop s."""

    def slot(self, loop: int) -> int:
        """The slot that a loop writes to and reads from."""
        ...

    def slots(self, n_loops: int) -> int:
        """How many slots a position of so many loops fills."""
        ...


@dataclass(frozen=True)
class EveryLoop:
    """Every loop its own: what training does."""

    def slot(self, loop: int) -> int:
        return loop

    def slots(self, n_loops: int) -> int:
        return n_loops


@dataclass(frozen=True)
class FirstLoops:
    """The first `own` loops have a slot each, all later ones share one; with 0, only the last computed is kept."""

    own: int = 0

    def __post_init__(self) -> None:
        if self.own < 0:
            raise ValueError(f"own is {self.own}; it must be at least 0")

    def slot(self, loop: int) -> int:
        return min(loop, self.own)

    def slots(self, n_loops: int) -> int:
        return min(n_loops, self.own + 1)


@dataclass(frozen=True)
class Modulo:
    """Loop t shares with t + `period`, t + 2 `period`, ... (Huginn's cache budget, arXiv 2502.05171, section 6)."""

    period: int

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period is {self.period}; it must be at least 1")

    def slot(self, loop: int) -> int:
        return loop % self.period

    def slots(self, n_loops: int) -> int:
        return min(n_loops, self.period)
