"""Keys and values of many requests in preallocated tensors, in pages; only what was computed is stored.

Main entries: `CacheLayout`, `PagedCache`, `RowTable`.
"""

from __future__ import annotations

from math import ceil, lcm, prod

import numpy as np
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.inference.pages import PageAllocator
from open_mythos.model.cache import CacheAddress, Entries, Stage
from open_mythos.model.cache_sharing import CacheSharing, EveryLoop
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.rows import Rows, described

_LEAST_PER_PAGE = 16
_LINE_BYTES = 64
"""Of a processor's caches: where memory begins."""


class CacheLayout:
    """How rows lie in pages; a row holds what one attention layer caches of one position (at one loop).

    What the layers of a stage keep of a position lies in rows side by side: those of the prelude and the coda together
    make an outer entry, those of the recurrent block at one loop a looped one. A page holds entries of one kind.
    """

    def __init__(self, config: MythosConfig, itemsize: int, sharing: CacheSharing) -> None:
        """`itemsize` is that of a number, in bytes."""
        self.sharing, self.shapes = sharing, config.cache_widths
        self.loop_width, self.outer_width = config.recurrent_layers, config.prelude_layers + config.coda_layers
        both = lcm(self.loop_width, self.outer_width or 1)
        self.page_rows = both * ceil(_LEAST_PER_PAGE * self.loop_width / both)
        self.row_bytes = config.cached_numbers * itemsize
        self.page_bytes = self.page_rows * self.row_bytes
        self._first_row = {"prelude": 0, "recurrent": 0, "coda": config.prelude_layers}

    def pages_for(self, length: int, n_loops: int) -> int:
        """The most pages that so many positions of so many loops can come to fill."""
        looped = length * self.sharing.slots(n_loops) * self.loop_width
        return ceil(looped / self.page_rows) + ceil(length * self.outer_width / self.page_rows)

    def offset(self, address: CacheAddress) -> int:
        """A layer's row within the entries of its stage."""
        return self._first_row[address.stage] + address.layer


def cache_bytes_needed(model: OpenMythos, length: int, n_loops: int) -> int:
    """The most bytes of cache that a request of so many positions, prompt included, can come to hold."""
    layout = CacheLayout(model.config, model.embed.weight.element_size(), EveryLoop())
    return layout.pages_for(length, n_loops) * layout.page_bytes


class PagedCache:
    """The rows of all requests, in pages."""

    def __init__(self, layout: CacheLayout, cache_bytes: int, like: Tensor) -> None:
        """`like` gives dtype and device; `ValueError` where `cache_bytes` are less than one page."""
        if cache_bytes < layout.page_bytes:
            raise ValueError(f"cache_bytes is {cache_bytes}; it must be at least one page, {layout.page_bytes}")
        self.layout = layout
        self.pages = PageAllocator(cache_bytes // layout.page_bytes)
        n_rows = self.pages.n_pages * layout.page_rows + max(layout.loop_width, layout.outer_width)
        # Heads first: what is read of a head then lies in one piece, as a product over keys wants it.
        sizes = {name: (*shape[:-1], n_rows, shape[-1]) for name, shape in layout.shapes.items()}
        self._entries = {name: _zeros(size, like) for name, size in sizes.items()}
        self._described: dict[tuple[Stage, int, int], Rows] = {}

    @property
    def spare_row(self) -> int:
        """Where an entry of any kind may be written that nobody is to read."""
        return self.pages.n_pages * self.layout.page_rows

    def described(self, first: CacheAddress, n_layers: int) -> Rows:
        """The entries (heads, rows, width) of some layers, (layers, kinds, 4), as `Seen` has them.

        A layer's begin at its own row, and end behind the others' by as much, where nothing is looked for.
        """
        if (first.stage, first.layer, n_layers) not in self._described:
            layers = [self.layout.offset(first._replace(layer=first.layer + k)) for k in range(n_layers)]
            whole = [described(tensor.view(-1, *tensor.shape[-2:])) for tensor in self._entries.values()]
            each = [[(at + row * sizes[-1] * 4, *sizes) for at, *sizes in whole] for row in layers]
            self._described[first.stage, first.layer, n_layers] = np.array(each)
        return self._described[first.stage, first.layer, n_layers]

    @property
    def bytes_in_use(self) -> int:
        """Of the pages that somebody holds."""
        return (self.pages.n_pages - self.pages.n_free) * self.layout.page_bytes

    def write(self, address: CacheAddress, first_rows: Tensor, new: Entries) -> None:
        """Put a layer's entries (n, ...) where their positions' rows begin, `first_rows` (n,)."""
        rows = first_rows + self.layout.offset(address)
        for name, tensor in new.items():
            self._entries[name].index_copy_(-2, rows, tensor.movedim(0, -2))

    def read(self, address: CacheAddress, first_rows: Tensor) -> Entries:
        """Entries (batch, keys, ...) of a layer, for the positions whose rows begin at `first_rows` (batch, keys)."""
        rows = (first_rows + self.layout.offset(address)).flatten()
        found = {name: tensor.index_select(-2, rows) for name, tensor in self._entries.items()}
        return {name: x.unflatten(-2, first_rows.shape).movedim((-3, -2), (0, 1)) for name, x in found.items()}


class RowTable:
    """Where the rows of one request's positions begin, at most `capacity` of them and of `n_loops` loops each."""

    def __init__(self, cache: PagedCache, capacity: int, n_loops: int) -> None:
        self._cache, self._layout = cache, cache.layout
        self.outer: Rows = np.zeros(capacity, np.int64)
        """(capacity,): the outer entry."""
        self.looped: Rows = np.zeros((cache.layout.sharing.slots(n_loops), capacity), np.int64)
        """(slots, capacity): the looped entry that queries see; where a position has none of that slot, its last."""
        self.exits = np.zeros(capacity, np.int64)
        """(capacity,): how many loops each position has run."""
        self._slot, self._slots = cache.layout.sharing.slot, cache.layout.sharing.slots
        self._outer_at: list[int] = [self.outer.ctypes.data]
        self._looped_at: list[int] = []
        """Where the list is that is `seen` at each loop, as far as has been asked."""
        self._free_outer: list[int] = []
        self._free_looped: list[int] = []
        self.pages: list[int] = []

    def place(self, loop: int | None, positions: Rows | int, n_loops: int = 1) -> None:
        """New entries for positions: outer ones, or of so many loops from this one on."""
        n = 1 if isinstance(positions, int) else len(positions)
        if loop is None:
            if self._layout.outer_width:
                taken = self._take(self._free_outer, self._layout.outer_width, n)
                self.outer[positions] = taken[0] if isinstance(positions, int) else taken
            return
        self.exits[positions] = loop + n_loops
        first, end = self._slots(loop), self._slots(loop + n_loops)
        if end > first:  # a later loop of the same slot writes over it
            taken = self._take(self._free_looped, self._layout.loop_width, (end - first) * n)
            self.looped[first:end, positions] = taken if isinstance(positions, int) else np.reshape(taken, (-1, n))
            if end < len(self.looped):
                self.looped[end:, positions] = taken[-n:]

    def leave_out(self, loop: int, positions: Rows | int) -> None:
        """Take back what `place` gave positions, all of the same last loop, from this loop on: they have not run it."""
        self._free_from(loop, positions)
        first = self._slots(loop)
        self.looped[first:, positions] = self.looped[first - 1, positions]

    def seen(self, loop: int | None) -> Rows:
        """Where the rows begin that queries at this loop read, (capacity,)."""
        return self.outer if loop is None else self.looped[self._slot(loop)]

    def seen_at(self, loop: int | None, n_loops: int) -> list[int]:
        """The address of what is `seen` in each of so many loops from this one on; whoever uses it keeps the table."""
        if loop is None:
            return self._outer_at
        for t in range(len(self._looped_at), loop + n_loops):
            self._looped_at.append(self.looped.ctypes.data + self._slot(t) * self.outer.nbytes)
        return self._looped_at[loop : loop + n_loops]

    def drop(self, positions: range) -> None:
        """Free the rows of positions that turned out not to be wanted."""
        for position in positions:
            if self._layout.outer_width:
                self._free_outer.append(int(self.outer[position]))
            self._free_from(0, position)

    def adopt(self, other: RowTable, n: int) -> None:
        """Hold the pages of another table, and see the rows of its first `n` positions."""
        self._cache.pages.share(other.pages)
        self.pages += other.pages
        self.outer[:n], self.looped[:, :n], self.exits[:n] = other.outer[:n], other.looped[:, :n], other.exits[:n]

    @property
    def bytes_stored(self) -> int:
        """Of the rows that hold something, those adopted with whole pages included."""
        free = len(self._free_outer) * self._layout.outer_width + len(self._free_looped) * self._layout.loop_width
        return (len(self.pages) * self._layout.page_rows - free) * self._layout.row_bytes

    def release(self) -> None:
        """Let go of all pages."""
        self._cache.pages.release(self.pages)
        self.pages, self._free_outer, self._free_looped = [], [], []

    def _free_from(self, loop: int, positions: Rows | int) -> None:
        """Free the looped entries of positions, all of the same last loop, from this loop on."""
        first, end = self._slots(loop), self._slots(int(np.max(self.exits[positions])))
        self._free_looped.extend(self.looped[first:end, positions].flatten().tolist())
        self.exits[positions] = loop

    def _take(self, free: list[int], width: int, n: int) -> list[int]:
        while len(free) < n:
            self._take_page(free, width)
        start = len(free) - n
        taken = free[start:]
        del free[start:]
        return taken[::-1]

    def _take_page(self, free: list[int], width: int) -> None:
        page, size = self._cache.pages.take(), self._layout.page_rows
        self.pages.append(page)
        free[:0] = range((page + 1) * size - width, page * size - 1, -width)


def _zeros(size: tuple[int, ...], like: Tensor) -> Tensor:
    """As `like.new_zeros`; on a CPU, the system gives memory only to what is written, when it is."""
    if not like.is_cpu:
        return like.new_zeros(size)
    n_bytes = prod(size) * like.element_size()
    memory = np.zeros(n_bytes + _LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % _LINE_BYTES
    return torch.from_numpy(memory[start : start + n_bytes]).view(like.dtype).view(size)
