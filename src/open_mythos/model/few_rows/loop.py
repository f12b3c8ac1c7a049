"""What stands around the blocks in a pass over few positions: loops, norms, halting and head.

Main entries: `FewRowsLoop`, `FewRowsNorm`, `FewRowsHalting`, `FewRowsHead`. Called, they take and return tensors
(batch, seq, ...) as their modules do; `rows` is the same for arrays (positions, ...).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.depth_adapter import DepthAdapter
from open_mythos.model.few_rows.block import FewRowsBlocks
from open_mythos.model.few_rows.compiled import Threads
from open_mythos.model.few_rows.pointwise import adapt, halting_probability, inject, rms_norm
from open_mythos.model.few_rows.products import add_product
from open_mythos.model.halting import ACTHalting
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.rows import Array, as_array


class FewRowsLoop:
    """`RecurrentBlock.step` for positions of which none has halted."""

    def __init__(self, recurrent: RecurrentBlock, blocks: FewRowsBlocks) -> None:
        self._blocks, self._embedding = blocks, recurrent.loop_embedding
        self._injection, self._b = recurrent.injection, as_array(recurrent.injection.B)
        self._adapter = None if recurrent.adapter is None else _Adapter(recurrent.adapter)

    def __call__(self, h: Tensor, e: Tensor, t: int, context: ForwardContext, index: int | Tensor) -> Tensor:
        """The next state, from the state h and the encoded input e; `index` is t as each sequence counts its loops."""
        return torch.from_numpy(self.rows(_rows(h), _rows(e), t, context, index)).view_as(h)

    def rows(self, h: Array, e: Array, t: int, context: ForwardContext, index: int | Tensor) -> Array:
        a = context.constant(self._injection, self._injection.get_A)
        u = np.empty_like(h)
        inject(h, e, a.numpy(), self._b, u)
        if self._embedding is not None:
            u += self._embedding(index).view(-1, u.shape[1]).numpy()
        x = u.copy()
        self._blocks.add_to(x, context, CacheAddress("recurrent", 0, t))
        if self._adapter is not None:
            self._adapter.add_to(x, u, index, context)
        return x


class _Adapter:
    """A `DepthAdapter`."""

    def __init__(self, adapter: DepthAdapter) -> None:
        self._adapter = adapter
        self._down, self._up = as_array(adapter.down.weight), as_array(adapter.up.weight)

    def add_to(self, x: Array, u: Array, index: int | Tensor, context: ForwardContext) -> None:
        """Add to x (n, dim) what the adapter makes of the branches x - u, in place."""
        scale = self._adapter.scale_in(context, index)
        adapt(x, u, self._down, scale.view(-1, scale.shape[-1]).numpy(), self._up)


class FewRowsNorm:
    """An `RMSNorm`."""

    def __init__(self, norm: RMSNorm) -> None:
        self._gain, self._eps = as_array(norm.weight), np.float32(norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.rows(_rows(x))).view_as(x)

    def rows(self, x: Array) -> Array:
        out = np.empty_like(x)
        rms_norm(x, self._gain, self._eps, out)
        return out


class FewRowsHalting:
    """An `ACTHalting`."""

    def __init__(self, act: ACTHalting) -> None:
        self._weight, self._bias = as_array(act.halt.weight), as_array(act.halt.bias)
        self._eps = np.float32(act.eps)

    def __call__(self, h: Tensor) -> Tensor:
        return torch.from_numpy(self.rows(_rows(h))).view(h.shape[:-1])

    def rows(self, h: Array) -> Array:
        out = np.empty(len(h), np.float32)
        halting_probability(h, self._weight, self._bias, self._eps, out)
        return out


class FewRowsHead:
    """What features are multiplied by: a linear layer without bias, or an embedding."""

    def __init__(self, head: nn.Linear | nn.Embedding, threads: Threads) -> None:
        self._weight, self._threads = as_array(head.weight), threads

    def __call__(self, features: Tensor) -> Tensor:
        return torch.from_numpy(self.rows(_rows(features))).view(*features.shape[:-1], -1)

    def rows(self, features: Array) -> Array:
        logits = np.zeros((len(features), len(self._weight)), np.float32)
        with self._threads.lock:
            add_product(features, self._weight, np.float32(1), logits, self._threads.n)
        return logits


def _rows(x: Tensor) -> Array:
    return x.contiguous().view(-1, x.shape[-1]).numpy()  # type: ignore[no-any-return]
