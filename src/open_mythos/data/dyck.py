"""Dyck-1 validity: after every bracket, are the brackets so far balanced, still open, or broken for good?

Main entry: `Dyck`. The answer at position i needs all brackets up to i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.data.batch import Batch

_OPENING, _CLOSING = 1, 2
_BALANCED, _OPEN, _BROKEN = 1, 2, 3


@dataclass(frozen=True)
class Dyck:
    """Ids are 1 for "(" and 2 for ")"; targets 1 for balanced, 2 for open, 3 once a bracket closed that none opened.

    Strings are nested at most `deepest` deep; in about half of them one bracket closes where nothing is open.
    """

    deepest: int = 3
    brackets_per_loop: int = 4
    """How many brackets one loop is expected to handle; sets the loops that a length is trained with."""
    vocab_size: int = 4

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random strings and their answers, both (size, length)."""
        wanted = torch.rand((length, size), generator=generator) < 0.5
        breaking = torch.randint(0, 2 * length, (size,), generator=generator)
        depth, broken = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.bool)
        ids, targets = [], []
        for position, opening in enumerate(wanted):
            may_break = position >= breaking
            opening = (opening | ((depth == 0) & ~may_break)) & (depth < self.deepest)
            broken = broken | (~opening & (depth == 0))
            depth = (depth + torch.where(opening, 1, -1)).clamp_min(0)
            ids.append(torch.where(opening, _OPENING, _CLOSING))
            targets.append(torch.where(broken, _BROKEN, torch.where(depth == 0, _BALANCED, _OPEN)))
        return Batch(torch.stack(ids, 1), torch.stack(targets, 1), torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """As many as it takes to pass all brackets."""
        return -(-length // self.brackets_per_loop)

    def positions(self, length: int) -> int:
        """One per bracket."""
        return length
