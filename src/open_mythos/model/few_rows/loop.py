"""What stands around the blocks in a pass over few positions: loops, norms, halting and head.

Main entries: `FewRowsLoop`, `FewRowsNorm`, `FewRowsHalting`, `FewRowsHead`. Called, they take and return tensors
(..., dim) as their modules do; `rows` is the same for arrays (positions, ...).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_mythos.model.arithmetic.compiled import Threads, compiled
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.few_rows.block import FewRowsBlocks
from open_mythos.model.few_rows.layers import add_layers
from open_mythos.model.few_rows.pointwise import adapt, halting_probability, inject, rms_norm
from open_mythos.model.few_rows.products import add_product
from open_mythos.model.halting import ACTHalting
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.rows import Array, Bools, Rows, as_array


class FewRowsLoop:
    """`RecurrentBlock.step` for positions of which none has halted."""

    def __init__(self, recurrent: RecurrentBlock, blocks: FewRowsBlocks) -> None:
        self._blocks, self._embedding, self._adapter = blocks, recurrent.loop_embedding, recurrent.adapter
        self._injection, self._b = recurrent.injection, as_array(recurrent.injection.B)
        dim = len(self._b)
        self._no_embedding, self._no_scale = np.zeros((1, dim), np.float32), np.empty((1, 0), np.float32)
        self._down = self._up = np.empty((0, dim), np.float32)
        if recurrent.adapter is not None:
            self._down, self._up = as_array(recurrent.adapter.down.weight), as_array(recurrent.adapter.up.weight).T

    def __call__(self, h: Tensor, e: Tensor, t: int, context: ForwardContext, index: int | Tensor) -> Tensor:
        """The next state, from the state h and the encoded input e; `index` is t as each sequence counts its loops."""
        return torch.from_numpy(self.rows(_rows(h), _rows(e), t, context, index)).view_as(h)

    def rows(self, h: Array, e: Array, t: int, context: ForwardContext, index: int | Tensor) -> Array:
        a, up = context.constant(self, self._of_weights)
        if isinstance(index, Tensor):
            embedding, scale = self._of_loops(index.view(-1).numpy(), context)
        else:
            embedding, scale = context.constant((self, index), lambda: self._of_loop(index))
        given = self._blocks.given(context, CacheAddress("recurrent", 0, t))
        with self._blocks.threads.lock:
            return _next_state(h, e, a, self._b, embedding, self._down, scale, up, *given)

    def _of_weights(self) -> tuple[Array, Array]:
        """The diagonal of A, and the adapter's up as (rank, dim)."""
        return self._injection.get_A().numpy(), np.ascontiguousarray(self._up)

    def _of_loops(self, loops: Rows, context: ForwardContext) -> tuple[Array, Array]:
        """`_of_loop` of each position's loop."""
        n = 1 << int(loops.max()).bit_length()  # more than is asked for, so that few tables are made
        tables = context.constant((self, "loops", n), lambda: self._of_loop(torch.arange(n).view(n, 1, 1)))
        embedding, scale = (table if len(table) == 1 else table[loops] for table in tables)
        return embedding, scale

    def _of_loop(self, index: int | Tensor) -> tuple[Array, Array]:
        """The embedding of a loop and the scale of its adapter, for all positions or for each."""
        embedding = self._no_embedding if self._embedding is None else _rows(self._embedding(index))
        return embedding, self._no_scale if self._adapter is None else _rows(self._adapter.scale(index))


@compiled
def _next_state(
    h: Array,
    e: Array,
    a: Array,
    b: Array,
    embedding: Array,
    down: Array,
    scale: Array,
    up: Array,
    rotations: Array,
    layers: Any,
    entries: Rows,
    rows: Rows,
    counts: Rows,
    wanted: Rows,
    threads: int,
) -> Array:
    """A whole loop in one call: to call a compiled function takes as long as what stands around the blocks."""
    u = np.empty_like(h)
    inject(h, e, a, b, embedding, u)
    x = u.copy()
    add_layers(x, rotations, layers, entries, rows, counts, wanted, threads)
    if down.shape[0]:
        adapt(x, u, down, scale, up, threads)
    return x


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

    def weigh(self, h: Array, threshold: float, lines: Rows, stops: Bools, mass: Array, output: Array) -> None:
        """Add states h (n, dim) to some `lines` (n,) of the output, each with its weight, as `ACTAccumulator` does.

        `mass` is the sum of each line's weights so far. Set `stops` (n,) where it ends here, if it is not set before.
        """
        _weigh(h, self._weight, self._bias, self._eps, np.float32(threshold), lines, stops, mass, output)


@compiled
def _weigh(
    h: Array,
    weight: Array,
    bias: Array,
    eps: np.float32,
    threshold: np.float32,
    lines: Rows,
    stops: Bools,
    mass: Array,
    output: Array,
) -> None:
    p = np.empty(h.shape[0], np.float32)
    halting_probability(h, weight, bias, eps, p)
    for i in range(h.shape[0]):
        line, state = lines[i], h[i]
        own = output[line]
        stops[i] |= mass[line] + p[i] >= threshold
        share = np.float32(1) - mass[line] if stops[i] else p[i]
        mass[line] += share
        for j in range(state.shape[0]):
            own[j] += share * state[j]


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
