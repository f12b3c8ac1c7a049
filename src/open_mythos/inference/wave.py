"""One call of the model over positions of several requests, each at its own place and loop.

Main entries: `Lane`, `Places`, `WaveContext`. All positions lie side by side in one sequence; only attention tells
them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.inference.cache import PagedCache, RowTable
from open_mythos.model.cache import CacheAddress, Entries
from open_mythos.model.context import Constants, ForwardContext, Visible
from open_mythos.model.mask import AttentionMask, OwnMasks, in_reach
from open_mythos.model.rope import RotaryTable
from open_mythos.model.rows import Array, Rows, Seen


class Lane(NamedTuple):
    """A position of one request, or several in ascending order, at one loop; None stands for prelude and coda."""

    table: RowTable
    positions: Rows | int
    loop: int | None


class Places:
    """Where the positions of lanes are in their requests, and how many keys each sees: the same in every loop."""

    def __init__(self, each: Sequence[Rows | int], window: int | None) -> None:
        """`each` lane's positions."""
        self.each, self.window = each, window
        self.sizes = [1 if isinstance(at, int) else len(at) for at in each]
        self.n = sum(self.sizes)
        self.positions: Rows = np.array(each, np.int64).ravel() if self.n == len(each) else np.hstack(each)
        """Of every lane, in order."""
        ends = self.positions + 1
        self.end = max(ends.tolist())
        """Behind the last of them."""
        self.counts = ends if window is None else np.minimum(ends, window)
        """How many keys each position sees."""
        self.longest = self.end if window is None else min(self.end, window)
        """The most of them."""
        self.before = self.positions.itemsize * (ends - self.counts)
        """In a list of a request's rows, how many bytes lie before those that each position sees."""


class _Group(NamedTuple):
    """Queries that attend in one call: `batch` lanes of as many queries each, where their keys lie, who sees what."""

    queries: slice
    batch: int
    rows: Tensor
    mask: AttentionMask


class WaveContext(ForwardContext):
    """A `ForwardContext` over lanes, first those of one position, all in one stage; their rows are placed."""

    def __init__(
        self,
        config: MythosConfig,
        cache: PagedCache,
        lanes: Sequence[Lane],
        places: Places,
        like: Tensor,
        constants: Constants,
    ) -> None:
        """`places` are those of the lanes, with the window of their stage."""
        super().__init__(config, places.n, like.device, like.dtype, constants=constants)
        self._cache, self.lanes, self._places = cache, lanes, places
        self._window = places.window

    @cached_property
    def _singles(self) -> list[tuple[int, Rows]]:
        """Lanes of one position: which, and the rows of its request."""
        return [(at, table.seen(loop)) for table, at, loop in self.lanes if isinstance(at, int)]

    @cached_property
    def _blocks(self) -> list[tuple[Rows, Rows]]:
        """The other lanes."""
        return [(at, table.seen(loop)) for table, at, loop in self.lanes if not isinstance(at, int)]

    @property
    def longest(self) -> int:
        """How many keys the position sees that sees most of them."""
        return self._places.longest

    @cached_property
    def rotary(self) -> RotaryTable | None:
        """Rotations of every lane's positions."""
        return self._rotary_at(self._there(self._places.positions))

    @cached_property
    def rotations(self) -> Array:
        """Cosines and sines of every position, (n_new, dim)."""
        if not self.config.use_rope:
            return self._rotations_at(self._places.positions)
        n = 1 << (self._places.end - 1).bit_length()  # more than is asked for, so that few tables are made
        table = self.constant(("rotations of all", n), lambda: self._rotations_at(np.arange(n)))
        return table[self._places.positions]

    def seen(self, first: CacheAddress, n_layers: int, window: int | None, n_loops: int = 1) -> Seen:
        """Where every position is to be stored, and what it sees; the window is that of the wave's stage.

        In one loop, or in several from each lane's on, whose rows are placed.
        """
        tables = np.array([table.seen_at(loop, n_loops) for table, _, loop in self.lanes], np.int64).T
        if len(self.lanes) < self.n_new:
            tables = np.repeat(tables, self._places.sizes, axis=1)
        rows = np.add(tables, self._places.before, order="C")
        return Seen(self._cache.described(first, n_layers)[None], rows, self._places.counts)

    def leave_out(self, first: CacheAddress, n_layers: int, n_loops: int) -> None:
        """The positions do not run some of the loops that are placed, those after as many as `first` says."""
        for table, positions, loop in self.lanes:
            assert loop is not None
            table.leave_out(loop + first.loop, positions)

    def attend(
        self,
        address: CacheAddress,
        queries: tuple[Tensor, ...],
        new: Entries,
        active: Tensor | None,
        window: int | None,
        over: Visible,
    ) -> Tensor:
        """Store what is new, then let every lane attend to what it may see, at its own loop."""
        self._cache.write(address, self._written, {name: tensor[0] for name, tensor in new.items()})
        heads = []
        for group in self._groups:
            own = tuple(q[0, group.queries].unflatten(0, (group.batch, -1)) for q in queries)
            heads.append(over(own, self._cache.read(address, group.rows), group.mask).flatten(0, 1))
        return (heads[0] if len(heads) == 1 else torch.cat(heads)).unsqueeze(0)

    @cached_property
    def _written(self) -> Tensor:
        """Where each position's rows begin."""
        singles = np.array([seen[at] for at, seen in self._singles], np.int64)
        return self._there(np.concatenate([singles, *(seen[at] for at, seen in self._blocks)]))

    @cached_property
    def _groups(self) -> list[_Group]:
        """Which queries attend together: the lanes of one position, then each of the others."""
        groups = [self._side_by_side()] if self._singles else []
        start = len(self._singles)
        for at, seen in self._blocks:
            groups.append(self._block(at, seen, start))
            start += len(at)
        return groups

    def _side_by_side(self) -> _Group:
        """Lanes of one position each, each with as many keys as the one that sees most."""
        rows, counts = self._keys_of(self._singles)
        lanes, width = rows.shape
        visible = np.arange(width) < counts[:, None]
        if visible.all():
            mask = AttentionMask(1, width, None, self.device, self.dtype)
        else:
            mask = OwnMasks.of(self._there(visible).unsqueeze(1), self.dtype)
        return _Group(slice(0, lanes), lanes, self._there(rows), mask)

    def _keys_of(self, positions: list[tuple[int, Rows]]) -> tuple[Rows, Rows]:
        """Where the keys begin that positions of tables see, (positions, most keys), and how many each has."""
        counts = [at + 1 if self._window is None else min(at + 1, self._window) for at, _ in positions]
        own = np.array([[seen[at]] for at, seen in positions], np.int64)
        rows = np.tile(own, max(counts))  # its own: what else there is may be NaN
        for line, (at, seen), count in zip(rows, positions, counts, strict=True):
            line[:count] = seen[at + 1 - count : at + 1]
        return rows, np.array(counts)

    def _block(self, positions: Rows, seen: Rows, start: int) -> _Group:
        """A lane of several positions, some of those in between perhaps halted."""
        n, last = len(positions), int(positions[-1])
        first = 0 if self._window is None else max(0, int(positions[0]) - self._window + 1)
        n_keys = last + 1 - first
        if last + 1 - positions[0] == n:
            mask = AttentionMask(n, n_keys, self._window, self.device, self.dtype)
        else:
            keys = torch.arange(first, last + 1, device=self.device)
            mask = OwnMasks.of(in_reach(self._there(positions), keys, self._window).unsqueeze(0), self.dtype)
        return _Group(slice(start, start + n), 1, self._there(seen[None, first : last + 1]), mask)

    def _there(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)
