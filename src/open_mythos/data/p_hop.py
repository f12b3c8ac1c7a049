"""p-hop induction (Sanford et al. 2024, arXiv 2402.09268), followed until it ends.

Main entry: `PHop`. A hop leads from a token to the one that came after its last occurrence before. Every hop is a
look-up of where the last one led: with one hop per loop, p of them take p loops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from open_mythos.data.batch import IGNORED, Batch
from open_mythos.data.chains import n_chains
from open_mythos.data.permutations import permutations


@dataclass(frozen=True)
class PHop:
    """Ids are names from 0 to `names` - 1, each at most twice in a row of pairs; `length` is p, the hops of a chain.

    The row holds chains of p + 1 pairs (b, a), (c, b), (d, c), dealt out among one another: a hop leads from the second
    token of a pair to that of the pair before it in its chain. Asked is, at every second token, where hops end: after
    none in the first pair of a chain, after p in its last.
    """

    names: int = 24

    @property
    def vocab_size(self) -> int:
        """The names."""
        return self.names

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random rows, (size, 2 * chains * (length + 1))."""
        n_pairs = self._chains(length) * (length + 1)
        chain = torch.arange(n_pairs) // (length + 1)
        chain = chain[permutations(size, n_pairs, generator)]
        place = F.one_hot(chain).cumsum(1).gather(2, chain.unsqueeze(-1)).squeeze(-1)
        names = permutations(size, self.names, generator)
        end = chain * (length + 2)
        ids = torch.stack([names.gather(1, end + place), names.gather(1, end + place - 1)], -1)
        ends = names.gather(1, end)
        targets = torch.stack([torch.full_like(ends, IGNORED), ends], -1)
        return Batch(ids.flatten(1), targets.flatten(1), torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """One per hop."""
        return length

    def positions(self, length: int) -> int:
        """Two per pair."""
        return 2 * self._chains(length) * (length + 1)

    def _chains(self, length: int) -> int:
        return n_chains(length, self.names, length + 2)
