"""Keys and values of one forward pass, and the plain dict that carries them to the next.

Main entries: `KVStore` (what attention layers write to and read from), `CacheAddress`.
A halted position keeps the keys and values of its last active loop, so only computed rows are ever stored.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from open_mythos.config import MythosConfig

Entries = dict[str, Tensor]
PlainCache = dict[str, Entries]
Stage = Literal["prelude", "recurrent", "coda"]

_HEADER = "header"
_HALTING = "halting"


class CacheAddress(NamedTuple):
    """Where a layer's keys and values belong; `loop` is 0 outside the recurrent block."""

    stage: Stage
    layer: int
    loop: int = 0

    @property
    def key(self) -> str:
        return f"recurrent.{self.layer}.loop.{self.loop}" if self.stage == "recurrent" else f"{self.stage}.{self.layer}"


STANDALONE = CacheAddress("prelude", 0)
"""The address of an attention layer that is called by itself, outside of a model."""


class KVStore(Protocol):
    """What attention asks of a cache."""

    @property
    def length(self) -> int:
        """Positions stored before this call."""
        ...

    @property
    def reached(self) -> Tensor | None:
        """(batch, 1): how many loops the last of them ran; None if there are none."""
        ...

    def extend(self, address: CacheAddress, new: Entries, active: Tensor | None) -> Entries:
        """Take the call's new keys and values (batch, new, ...) and return all that its queries may see.

        Where `active` (batch, new) is False, the position's entries of its last active loop take the place of `new`.
        """
        ...

    def before(self, address: CacheAddress) -> Entries:
        """What the call's positions have at the loop before that of `address`, (batch, new, ...)."""
        ...


class PassStore:
    """A `KVStore` without a past: within one pass, halted positions keep the entries of their last active loop."""

    length = 0
    reached = None

    def __init__(self) -> None:
        self._latest: dict[tuple[str, int], Entries] = {}

    def state(self) -> dict[tuple[str, int], Entries]:
        """What `restore` needs to bring this moment back."""
        return dict(self._latest)

    def restore(self, state: dict[tuple[str, int], Entries]) -> None:
        """Return to the moment at which `state` was taken, to run a loop again."""
        self._latest = dict(state)

    def extend(self, address: CacheAddress, new: Entries, active: Tensor | None) -> Entries:
        if address.stage != "recurrent":
            return new
        layer = (address.stage, address.layer)
        if active is not None and address.loop > 0:
            before = self._latest[layer]
            new = {name: _where(active, tensor, before[name]) for name, tensor in new.items()}
        self._latest[layer] = new
        return new

    def before(self, address: CacheAddress) -> Entries:
        return self._latest[address.stage, address.layer]


class DictStore:
    """A `KVStore` over a plain dict `{layer key: {name: tensor}}`, written only when the whole pass has succeeded.

    Prelude and coda entries are (batch, seq, ...). Entries of a loop are (rows, ...): the positions active at that
    loop, position-major, so that later calls append. `halting.exit_loops` (seq, batch) says which those are; it is
    absent while no position has stopped before the call's `n_loops`.
    """

    def __init__(self, cache: PlainCache, config: MythosConfig, model_id: int, batch: int, n_loops: Tensor) -> None:
        self._cache, self._model_id, self._n_loops = cache, model_id, n_loops
        self._pass = PassStore()
        self._new: dict[CacheAddress, Entries] = {}
        self._past: dict[int, Entries] = {}
        self.batch = batch
        self.length = 0
        if cache:
            self._check(config)
            self.length = cache[CacheAddress("recurrent", 0).key][next(iter(config.cache_widths))].shape[0] // batch

    def _check(self, config: MythosConfig) -> None:
        header = self._cache.get(_HEADER)
        if header is None or int(header["model_id"]) != self._model_id:
            raise ValueError("kv_cache was filled by another model; pass an empty dict to start a new sequence")
        stored = header["n_loops"]
        if stored.shape[0] != self.batch:
            raise ValueError(f"kv_cache holds a batch of {stored.shape[0]}; input_ids has a batch of {self.batch}")
        if not torch.equal(stored, self._n_loops):
            raise ValueError(
                f"kv_cache was filled with n_loops {stored.tolist()}; this call has {self._n_loops.tolist()}"
            )

    @property
    def reached(self) -> Tensor | None:
        halting = self._cache.get(_HALTING)
        if self.length == 0 or halting is None:
            return self._n_loops.unsqueeze(-1) if self.length else None
        return halting["exit_loops"][-1].unsqueeze(-1)

    def extend(self, address: CacheAddress, new: Entries, active: Tensor | None) -> Entries:
        self._new[address] = new
        merged = self._pass.extend(address, new, active)
        if self.length == 0:
            return merged
        past = self._past_entries(address)
        return {name: torch.cat([past[name], tensor], 1) for name, tensor in merged.items()}

    def before(self, address: CacheAddress) -> Entries:
        return self._pass.before(address)

    def _past_entries(self, address: CacheAddress) -> Entries:
        """(batch, length, ...) as loop `address.loop` sees them: each position's last active loop up to that one."""
        stored = self._cache.get(address.key, {})
        if address.stage != "recurrent":
            return stored
        halting = self._cache.get(_HALTING)
        if address.loop == 0 or halting is None:
            shape = (self.length, self.batch)
            past = {name: rows.view(*shape, *rows.shape[1:]) for name, rows in stored.items()}
        else:  # a loop that no position reached has no rows: what it sees is the loop before
            active = halting["exit_loops"] > address.loop
            past = self._past[address.layer]
            past = {**past, **{name: _scatter_rows(past[name], active, rows) for name, rows in stored.items()}}
        self._past[address.layer] = past
        return {name: tensor.transpose(0, 1) for name, tensor in past.items()}

    def commit(self, exit_loops: Tensor) -> None:
        """Append the pass to the dict; `exit_loops` (batch, new) counts the loops that each position ran."""
        most = int(self._n_loops.max())
        exits = exit_loops.T.to(torch.int32).contiguous()  # position-major, as the rows are
        earlier = self._cache.get(_HALTING, {}).get("exit_loops")
        if earlier is None and bool((exits < most).any()):
            earlier = exits.new_full((self.length, self.batch), most)
        for address, entries in self._new.items():
            if address.stage == "recurrent":
                active = None if earlier is None else exits > address.loop
                entries = {name: _active_rows(tensor, active) for name, tensor in entries.items()}
            stored = self._cache.get(address.key)
            if stored is None:  # a copy: a slice would keep the whole projection it was cut from
                entries = {name: tensor.clone() for name, tensor in entries.items()}
            else:
                join = 0 if address.stage == "recurrent" else 1
                entries = {name: torch.cat([stored[name], tensor], join) for name, tensor in entries.items()}
            self._cache[address.key] = {name: tensor.detach() for name, tensor in entries.items()}
        if earlier is not None:
            self._cache[_HALTING] = {"exit_loops": torch.cat([earlier, exits])}
        self._cache[_HEADER] = {"model_id": torch.tensor([self._model_id]), "n_loops": self._n_loops}


def _where(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where `active` (batch, seq), else `old`; both (batch, seq, ...)."""
    return torch.where(active.view(*active.shape, *[1] * (new.dim() - 2)), new, old)


def _active_rows(tensor: Tensor, active: Tensor | None) -> Tensor:
    """(batch, seq, ...) as position-major rows, only those that `active` (seq, batch) marks."""
    rows = tensor.transpose(0, 1)
    return rows.flatten(0, 1) if active is None else rows[active]


def _scatter_rows(before: Tensor, active: Tensor, rows: Tensor) -> Tensor:
    """`before` (seq, batch, ...) with the positions that `active` (seq, batch) marks taken from `rows`, in order."""
    return before.masked_scatter(active.view(*active.shape, *[1] * (before.dim() - 2)).expand_as(before), rows)
