"""What stands around the blocks in a pass over few positions: loops, norms, halting and head.

Main entries: `FewRowsLoop`, `FewRowsNorm`, `FewRowsHalting`, `FewRowsHead`. Called, they take and return tensors
(..., dim) as their modules do; `rows` is the same for arrays (positions, ...).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
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
        self._blocks, self._embedding, self._adapter = blocks, recurrent.loop_embedding, recurrent.adapter
        self._injection, self._b = recurrent.injection, as_array(recurrent.injection.B)
        self._no_embedding = np.zeros((1, len(self._b)), np.float32)
        if recurrent.adapter is not None:
            self._down, self._up = as_array(recurrent.adapter.down.weight), as_array(recurrent.adapter.up.weight)

    def __call__(self, h: Tensor, e: Tensor, t: int, context: ForwardContext, index: int | Tensor) -> Tensor:
        """The next state, from the state h and the encoded input e; `index` is t as each sequence counts its loops."""
        return torch.from_numpy(self.rows(_rows(h), _rows(e), t, context, index)).view_as(h)

    def rows(self, h: Array, e: Array, t: int, context: ForwardContext, index: int | Tensor) -> Array:
        a = context.constant(self, lambda: self._injection.get_A().numpy())
        if isinstance(index, Tensor):
            embedding, scale = self._of_loop(index)
        else:
            embedding, scale = context.constant((self, index), lambda: self._of_loop(index))
        u = np.empty_like(h)
        inject(h, e, a, self._b, embedding, u)
        x = u.copy()
        self._blocks.add_to(x, context, CacheAddress("recurrent", 0, t))
        if scale is not None:
            adapt(x, u, self._down, scale, self._up)
        return x

    def _of_loop(self, index: int | Tensor) -> tuple[Array, Array | None]:
        """The embedding of a loop and the scale of its adapter, for all positions or for each."""
        none = self._embedding is None
        embedding = self._no_embedding if none else _rows(self._embedding(index))  # type: ignore[misc]
        return embedding, None if self._adapter is None else _rows(self._adapter.scale(index))


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
