"""Keys and values of sequences whose final length is known: room for every position is set aside at the start.

Main entry: `SequenceStore`. Adding a token copies its entries and nothing else.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.cache import CacheAddress, Entries
from open_mythos.model.rows import Rows, Seen, described


class _Slot:
    """Entries (batch, capacity, width) or (heads, batch, capacity, width) of one address, `filled` of them written."""

    def __init__(self, entries: Entries, before: _Slot | None) -> None:
        """`before` is the slot of the loop before; the first has none."""
        self.entries, self.filled, self._before = entries, 0, before

    @property
    def described(self) -> list[tuple[int, ...]]:
        """The entries as (heads, positions, width), the sequences one after the other."""
        tensors = self.entries.values()
        return [described(x.view(-1, x.shape[-3] * x.shape[-2], x.shape[-1])) for x in tensors]

    def catch_up(self, length: int) -> None:
        """Positions up to `length` that never reached this loop take the entries of the loop before."""
        if self.filled < length:
            assert self._before is not None, "every position runs the first loop"
            for name, tensor in self.entries.items():
                tensor[..., self.filled : length, :] = self._before.entries[name][..., self.filled : length, :]
            self.filled = length

    def seen(self, positions: slice) -> Entries:
        """Entries of some positions, (batch, positions, ...)."""
        return {name: _heads_last(tensor[..., positions, :]) for name, tensor in self.entries.items()}


class SequenceStore:
    """A `KVStore` with room for `capacity` positions of every loop that any position has reached.

    A position that halted before a loop has its last active loop's entries there, so what is read is read without
    asking who halted: this takes more memory than the plain dict, which stores what was computed only.
    """

    def __init__(self, config: MythosConfig, batch: int, capacity: int, like: Tensor) -> None:
        """`like` gives dtype and device."""
        self._shapes = config.cache_widths
        self._batch, self._capacity, self._like = batch, capacity, like
        self._slots: dict[CacheAddress, _Slot] = {}
        self._stages: dict[tuple[CacheAddress, int, int], tuple[list[_Slot], Rows]] = {}
        self._rows: dict[tuple[int, int | None], tuple[Rows, Rows]] = {}
        self._firsts, self._places = np.arange(batch)[:, None] * capacity, np.arange(batch * capacity)
        self._listed = self._places.ctypes.data
        self.length = 0
        self.reached: Tensor | None = None

    def extend(self, address: CacheAddress, new: Entries, active: Tensor | None) -> Entries:
        slot = self._slot(address)
        end = self.length + next(iter(new.values())).shape[1]
        for name, tensor in slot.entries.items():
            tensor[..., self.length : end, :] = _heads_first(new[name])
        if active is not None and address.loop > 0:
            before = self._slots[address._replace(loop=address.loop - 1)]
            for name, tensor in slot.entries.items():
                own, old = (x[..., self.length : end, :] for x in (tensor, before.entries[name]))
                own.copy_(torch.where(active.unsqueeze(-1), own, old))
        slot.filled = end
        return slot.seen(slice(0, end))

    def before(self, address: CacheAddress) -> Entries:
        slot = self._slots[address._replace(loop=address.loop - 1)]
        return slot.seen(slice(self.length, slot.filled))

    def seen(self, first: CacheAddress, n_layers: int, n_new: int, window: int | None, n_loops: int = 1) -> Seen:
        """Room for `n_new` more positions per sequence, which the caller fills, and what their queries see; on the CPU.

        For some layers, of which the first has the address `first`, in so many loops from there on. All positions of
        the first sequence come first.
        """
        key = first, n_layers, n_loops
        if key not in self._stages:
            slots = [self._slot(address) for address in _addresses(first, n_layers, n_loops)]
            entries = np.array([slot.described for slot in slots])
            self._stages[key] = slots, entries.reshape(n_loops, n_layers, *entries.shape[1:])
        slots, entries = self._stages[key]
        for slot in slots:
            slot.catch_up(self.length)
            slot.filled = self.length + n_new
        return Seen(entries, *self._rows_seen(n_new, window))

    def leave_out(self, first: CacheAddress, n_layers: int, n_loops: int) -> None:
        """Nobody fills the room of some loops, which `seen` has given: those of some layers from `first` on."""
        for address in _addresses(first, n_layers, n_loops):
            self._slots[address].filled = self.length

    def _rows_seen(self, n_new: int, window: int | None) -> tuple[Rows, Rows]:
        """Where the rows are listed that each new position sees, (1, n), and how many they are."""
        if (n_new, window) not in self._rows:
            ends = np.arange(self.length + 1, self.length + n_new + 1)
            counts = ends if window is None else np.minimum(ends, window)
            starts = (self._firsts + (ends - counts)).reshape(-1)
            repeated = counts if self._batch == 1 else np.tile(counts, self._batch)
            self._rows[n_new, window] = (self._listed + self._places.itemsize * starts)[None], repeated
        return self._rows[n_new, window]

    def commit(self, exit_loops: Tensor) -> None:
        """The pass has succeeded: its positions, which ran `exit_loops` (batch, new), now belong to the past."""
        self.length += exit_loops.shape[1]
        self.reached = exit_loops[:, -1:]
        self._rows = {}

    def _slot(self, address: CacheAddress) -> _Slot:
        """The address's slot, with all positions of the past."""
        slot = self._slots.get(address)
        if slot is None:
            shapes = {name: (*s[:-1], self._batch, self._capacity, s[-1]) for name, s in self._shapes.items()}
            entries = {name: self._like.new_empty(shape) for name, shape in shapes.items()}
            before = self._slots[address._replace(loop=address.loop - 1)] if address.loop else None
            slot = self._slots[address] = _Slot(entries, before)
        slot.catch_up(self.length)
        return slot


def _addresses(first: CacheAddress, n_layers: int, n_loops: int) -> list[CacheAddress]:
    """Those of some layers in some loops, the layers of a loop side by side."""
    pairs = product(range(first.loop, first.loop + n_loops), range(first.layer, first.layer + n_layers))
    return [first._replace(layer=layer, loop=loop) for loop, layer in pairs]


def _heads_first(x: Tensor) -> Tensor:
    """(batch, positions, heads, width) with its heads in front; (batch, positions, width) as it is."""
    return x.movedim(-2, 0) if x.dim() == 4 else x


def _heads_last(x: Tensor) -> Tensor:
    """The inverse of `_heads_first`."""
    return x.movedim(0, -2) if x.dim() == 4 else x
