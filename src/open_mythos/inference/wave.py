"""One call of the model over positions of several requests, each at its own place and loop.

Main entries: `Lane`, `WaveContext`. All positions lie side by side in one sequence; only attention tells them apart.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.inference.cache import PagedCache, Rows, RowTable
from open_mythos.model.cache import CacheAddress, Entries
from open_mythos.model.context import ForwardContext, Visible
from open_mythos.model.mask import AttentionMask, OwnMasks
from open_mythos.model.rope import RotaryTable, rotary_table


class Lane(NamedTuple):
    """A position of one request, or several in ascending order, at one loop; None stands for prelude and coda."""

    table: RowTable
    positions: Rows | int
    loop: int | None


class _Group(NamedTuple):
    """Queries that attend in one call: `batch` lanes of as many queries each, where their keys lie, who sees what."""

    queries: slice
    batch: int
    rows: Tensor
    mask: AttentionMask


class WaveContext(ForwardContext):
    """A `ForwardContext` over lanes, first those of one position, all in one stage.

    With `place`, the lanes' positions get new rows for what the layers keep of them; otherwise they have them.
    """

    def __init__(
        self,
        config: MythosConfig,
        cache: PagedCache,
        lanes: Sequence[Lane],
        like: Tensor,
        constants: dict[Hashable, Tensor],
        *,
        place: bool = True,
    ) -> None:
        self._window = config.outer_reach if lanes[0].loop is None else config.loop_reach
        self._cache = cache
        if place:
            for table, positions, loop in lanes:
                table.place(loop, positions)
        singles = [(table, at, table.seen(loop)) for table, at, loop in lanes if isinstance(at, int)]
        blocks = [(table, at, table.seen(loop)) for table, at, loop in lanes if not isinstance(at, int)]
        alone = np.array([at for _, at, _ in singles], np.int64)
        written = np.array([seen[at] for _, at, seen in singles], np.int64)
        self._positions = np.concatenate([alone, *(at for _, at, _ in blocks)])
        super().__init__(config, len(self._positions), like.device, like.dtype, constants=constants)
        self._written = self._there(np.concatenate([written, *(seen[at] for _, at, seen in blocks)]))
        self._groups = [self._singles(alone, [seen for _, _, seen in singles])] if singles else []
        start = len(singles)
        for _, at, seen in blocks:
            self._groups.append(self._block(at, seen, start))
            start += len(at)

    @cached_property
    def rotary(self) -> RotaryTable | None:
        """Rotations of every lane's positions."""
        c = self.config
        if not c.use_rope:
            return None
        return rotary_table(self._there(self._positions), c.rotary_dim, c.rotary_base, self.dtype, c.rotary_heads)

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

    def _singles(self, positions: Rows, seen: Sequence[Rows]) -> _Group:
        """Lanes of one position each, side by side, each with as many keys as the one that sees most."""
        first = np.zeros_like(positions) if self._window is None else np.maximum(0, positions - self._window + 1)
        counts = positions + 1 - first
        width = int(counts.max())
        rows = np.zeros((len(positions), width), np.int64)
        for line, own, start, count in zip(rows, seen, first.tolist(), counts.tolist(), strict=True):
            line[:count] = own[start : start + count]
        if (counts == width).all():
            mask = AttentionMask(1, width, None, self.device, self.dtype)
        else:
            visible = self._there(np.arange(width) < counts[:, None]).unsqueeze(1)
            mask = OwnMasks(1, width, None, self.device, self.dtype, visible)
        return _Group(slice(0, len(positions)), len(positions), self._there(rows), mask)

    def _block(self, positions: Rows, seen: Rows, start: int) -> _Group:
        """A lane of several positions, some of those in between perhaps halted."""
        n, last = len(positions), int(positions[-1])
        first = 0 if self._window is None else max(0, int(positions[0]) - self._window + 1)
        n_keys = last + 1 - first
        if last + 1 - positions[0] == n:
            mask = AttentionMask(n, n_keys, self._window, self.device, self.dtype)
        else:
            keys, queries = np.arange(first, last + 1), positions[:, None]
            visible = keys <= queries
            if self._window is not None:
                visible &= keys > queries - self._window
            mask = OwnMasks(n, n_keys, None, self.device, self.dtype, self._there(visible[None]))
        return _Group(slice(start, start + n), 1, self._there(seen[None, first : last + 1]), mask)

    def _there(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)
