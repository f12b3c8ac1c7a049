"""Which keys a query may see: the causal past, or a sliding window of it.

Main entries: `AttentionMask`; `OwnMasks` where every sequence has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Queries that a cut leaves together: with fewer, the kernel's own blocks are not full.
_RUN = 64


@dataclass(frozen=True)
class AttentionMask:
    """The last `n_queries` of `n_keys` positions look back, each at itself and at most `window - 1` before it."""

    n_queries: int
    n_keys: int
    window: int | None
    device: torch.device
    dtype: torch.dtype

    @property
    def first_key(self) -> int:
        """The oldest key that any query sees; older ones need not be read at all."""
        if self.window is None:
            return 0
        return max(0, self.n_keys - self.n_queries - self.window + 1)

    @property
    def is_causal_square(self) -> bool:
        """True for the plain lower triangle, which kernels have a fast path for."""
        return self.n_queries == self.n_keys and (self.window is None or self.window >= self.n_keys)

    @property
    def causal_or_bias(self) -> tuple[bool, Tensor | None]:
        """The mask as kernels take it: a flag where it is the plain triangle, else what to add to the scores."""
        return (True, None) if self.is_causal_square else (False, self.bias)

    @cached_property
    def parts(self) -> list[tuple[slice, slice, AttentionMask]]:
        """The mask cut into runs of queries: which queries, which of the keys from `first_key` on, and their mask.

        A run reads no key that none of its queries sees; it is only cut where that leaves out half of them or more.
        """
        seen = self.n_keys - self.first_key
        if self.window is None or seen < 2 * (self.window + _RUN):
            return [(slice(None), slice(None), self)]
        past = self.n_keys - self.n_queries
        parts = []
        for start in range(0, self.n_queries, _RUN):
            end = min(start + _RUN, self.n_queries)
            part = AttentionMask(end - start, past + end, self.window, self.device, self.dtype)
            keys = slice(part.first_key - self.first_key, past + end - self.first_key)
            parts.append((slice(start, end), keys, part))
        return parts

    @cached_property
    def bias(self) -> Tensor | None:
        """(n_queries, n_keys - first_key): 0 where visible, -inf where not; None if everything is visible."""
        if self.n_queries == 1:
            return None
        keys = torch.arange(self.first_key, self.n_keys, device=self.device)
        queries = torch.arange(self.n_keys - self.n_queries, self.n_keys, device=self.device).unsqueeze(-1)
        hidden = keys > queries
        if self.window is not None:
            hidden = hidden | (keys <= queries - self.window)
        return torch.zeros(hidden.shape, device=self.device, dtype=self.dtype).masked_fill_(hidden, float("-inf"))


@dataclass(frozen=True)
class OwnMasks(AttentionMask):
    """A mask of its own for every sequence of the batch."""

    visible: Tensor
    """(batch, queries, keys)."""

    @property
    def is_causal_square(self) -> bool:
        """Never taken for granted."""
        return False

    @cached_property
    def bias(self) -> Tensor | None:
        """(batch, queries, keys); (queries, keys) for a single sequence."""
        bias = torch.zeros(self.visible.shape, dtype=self.dtype, device=self.device)
        bias = bias.masked_fill_(~self.visible, float("-inf"))
        return bias[0] if len(bias) == 1 else bias

    @property
    def causal_or_bias(self) -> tuple[bool, Tensor | None]:
        """Kernels take a mask of every sequence's own with a dimension for the heads."""
        bias = self.bias
        return False, bias if bias is None or bias.dim() == 2 else bias.unsqueeze(1)
