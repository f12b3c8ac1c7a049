"""Keys and values of sequences whose final length is known: room for every position is set aside at the start.

Main entry: `SequenceStore`. Adding a token copies its row and nothing else.
"""

from __future__ import annotations

from functools import cached_property
from math import prod

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.cache import CacheAddress, Entries
from open_mythos.model.vectors import Array, as_array


class _Slot:
    """Rows (batch, capacity, width) of one address, the first `filled` of them written."""

    def __init__(self, rows: Tensor, shapes: dict[str, tuple[int, ...]]) -> None:
        self.rows, self.filled = rows, 0
        self._shapes = shapes

    @cached_property
    def array(self) -> Array:
        """The rows, for NumPy."""
        return as_array(self.rows)

    @cached_property
    def entries(self) -> dict[str, Array]:
        """What lies in the rows, by name: (batch, capacity, width) or (heads, batch, capacity, width)."""
        found, start = dict[str, Array](), 0
        for name, shape in self._shapes.items():
            end = start + prod(shape)
            part = self.array[..., start:end]
            found[name] = part.reshape(*part.shape[:2], *shape).transpose(2, 0, 1, 3) if len(shape) > 1 else part
            start = end
        return found


class SequenceStore:
    """A `KVStore` with room for `capacity` positions of every loop that any position has reached.

    A position's entries lie side by side in one row, in the order of the config's `cache_widths`. A position that
    halted before a loop has its last active loop's row there, so a row is read without asking who halted: this takes
    more memory than the plain dict, which stores computed rows only.
    """

    def __init__(self, config: MythosConfig, batch: int, capacity: int, like: Tensor) -> None:
        """`like` gives dtype and device."""
        self._shapes = config.cache_widths
        self._sizes = [prod(shape) for shape in self._shapes.values()]
        self._batch, self._capacity, self._like = batch, capacity, like
        self._slots: dict[CacheAddress, _Slot] = {}
        self.length = 0
        self.reached: Tensor | None = None

    def extend(self, address: CacheAddress, new: Entries, active: Tensor | None) -> Entries:
        slot = self._slot(address)
        end = self.length + next(iter(new.values())).shape[1]
        row = torch.cat([new[name].flatten(2) for name in self._shapes], -1)
        if active is not None and address.loop > 0:
            before = self._slots[address._replace(loop=address.loop - 1)].rows
            row = torch.where(active.unsqueeze(-1), row, before[:, self.length : end])
        slot.rows[:, self.length : end] = row
        slot.filled = end
        return self._entries(slot.rows[:, :end])

    def before(self, address: CacheAddress) -> Entries:
        slot = self._slots[address._replace(loop=address.loop - 1)]
        return self._entries(slot.rows[:, self.length : slot.filled])

    def _entries(self, rows: Tensor) -> Entries:
        """Rows (batch, positions, width) by the names of what lies in them."""
        parts = rows.split(self._sizes, -1)
        return {name: x.unflatten(-1, shape) for x, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def append(self, address: CacheAddress, rows: Array, first: int) -> dict[str, Array]:
        """`extend` by one position, rows (batch, width), on the CPU: what is seen from position `first` on.

        By name, (batch, positions, width) or (heads, batch, positions, width).
        """
        slot = self._slot(address)
        slot.array[:, self.length] = rows
        slot.filled = self.length + 1
        return {name: entry[..., first : slot.filled, :] for name, entry in slot.entries.items()}

    def commit(self, exit_loops: Tensor) -> None:
        """The pass has succeeded: its positions, which ran `exit_loops` (batch, new), now belong to the past."""
        self.length += exit_loops.shape[1]
        self.reached = exit_loops[:, -1:]

    def _slot(self, address: CacheAddress) -> _Slot:
        """The address's slot; positions that never reached this loop take the rows of the loop before."""
        slot = self._slots.get(address)
        if slot is None:
            shape = (self._batch, self._capacity, sum(self._sizes))
            slot = self._slots[address] = _Slot(self._like.new_empty(shape), self._shapes)
        if slot.filled < self.length:
            missed = slice(slot.filled, self.length)
            slot.rows[:, missed] = self._slots[address._replace(loop=address.loop - 1)].rows[:, missed]
            slot.filled = self.length
        return slot
