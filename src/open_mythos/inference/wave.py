"""One call of the model over positions of several requests, each at its own place and loop.

Main entries: `Lane`, `WaveContext`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.inference.cache import PagedCache, Rows, RowTable
from open_mythos.model.cache import CacheAddress, Entries
from open_mythos.model.context import ForwardContext
from open_mythos.model.mask import AttentionMask
from open_mythos.model.rope import RotaryTable, rotary_table


class Lane(NamedTuple):
    """A request's part of a call: some of its positions, in ascending order, all at one loop."""

    table: RowTable
    positions: Rows
    loop: int


class _Keys(NamedTuple):
    """Which keys the lanes read with one window: positions (batch, keys), and which of them are real."""

    positions: Rows
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class WaveMask(AttentionMask):
    """A mask of its own for every lane."""

    lanes_bias: Tensor | None = None

    @property
    def first_key(self) -> int:
        """The lanes' stores leave out by themselves what nobody sees."""
        return 0

    @property
    def is_causal_square(self) -> bool:
        """Never taken for granted."""
        return False

    @cached_property
    def parts(self) -> list[tuple[slice, slice, AttentionMask]]:
        """Not cut."""
        return [(slice(None), slice(None), self)]

    @cached_property
    def bias(self) -> Tensor | None:
        """(lanes, queries, keys); (queries, keys) for a single lane."""
        return self.lanes_bias


class WaveContext(ForwardContext):
    """A `ForwardContext` over lanes; it is its own key-value store."""

    def __init__(self, config: MythosConfig, cache: PagedCache, lanes: Sequence[Lane], like: Tensor) -> None:
        self.width = max(len(lane.positions) for lane in lanes)
        super().__init__(config, self.width, like.device, like.dtype)
        self.lanes, self.cache = lanes, cache
        self.store = self  # type: ignore[assignment]
        self.length = 0
        counts = np.array([len(lane.positions) for lane in lanes])
        self.valid = torch.from_numpy(np.arange(self.width) < counts[:, None]).to(like.device)
        """(lanes, width): False where a lane has fewer positions than the widest."""
        self.positions = np.stack([_padded(lane.positions, self.width) for lane in lanes])
        self._keys: dict[int | None, _Keys] = {}
        self._wave_masks: dict[int | None, AttentionMask] = {}

    @cached_property
    def rotary(self) -> RotaryTable | None:
        """Rotations of every lane's positions."""
        c = self._config
        if not c.use_rope:
            return None
        return rotary_table(torch.from_numpy(self.positions).to(self.device), c.rotary_dim, c.rotary_base, self.dtype)

    def mask(self, window: int | None) -> AttentionMask:
        """Each lane's own."""
        if window not in self._wave_masks:
            keys = self._keys_of(window)
            queries = self.positions[:, :, None]
            seen = keys.valid[:, None, :] & (keys.positions[:, None, :] <= queries)
            if window is not None:
                seen &= keys.positions[:, None, :] > queries - window
            bias = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(torch.from_numpy(~seen), float("-inf"))
            bias = bias.to(self.device)
            self._wave_masks[window] = WaveMask(
                self.width,
                keys.positions.shape[1],
                None,
                self.device,
                self.dtype,
                bias[0] if len(self.lanes) == 1 else bias,
            )
        return self._wave_masks[window]

    def extend(self, address: CacheAddress, new: Entries, active: Tensor | None) -> Entries:
        """Store the lanes' new rows, and return all that their queries may see, each lane at its own loop."""
        window = self._config.loop_reach if address.stage == "recurrent" else self._config.outer_reach
        own = [address._replace(loop=lane.loop) if address.stage == "recurrent" else address for lane in self.lanes]
        placed = [lane.table.place(at, lane.positions) for lane, at in zip(self.lanes, own, strict=True)]
        self.cache.write(self._there(np.concatenate(placed)), new, self.valid)
        keys = self._keys_of(window)
        rows = np.zeros(keys.positions.shape, np.int64)
        for index, (lane, at) in enumerate(zip(self.lanes, own, strict=True)):
            real = keys.valid[index]
            rows[index, real] = lane.table.find(at, keys.positions[index, real])
        return self.cache.read(self._there(rows))

    def new_states(self, states: Sequence[Tensor]) -> Tensor:
        """The lanes' states (n, dim) side by side, (lanes, width, dim), with zeros where a lane is narrower."""
        return torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)

    def _keys_of(self, window: int | None) -> _Keys:
        if window not in self._keys:
            last = np.array([lane.positions[-1] for lane in self.lanes])
            first = np.zeros_like(last)
            if window is not None:
                first = np.maximum(0, np.array([lane.positions[0] for lane in self.lanes]) - window + 1)
            width = int((last - first).max()) + 1
            positions = first[:, None] + np.arange(width)
            self._keys[window] = _Keys(positions, positions <= last[:, None])
        return self._keys[window]

    def _there(self, rows: Rows) -> Tensor:
        return torch.from_numpy(rows).to(self.device)


def _padded(positions: Rows, width: int) -> Rows:
    return np.pad(positions, (0, width - len(positions)), mode="edge")
