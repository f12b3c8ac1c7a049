"""Reversal: say a string backwards, piece by piece.

Main entry: `Reverse`. A symbol may wait from the first position to the last while others come and go, so a model that
carries information a few positions per loop needs loops in proportion to the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.data.batch import IGNORED, Batch

_BLANK = 0


@dataclass(frozen=True)
class Reverse:
    """Ids are symbols from 1 to `symbols` and as many blanks (0): each asks for the last symbol not yet asked for.

    At most `waiting` symbols wait to be asked for at a time, and at the end none does. How many symbols come in a row
    differs from string to string.
    """

    symbols: int = 2
    waiting: int = 3
    positions_per_loop: int = 4
    """How far one loop is expected to carry a symbol; sets the loops that a length is trained with."""

    @property
    def vocab_size(self) -> int:
        """The symbols and the blank."""
        return self.symbols + 1

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random strings of `length` symbols, (size, 2 * length)."""
        n_positions = 2 * length
        share = 0.2 + 0.6 * torch.rand(size, generator=generator)
        wanted = torch.rand((n_positions, size), generator=generator) < share
        symbols = torch.randint(1, self.symbols + 1, (n_positions, size), generator=generator)
        stack, height = torch.zeros((size, self.waiting), dtype=torch.int64), torch.zeros((size, 1), dtype=torch.int64)
        ids, targets = [], []
        for position, (symbol, want) in enumerate(zip(symbols.unsqueeze(-1), wanted.unsqueeze(-1), strict=True)):
            room = (height < self.waiting) & (height < n_positions - position)
            comes = room & (want | (height == 0))
            top = height - (~comes).long()
            asked = stack.gather(1, top)
            stack = stack.scatter(1, top, torch.where(comes, symbol, asked))
            height = top + comes
            ids.append(torch.where(comes, symbol, _BLANK))
            targets.append(torch.where(comes, IGNORED, asked))
        return Batch(torch.cat(ids, 1), torch.cat(targets, 1), torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """As many as it takes from the first position to the last."""
        return -(-self.positions(length) // self.positions_per_loop)

    def positions(self, length: int) -> int:
        """One per symbol, and one per blank."""
        return 2 * length
