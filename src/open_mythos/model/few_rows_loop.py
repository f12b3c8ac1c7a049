"""What stands around the blocks in a pass over few positions: loops, norms and halting.

Main entries: `FewRowsLoop`, `FewRowsNorm`, `FewRowsHalting`. States are (batch, seq, dim).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from open_mythos.model import kernels
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.depth_adapter import DepthAdapter
from open_mythos.model.few_rows_block import FewRowsBlock
from open_mythos.model.halting import ACTHalting
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.rows import Array, as_array


class FewRowsLoop:
    """`RecurrentBlock.step` for positions of which none has halted."""

    def __init__(self, recurrent: RecurrentBlock, blocks: list[FewRowsBlock]) -> None:
        self._recurrent, self._blocks = recurrent, blocks
        self._adapter = None if recurrent.adapter is None else _Adapter(recurrent.adapter)

    def __call__(self, h: Tensor, e: Tensor, t: int, context: ForwardContext, index: int | Tensor) -> Tensor:
        """The next state, from the state h and the encoded input e; `index` is t as each sequence counts its loops."""
        injection, embedding = self._recurrent.injection, self._recurrent.loop_embedding
        u, a = torch.empty_like(h), context.constant(injection, injection.get_A)
        kernels.inject(_rows(h), _rows(e), as_array(a), as_array(injection.B), _rows(u))
        if embedding is not None:
            u += embedding(index)
        x = u.clone()
        for layer, block in enumerate(self._blocks):
            block.add_to(x, context, CacheAddress("recurrent", layer, t))
        if self._adapter is not None:
            self._adapter.add_to(_rows(x), _rows(u), index, context)
        return x


class _Adapter:
    """A `DepthAdapter`."""

    def __init__(self, adapter: DepthAdapter) -> None:
        self._adapter = adapter
        self._down, self._up = as_array(adapter.down.weight), as_array(adapter.up.weight)

    def add_to(self, x: Array, u: Array, index: int | Tensor, context: ForwardContext) -> None:
        """Add to x (n, dim) what the adapter makes of the branches x - u, in place."""
        scale = self._adapter.scale_in(context, index)
        kernels.adapt(x, u, self._down, as_array(scale.view(-1, scale.shape[-1])), self._up)


class FewRowsNorm:
    """An `RMSNorm`."""

    def __init__(self, norm: RMSNorm) -> None:
        self._gain, self._eps = as_array(norm.weight), np.float32(norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """x, normalised."""
        out = torch.empty_like(x)
        kernels.rms_norm(_rows(x), self._gain, self._eps, _rows(out))
        return out


class FewRowsHalting:
    """An `ACTHalting`."""

    def __init__(self, act: ACTHalting) -> None:
        self._weight, self._bias = as_array(act.halt.weight), as_array(act.halt.bias)
        self._eps = np.float32(act.eps)

    def __call__(self, h: Tensor) -> Tensor:
        """Halting probabilities of the state h, without its last dimension."""
        out = h.new_empty(h.shape[:-1])
        kernels.halting_probability(_rows(h), self._weight, self._bias, self._eps, out.view(-1).numpy())
        return out


def _rows(x: Tensor) -> Array:
    return as_array(x.contiguous().view(-1, x.shape[-1]))
