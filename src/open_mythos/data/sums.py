"""Running sums: after every digit, what is the sum so far, modulo a number?

Main entry: `RunningSums`. The answer at position i needs all digits up to i, so a model that carries information a few
positions per loop needs loops in proportion to the length: depth can be measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.data.batch import Batch


@dataclass(frozen=True)
class RunningSums:
    """Ids are 1 plus a digit below `modulus`; the target at every position is 1 plus the sum so far modulo that.

    In a share `skewed` of the strings, each has its own shares of the digits, all shares equally likely. Where every
    digit is as likely as the others, long runs of one, broken now and then, are so rare that training hardly sees them,
    and long strings fail there.
    """

    modulus: int = 3
    skewed: float = 0.5
    digits_per_loop: int = 4
    """How many digits one loop is expected to handle; sets the loops that a length is trained with."""

    @property
    def vocab_size(self) -> int:
        """The digits, and an unused 0."""
        return self.modulus + 1

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random strings of digits and their answers, both (size, length)."""
        own = torch.rand(size, self.modulus, generator=generator).clamp_min(1e-6).log().neg()
        shares = torch.where(torch.rand(size, 1, generator=generator) < self.skewed, own, 1.0)
        digits = torch.multinomial(shares, length, replacement=True, generator=generator)
        sums = digits.cumsum(1) % self.modulus
        return Batch(digits + 1, sums + 1, torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """As many as it takes to pass all digits."""
        return -(-length // self.digits_per_loop)

    def positions(self, length: int) -> int:
        """One per digit."""
        return length
