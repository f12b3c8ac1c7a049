"""Binary addition: two numbers, digit beside digit, the least significant first, and their sum.

Main entry: `Addition`. Carries run from one digit to the next, so a model that carries information a few positions per
loop needs loops in proportion to the longest run of carries. Between uniform numbers these runs are short; here they
are of every length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.data.batch import IGNORED, Batch

_EQUALS = 3


@dataclass(frozen=True)
class Addition:
    """Ids are a1 b1 a2 b2 ... and an equals sign (3), digits 1 plus a bit; each b asks for its digit of the sum.

    The equals sign asks for the last carry.
    """

    digits_per_loop: int = 2
    """How many pairs of digits one loop is expected to handle; sets the loops that a length is trained with."""
    vocab_size: int = 4

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Pairs of numbers of `length` digits, (size, 2 * length + 1).

        The share of digits that hand a carry on (a 0 and a 1) is drawn for each pair, the greater of two from 0 to 1.
        """
        a = torch.randint(0, 2, (size, length), generator=generator)
        share = torch.rand((size, 2), generator=generator).amax(1, keepdim=True)
        hands_on = torch.rand((size, length), generator=generator) < share
        b = torch.where(hands_on, 1 - a, a)
        sums, carry = [], torch.zeros(size, dtype=torch.int64)
        for total in (a + b).unbind(1):
            total = total + carry
            sums.append(total % 2)
            carry = total // 2
        ids = torch.full((size, self.positions(length)), _EQUALS)
        ids[:, 0:-1:2], ids[:, 1::2] = a + 1, b + 1
        targets = torch.full_like(ids, IGNORED)
        targets[:, 1::2], targets[:, -1] = torch.stack(sums, 1) + 1, carry + 1
        return Batch(ids, targets, torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """As many as it takes to pass all digits: a carry may run through all of them."""
        return -(-length // self.digits_per_loop)

    def positions(self, length: int) -> int:
        """Two per digit, and the equals sign."""
        return 2 * length + 1
