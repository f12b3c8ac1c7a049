"""Cumulative parity: after every bit, is the number of ones so far odd?

Main entry: `Parity`. The answer at position i needs all bits up to i, so a model that carries information a few
positions per loop needs loops in proportion to the length: depth can be measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.data.batch import Batch


@dataclass(frozen=True)
class Parity:
    """Ids are 1 and 2 for the bits 0 and 1; the target at every position is 1 plus the parity of the bits so far."""

    vocab_size: int = 3
    bits_per_loop: int = 4
    """How many bits one loop is expected to handle; sets the loops that a length is trained with."""

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random strings and their answers, both (size, length)."""
        bits = torch.randint(0, 2, (size, length), generator=generator)
        return Batch(bits + 1, bits.cumsum(1) % 2 + 1, torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """How many loops a string of this length should get."""
        return -(-length // self.bits_per_loop)
