"""p-hop induction (Sanford et al. 2024, arXiv 2402.09268), followed until it ends.

Main entry: `PHop`. A hop leads from a token to the one that came after its last occurrence before. From the positions
that are asked, p hops lead to a token that had not occurred before; with one hop per loop that takes p loops, in a row
that is equally long for every p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from open_mythos.data.batch import IGNORED, Batch
from open_mythos.data.permutations import permutations


@dataclass(frozen=True)
class PHop:
    """Ids are 0 to 2 * `pairs` - 1, each at most twice in a row of `pairs` pairs; `length` is p.

    The row holds chains of pairs (b, a), (c, b), (d, c), dealt out among one another: a hop leads from the second token
    of a pair to that of the pair before it in its chain. Asked is where p hops end that cannot go on.
    """

    pairs: int = 16

    @property
    def vocab_size(self) -> int:
        """Enough for as many chains as can be."""
        return 2 * self.pairs

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random rows, (size, 2 * pairs), with as many chains of p hops as there is room for."""
        if length >= self.pairs:
            raise ValueError(f"length is {length}; it must be below the number of pairs ({self.pairs})")
        chain = torch.arange(self.pairs) // (length + 1)
        chain = chain[permutations(size, self.pairs, generator)]
        rank = F.one_hot(chain).cumsum(1).gather(2, chain.unsqueeze(-1)).squeeze(-1)
        names = permutations(size, self.vocab_size, generator)
        end = chain * (length + 2)
        ids = torch.stack([names.gather(1, end + rank), names.gather(1, end + rank - 1)], -1)
        asked = torch.where(rank == length + 1, names.gather(1, end), IGNORED)
        targets = torch.stack([torch.full_like(asked, IGNORED), asked], -1)
        return Batch(ids.flatten(1), targets.flatten(1), torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """One per hop."""
        return length

    def positions(self, length: int) -> int:
        """Two per pair."""
        return 2 * self.pairs
