"""What all layers of one forward pass share: positions, masks, and where keys and values go.

Main entry: `ForwardContext`. It belongs to one pass; nothing in it outlives the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.cache import CacheAddress, KVStore, PassStore
from open_mythos.model.mask import AttentionMask
from open_mythos.model.rope import RotaryTable, rotary_table


class Injected(NamedTuple):
    """What the injection computes once per pass: the diagonal of A and `B*e`, for this encoded input e."""

    e: Tensor
    a: Tensor
    be: Tensor


class ForwardContext:
    """Rotary table, attention masks and key-value store of `n_new` positions after `store.length` earlier ones."""

    def __init__(
        self,
        config: MythosConfig,
        n_new: int,
        device: torch.device,
        dtype: torch.dtype,
        store: KVStore | None = None,
    ) -> None:
        self.store: KVStore = store if store is not None else PassStore()
        self.n_new, self.device, self.dtype = n_new, device, dtype
        self.expert_load: dict[CacheAddress, Tensor] | None = None
        """Slots per expert at each address, filled by the layers if it is a dict; None where nobody asks."""
        self.injected: Injected | None = None
        self.rotary: RotaryTable | None = None
        if config.use_rope:
            positions = torch.arange(self.store.length, self.store.length + n_new, device=device)
            width = config.qk_rope_head_dim if config.attn_type == "mla" else config.head_dim
            self.rotary = rotary_table(positions, width, config.rotary_base, dtype)
        self._masks: dict[int | None, AttentionMask] = {}

    def mask(self, window: int | None) -> AttentionMask:
        """The mask of a layer with this window, built once per pass."""
        if window not in self._masks:
            n_keys = self.store.length + self.n_new
            self._masks[window] = AttentionMask(self.n_new, n_keys, window, self.device, self.dtype)
        return self._masks[window]

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
