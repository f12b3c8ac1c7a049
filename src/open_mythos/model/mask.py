"""Which keys a query may see: the causal past, or a sliding window of it.

Main entries: `AttentionMask`; `OwnMasks` where every sequence has its own; `in_reach`.
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
        queries = torch.arange(self.n_keys - self.n_queries, self.n_keys, device=self.device)
        return _bias(in_reach(queries, keys, self.window), self.dtype)


@dataclass(frozen=True)
class OwnMasks(AttentionMask):
    """A mask of its own for every sequence of the batch."""

    own_bias: Tensor
    """(batch, queries, keys): what to add to the scores."""

    @classmethod
    def of(cls, visible: Tensor, dtype: torch.dtype) -> OwnMasks:
        """Those in which queries see the keys that are `visible`, (batch, queries, keys)."""
        _, n_queries, n_keys = visible.shape
        return cls(n_queries, n_keys, None, visible.device, dtype, _bias(visible, dtype))

    @property
    def is_causal_square(self) -> bool:
        """Never taken for granted."""
        return False

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """(batch, queries, keys); (queries, keys) for a single sequence."""
        return self.own_bias[0] if len(self.own_bias) == 1 else self.own_bias

    @property
    def causal_or_bias(self) -> tuple[bool, Tensor | None]:
        """Kernels take a mask of every sequence's own with a dimension for the heads."""
        bias = self.bias
        return False, bias if bias.dim() == 2 else bias.unsqueeze(1)


def in_reach(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """(..., queries, keys): which keys the window of a query reaches, itself the last; both are positions."""
    back = queries.unsqueeze(-1) - keys
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf where not."""
    return torch.zeros(visible.shape, device=visible.device, dtype=dtype).masked_fill(~visible, float("-inf"))
