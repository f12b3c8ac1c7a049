"""Walks over a random graph: the prompt lists its edges in any order, a start, and then asks where each hop leads.

Main entry: `Walk`. Every hop is a look-up of where the last one led: with one hop per loop, a walk of k hops takes k
loops, and the prompt is no longer for it but for the question marks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.data.batch import IGNORED, Batch
from open_mythos.data.permutations import permutations

_HOP = 0


@dataclass(frozen=True)
class Walk:
    """Ids are n pairs "from, to", one for each node (1 to n), the start, and a 0 for every hop after the first.

    The start asks for the node after one hop, each 0 for the node after one hop more. The edges are one cycle through
    all nodes, so a walk of fewer than n hops comes to a new node each time. `length` is the number of hops.
    """

    nodes: int = 12

    @property
    def vocab_size(self) -> int:
        """The nodes and the hop."""
        return self.nodes + 1

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random cycles with random starts, (size, 2 * nodes + length)."""
        cycle = permutations(size, self.nodes, generator) + 1
        edges = torch.stack([cycle, cycle.roll(-1, 1)], -1)
        edges = edges.gather(1, permutations(size, self.nodes, generator).unsqueeze(-1).expand(-1, -1, 2))
        hops = torch.full((size, length), _HOP)
        hops[:, 0] = cycle[:, 0]
        visited = torch.arange(1, length + 1) % self.nodes
        ids = torch.cat([edges.flatten(1), hops], 1)
        targets = torch.full_like(ids, IGNORED)
        targets[:, -length:] = cycle[:, visited]
        return Batch(ids, targets, torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """One per hop."""
        return length

    def positions(self, length: int) -> int:
        """Two per edge, and one per hop."""
        return 2 * self.nodes + length
