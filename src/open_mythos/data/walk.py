"""Walks over a random graph: the prompt lists its edges in any order, then asks where walks end.

Main entry: `Walk`. Every hop is a look-up of where the last one led: with one hop per loop, a walk of k hops takes k
loops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.data.batch import IGNORED, Batch
from open_mythos.data.chains import n_chains
from open_mythos.data.permutations import permutations


@dataclass(frozen=True)
class Walk:
    """Ids are the edges, "leaving a, at b" in any order, then "at a" for every node: where do walks from it end?

    "At a" is 0 to `nodes` - 1, "leaving a" `nodes` more. The graph consists of paths whose last node leads to itself.
    `length` is the hops of a path: its nodes are 0, 1, ..., `length` of them from its last.
    """

    nodes: int = 22

    @property
    def vocab_size(self) -> int:
        """At every node, and leaving it."""
        return 2 * self.nodes

    def batch(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Random graphs, (size, 3 * paths * (length + 1))."""
        n_paths = self._paths(length)
        nodes = permutations(size, self.nodes, generator)[:, : n_paths * (length + 1)]
        path = nodes.unflatten(1, (n_paths, length + 1))
        to = torch.cat([path[..., 1:], path[..., -1:]], -1)
        edges = torch.stack([path + self.nodes, to], -1).flatten(1, 2)
        order = permutations(size, nodes.shape[1], generator).unsqueeze(-1)
        edges = edges.gather(1, order.expand(-1, -1, 2)).flatten(1)
        order = permutations(size, nodes.shape[1], generator)
        ends = path[..., -1:].expand_as(path).flatten(1)
        ids = torch.cat([edges, nodes.gather(1, order)], 1)
        targets = torch.cat([torch.full_like(edges, IGNORED), ends.gather(1, order)], 1)
        return Batch(ids, targets, torch.full((size,), self.loops(length)))

    def loops(self, length: int) -> int:
        """One per hop."""
        return length

    def positions(self, length: int) -> int:
        """Two per edge, and one per node."""
        return 3 * self._paths(length) * (length + 1)

    def _paths(self, length: int) -> int:
        return n_chains(length, self.nodes, length + 1)
