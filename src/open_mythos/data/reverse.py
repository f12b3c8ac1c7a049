"""Reversal: say a string backwards.

Main entry: `Reverse`. A symbol stands up to twice the length away from where it is asked for, so a model that carries
information a few positions per loop needs loops in proportion to the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.data.batch import IGNORED, Batch

_BLANK = 0


@dataclass(frozen=True)
class Reverse:
    """Ids are symbols from 1 to `symbols` and as many blanks (0), which ask for the symbols, the last one first."""

    symbols: int = 4
    positions_per_loop: int = 4
    """How far one loop is expected to carry a symbol; sets the loops that a length is trained with."""

    @property
    def vocab_size(self) -> int:
        """The symbols and the blank."""
        return self.symbols + 1

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random strings, (size, 2 * length)."""
        string = torch.randint(1, self.symbols + 1, (size, length), generator=generator)
        ids = torch.cat([string, torch.full_like(string, _BLANK)], 1)
        targets = torch.cat([torch.full_like(string, IGNORED), string.flip(1)], 1)
        return Batch(ids, targets, torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """As many as it takes from the first symbol to the last blank."""
        return -(-self.positions(length) // self.positions_per_loop)

    def positions(self, length: int) -> int:
        """One per symbol, and one per blank."""
        return 2 * length
