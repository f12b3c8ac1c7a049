"""Keys and values of many requests in one preallocated tensor, in pages; only what was computed is stored.

Main entries: `PagedCache`, `RowTable`.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.inference.pages import PageAllocator
from open_mythos.model.cache import CacheAddress, Entries

Rows = NDArray[np.int64]

_RUNNING = np.iinfo(np.int32).max
"""Exit loop of a position that has not halted yet."""


class PagedCache:
    """`n_pages` pages of `page_size` rows; a row holds what one attention layer caches of one token at one loop."""

    def __init__(self, config: MythosConfig, n_pages: int, page_size: int, like: Tensor) -> None:
        """`like` gives dtype and device."""
        self.config, self.page_size = config, page_size
        self._shapes = config.cache_widths
        self._sizes = [prod(shape) for shape in self._shapes.values()]
        self.pages = PageAllocator(n_pages)
        self._rows = like.new_zeros(n_pages * page_size, sum(self._sizes))

    @property
    def page_bytes(self) -> int:
        """Of one page."""
        return self.page_size * self._rows.shape[1] * self._rows.element_size()

    @property
    def bytes_in_use(self) -> int:
        """Of the pages that somebody holds."""
        return (self.pages.n_pages - self.pages.n_free) * self.page_bytes

    def write(self, rows: Tensor, entries: Entries, valid: Tensor) -> None:
        """Put entries (batch, seq, ...), where `valid` (batch, seq), into `rows`, in that order."""
        packed = torch.cat([entries[name].flatten(2) for name in self._shapes], -1)
        self._rows[rows] = packed[valid]

    def read(self, rows: Tensor) -> Entries:
        """What lies in rows (batch, keys), each (batch, keys, ...)."""
        found = self._rows[rows].split(self._sizes, -1)
        return {name: x.unflatten(-1, shape) for x, (name, shape) in zip(found, self._shapes.items(), strict=True)}


class RowTable:
    """Which rows one request has: for every layer, loop and position."""

    def __init__(self, cache: PagedCache, capacity: int) -> None:
        self._cache, self._capacity = cache, capacity
        self.exits = np.full(capacity, _RUNNING, np.int32)
        """(capacity,): how many loops each position has run; a huge number until it has halted."""
        self._rows: dict[CacheAddress, Rows] = {}
        self._open: dict[CacheAddress, list[int]] = {}
        self._held: list[int] = []

    def place(self, address: CacheAddress, positions: Rows) -> Rows:
        """New rows for these positions."""
        rows = self._rows.setdefault(address, np.full(self._capacity, -1, np.int64))
        free = self._open.setdefault(address, [])
        while len(free) < len(positions):
            page, size = self._cache.pages.take(), self._cache.page_size
            self._held.append(page)
            free.extend(range(page * size, (page + 1) * size))
        rows[positions] = free[: len(positions)]
        del free[: len(positions)]
        return rows[positions]

    def find(self, address: CacheAddress, positions: Rows) -> Rows:
        """The rows that a query at this address sees: those of each position's last active loop up to this one."""
        if address.stage != "recurrent":
            return self._rows[address][positions]
        loops = np.minimum(address.loop, self.exits[positions] - 1)
        found = np.empty(len(positions), np.int64)
        for loop in np.unique(loops):
            at = loops == loop
            found[at] = self._rows[address._replace(loop=int(loop))][positions[at]]
        return found

    def release(self) -> None:
        """Let go of all pages."""
        self._cache.pages.release(self._held)
        self._held, self._rows, self._open = [], {}, {}
