"""A loop over the positions that have not halted, and no others: they lie side by side in one sequence.

Main entry: `ActiveContext`. Only attention tells them apart: each position attends to its own sequence, as stored.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from open_mythos.model.cache import CacheAddress, Entries
from open_mythos.model.context import ForwardContext, Visible
from open_mythos.model.mask import AttentionMask, OwnMasks, in_reach
from open_mythos.model.rope import RotaryTable

# Gathering and scattering pay from this share of halted positions on, if they are not too few.
_SHARE, _LEAST = 0.2, 32

# A query's own keys are copied for it where the window is so many times smaller than the sequence.
_NARROW = 4


class _Groups(NamedTuple):
    """Queries that share their keys, in one call: both as indices, of which `mask` says who sees whom."""

    queries: Tensor
    """(groups, queries) of the positions side by side; a group that has fewer repeats another's."""
    keys: Tensor
    """(groups, keys) of all keys of all sequences, counted from the first sequence to the last."""
    mask: AttentionMask
    places: Tensor
    """(n,): where each position's query stands in `queries`."""


class ActiveContext(ForwardContext):
    """A `ForwardContext` of the positions that `active` (batch, seq) marks among those of the context `whole`."""

    def __init__(self, whole: ForwardContext, active: Tensor) -> None:
        self._whole, self._active = whole, active
        self._rows = active.flatten().nonzero().squeeze(-1)
        self._sequence = torch.div(self._rows, active.shape[1], rounding_mode="floor")
        self._column = self._rows % active.shape[1]
        super().__init__(whole.config, len(self._rows), whole.device, whole.dtype, constants=whole.constants)
        self.expert_load = whole.expert_load
        self._groups: dict[int | None, _Groups] = {}

    @staticmethod
    def pays(active: Tensor) -> bool:
        """Whether so many positions have halted that leaving them out saves time."""
        n_active = int(active.sum())
        halted = active.numel() - n_active
        return n_active > 0 and halted >= max(_LEAST, _SHARE * active.numel())

    def gather(self, x: Tensor) -> Tensor:
        """The active ones of x (batch, seq, ...), (1, n, ...)."""
        return x.flatten(0, 1).index_select(0, self._rows).unsqueeze(0)

    def scatter(self, new: Tensor, before: Tensor) -> Tensor:
        """`before` (batch, seq, ...) with the active positions taken from `new` (1, n, ...)."""
        return before.flatten(0, 1).index_copy(0, self._rows, new[0]).view_as(before)

    @cached_property
    def rotary(self) -> RotaryTable | None:
        """Rotations of the active positions."""
        table = self._whole.rotary
        return None if table is None else RotaryTable(*(part[self._column] for part in table))

    def attend(
        self,
        address: CacheAddress,
        queries: tuple[Tensor, ...],
        new: Entries,
        active: Tensor | None,
        window: int | None,
        over: Visible,
    ) -> Tensor:
        """Store what is new, then let every active position attend to its own sequence."""
        store = self._whole.store
        before = store.before(address)
        seen = store.extend(address, {name: self.scatter(x, before[name]) for name, x in new.items()}, None)
        groups = self._grouped(window)
        own = tuple(_taken(q[0], groups.queries) for q in queries)
        keys = {name: _taken(x.flatten(0, 1), groups.keys) for name, x in seen.items()}
        return _taken(over(own, keys, groups.mask).flatten(0, 1), groups.places).unsqueeze(0)

    def _grouped(self, window: int | None) -> _Groups:
        if window not in self._groups:
            if window is not None and _NARROW * window <= self._n_keys:
                self._groups[window] = self._alone(window)
            else:
                self._groups[window] = self._by_sequence(window)
        return self._groups[window]

    @property
    def _n_keys(self) -> int:
        """Positions of a sequence, stored and new."""
        return self._whole.store.length + self._active.shape[1]

    @property
    def _position(self) -> Tensor:
        """(n,): where in its sequence each active position stands."""
        return self._whole.store.length + self._column

    def _alone(self, window: int) -> _Groups:
        """Every query by itself, with a copy of the keys in its window."""
        n = self.n_new
        keys = self._position.unsqueeze(-1) + torch.arange(1 - window, 1, device=self.device)
        mask = OwnMasks.of((keys >= 0).unsqueeze(1), self.dtype)
        flat = self._sequence.unsqueeze(-1) * self._n_keys + keys.clamp_min(0)
        each = torch.arange(n, device=self.device)
        return _Groups(each.unsqueeze(-1), flat, mask, each)

    def _by_sequence(self, window: int | None) -> _Groups:
        """The active positions of each sequence together, as many places as the one that has most."""
        _, group, counts = self._sequence.unique_consecutive(return_inverse=True, return_counts=True)
        most = int(counts.max())
        starts = counts.cumsum(0) - counts
        each = torch.arange(self.n_new, device=self.device)
        places = group * most + each - starts[group]
        queries = (starts.unsqueeze(-1) + torch.arange(most, device=self.device)).clamp_max(self.n_new - 1)
        first = 0 if window is None else max(0, int(self._position.min()) - window + 1)
        keys = torch.arange(first, self._n_keys, device=self.device)
        mask = OwnMasks.of(in_reach(self._position[queries], keys, window), self.dtype)
        return _Groups(queries, self._sequence[starts].unsqueeze(-1) * self._n_keys + keys, mask, places)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]`; several times faster."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)
