"""Walks over a random graph: the prompt lists its edges in any order, then asks for walks, hop by hop.

Main entry: `Walk`. Every hop is a look-up of where the last one led: with one hop per loop, a walk of k hops takes k
loops, and rows are (nearly) equally long for every k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.data.batch import IGNORED, Batch
from open_mythos.data.permutations import permutations

_HOP = 0


@dataclass(frozen=True)
class Walk:
    """Ids are the edges, "leaving a, at b" in any order, then walks: "at a", and a 0 for every hop after the first.

    "At a" is 1 to `nodes`, "leaving a" `nodes` more. The edges are one cycle, so a walk comes to a new node each time
    until it has seen all. A walk's first token asks for the node after one hop, each 0 for the node after one hop more.
    `length` is the number of hops of every walk.
    """

    nodes: int = 12
    questions: int = 20
    """At most, over all walks of a row; a walk that takes more is alone in its row."""

    @property
    def vocab_size(self) -> int:
        """Leaving and at every node, and the hop."""
        return 2 * self.nodes + 1

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random cycles with random starts, (size, 2 * nodes of the graph + walks * length)."""
        n, walks = self._graph(length), self._walks(length)
        cycle = permutations(size, self.nodes, generator)[:, :n] + 1
        edges = torch.stack([cycle + self.nodes, cycle.roll(-1, 1)], -1)
        edges = edges.gather(1, permutations(size, n, generator).unsqueeze(-1).expand(-1, -1, 2))
        start = torch.randint(n, (size, walks, 1), generator=generator)
        hops = torch.full((size, walks, length), _HOP)
        hops[:, :, 0] = cycle.gather(1, start.squeeze(-1))
        visited = (start + torch.arange(1, length + 1)) % n
        answers = cycle.gather(1, visited.flatten(1))
        ids = torch.cat([edges.flatten(1), hops.flatten(1)], 1)
        targets = torch.cat([torch.full_like(edges.flatten(1), IGNORED), answers], 1)
        return Batch(ids, targets, torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """One per hop."""
        return length

    def positions(self, length: int) -> int:
        """Two per edge, and one per hop."""
        return 2 * self._graph(length) + self._walks(length) * length

    def _graph(self, length: int) -> int:
        """How many nodes the graph of a problem has: few for few hops, since look-ups are learned among few first."""
        return min(2 * length + 1, self.nodes)

    def _walks(self, length: int) -> int:
        return max(1, self.questions // length)
