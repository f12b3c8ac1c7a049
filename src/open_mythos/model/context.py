"""What all layers of one forward pass share: positions, masks, and where keys and values go.

Main entry: `ForwardContext`. It belongs to one pass; nothing in it outlives the call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.cache import CacheAddress, Entries, KVStore, PassStore
from open_mythos.model.mask import AttentionMask
from open_mythos.model.rope import RotaryTable, rotary_table, rotations
from open_mythos.model.rows import Array, Rows, Seen
from open_mythos.model.sequence_store import SequenceStore

T = TypeVar("T")


class Injected:
    """What the injection computes once per pass: the diagonal of A and `B*e`, for this encoded input e."""

    def __init__(self, e: Tensor, a: Tensor, b: Tensor) -> None:
        self.e, self.a, self._b = e, a, b
        self._be: Tensor | None = None

    def be(self) -> Tensor:
        """`B*e`, computed when first asked for."""
        if self._be is None:
            self._be = self._b * self.e
        return self._be


class Halting(NamedTuple):
    """A loop's new state and the probabilities that positions halt with it, (batch, seq), where it gave both."""

    state: Tensor
    probabilities: Tensor


Visible = Callable[[tuple[Tensor, ...], Entries, AttentionMask], Tensor]
"""What attention is, given queries (batch, queries, ...), entries (batch, keys, ...), and who of them sees whom."""

Constants = dict[Hashable, Any]
"""What follows from config and weights alone, by what it is."""

StandIn = Callable[..., Tensor]
"""What computes a module's output, or a loop of the recurrent block, in its place."""


class WholeLayers(Protocol):
    """Finds what computes layers, and what stands around them, over whole sequences."""

    def layer(self, block: Any, x: Tensor, context: ForwardContext) -> StandIn | None:
        """What computes the block's output for x, its entries and its experts' load; None if the block has to."""
        ...

    def stage(self, blocks: Any, norm: Any, x: Tensor, context: ForwardContext) -> StandIn | None:
        """The same for several blocks and a norm after them."""
        ...

    def loop(self, recurrent: Any, h: Tensor, e: Tensor, context: ForwardContext) -> StandIn | None:
        """The same for a loop, from the state h and the encoded input e; it leaves `halting` with the context."""
        ...


# Rotations of so many positions are computed together: about as fast as those of a single one.
_AT_A_TIME = 64


class ForwardContext:
    """Rotary table, attention masks and key-value store of `n_new` positions after `store.length` earlier ones."""

    def __init__(
        self,
        config: MythosConfig,
        n_new: int,
        device: torch.device,
        dtype: torch.dtype,
        store: KVStore | None = None,
        constants: Constants | None = None,
    ) -> None:
        """Passes that share `constants` must not change the weights between them."""
        self.store: KVStore = store if store is not None else PassStore()
        self.n_new, self.device, self.dtype = n_new, device, dtype
        self.expert_load: dict[CacheAddress, Tensor] | None = None
        """Slots per expert at each address, filled by the layers if it is a dict; None where nobody asks."""
        self.stand_ins: Mapping[nn.Module, StandIn] = {}
        """In a pass over few positions: what stands in for a module."""
        self.whole_layers: WholeLayers | None = None
        """In a pass over whole sequences: what finds a stand-in for layers and loops."""
        self.injected: Injected | None = None
        """What the loops of this pass share, once one has begun."""
        self.halting: Halting | None = None
        """What the last loop found, if what computed it finds halting probabilities, too."""
        self.config = config
        self.constants = {} if constants is None else constants
        self._masks: dict[int | None, AttentionMask] = {}

    @property
    def longest(self) -> int:
        """How many keys the position sees that sees most of them."""
        n_keys, outer, loop = self.store.length + self.n_new, self.config.outer_reach, self.config.loop_reach
        return n_keys if outer is None or loop is None else min(n_keys, max(outer, loop))

    @cached_property
    def rotary(self) -> RotaryTable | None:
        """Rotations of the new positions; None in a model without rotary positions."""
        return self._rotary_at(torch.arange(self.store.length, self.store.length + self.n_new, device=self.device))

    def _rotary_at(self, positions: Tensor) -> RotaryTable | None:
        config = self.config
        if not config.use_rope:
            return None
        return rotary_table(positions, config.rotary_dim, config.rotary_base, self.dtype, config.rotary_heads)

    def seen(self, first: CacheAddress, n_layers: int, window: int | None, n_loops: int = 1) -> Seen:
        """Where some layers are to store the new positions, and what each of these sees, itself the last.

        In one loop, or in several from that of the first address on.
        """
        assert isinstance(self.store, SequenceStore), "other stores know no rows"
        return self.store.seen(first, n_layers, self.n_new, window, n_loops)

    def leave_out(self, first: CacheAddress, n_layers: int, n_loops: int) -> None:
        """The new positions do not run some of the loops that `seen` was asked for, those from the first address on."""
        assert isinstance(self.store, SequenceStore), "other stores know no rows"
        self.store.leave_out(first, n_layers, n_loops)

    @cached_property
    def rotations(self) -> Array:
        """Cosines and sines of the new positions, (n_new, dim); (1, 0) without rotary positions."""
        table, start = divmod(self.store.length, _AT_A_TIME)
        end = start + self.n_new
        if end > _AT_A_TIME or not self.config.use_rope:
            return self._rotations_at(np.arange(self.store.length, self.store.length + self.n_new))
        positions = np.arange(table * _AT_A_TIME, (table + 1) * _AT_A_TIME)
        return self.constant(("rotations", table), lambda: self._rotations_at(positions))[start:end]

    def _rotations_at(self, positions: Rows) -> Array:
        config = self.config
        if not config.use_rope:
            return np.empty((1, 0), np.float32)
        return rotations(positions, config.rotary_dim, config.rotary_base)

    def layer(self, module: nn.Module) -> StandIn:
        """The module, or what stands in for it."""
        return self.stand_ins.get(module, module)

    def whole_layer(self, block: nn.Module, x: Tensor) -> StandIn | None:
        """What computes a block's output for x in its place; None if the block has to."""
        return None if self.whole_layers is None else self.whole_layers.layer(block, x, self)

    def whole_stage(self, blocks: nn.ModuleList, norm: nn.Module, x: Tensor) -> StandIn | None:
        """What computes blocks and a norm after them for x in their place; None if they have to."""
        return None if self.whole_layers is None else self.whole_layers.stage(blocks, norm, x, self)

    def whole_loop(self, recurrent: nn.Module, h: Tensor, e: Tensor) -> StandIn | None:
        """What computes a loop from h and e in the recurrent block's place; None if that has to."""
        return None if self.whole_layers is None else self.whole_layers.loop(recurrent, h, e, self)

    def constant(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What follows from config and weights alone; where no gradients are taken, computed once."""
        if torch.is_grad_enabled():
            return compute()
        if key not in self.constants:
            self.constants[key] = compute()
        return self.constants[key]  # type: ignore[no-any-return]

    def mask(self, window: int | None) -> AttentionMask:
        """The mask of a layer with this window, built once per pass."""
        if window not in self._masks:
            n_keys = self.store.length + self.n_new
            self._masks[window] = AttentionMask(self.n_new, n_keys, window, self.device, self.dtype)
        return self._masks[window]

    def attend(
        self,
        address: CacheAddress,
        queries: tuple[Tensor, ...],
        new: Entries,
        active: Tensor | None,
        window: int | None,
        over: Visible,
    ) -> Tensor:
        """What `over` makes of all that the queries may see, once what is `new` (batch, seq, ...) has been stored."""
        return over(queries, self.store.extend(address, new, active), self.mask(window))

    def part(self) -> ForwardContext:
        """One for some sequences of a pass without a past, which loop by themselves."""
        part = ForwardContext(self.config, self.n_new, self.device, self.dtype, constants=self.constants)
        part.whole_layers = self.whole_layers
        part.expert_load = None if self.expert_load is None else {}
        return part

    def add_load(self, part: ForwardContext) -> None:
        """Count the slots that experts received from a part of the sequences."""
        if self.expert_load is not None and part.expert_load is not None:
            for address, load in part.expert_load.items():
                self.expert_load[address] = self.expert_load.get(address, 0) + load

    def stacked_load(self) -> Tensor | None:
        """`expert_load` as one tensor, (loops, layers, experts); None where nobody asked or there are no experts."""
        if not self.expert_load:
            return None
        n_layers = 1 + max(address.layer for address in self.expert_load)
        n_loops = len(self.expert_load) // n_layers
        rows = [
            torch.stack([self.expert_load[CacheAddress("recurrent", layer, t)] for layer in range(n_layers)])
            for t in range(n_loops)
        ]
        return torch.stack(rows)
