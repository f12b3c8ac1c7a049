"""What stands around the blocks in a pass over few positions: loops, norms, halting and head.

Main entries: `FewRowsLoop`, `FewRowsNorm`, `FewRowsHalting`, `FewRowsHead`. Called, they take and return tensors
(..., dim) as their modules do; `rows` is the same for arrays (positions, ...).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from open_mythos.model.arithmetic.compiled import Threads, compiled
from open_mythos.model.arithmetic.vectors import copied
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.few_rows.block import FewRowsBlocks
from open_mythos.model.few_rows.layers import add_layers
from open_mythos.model.few_rows.pointwise import adapt, halting_probability, inject, rms_norm
from open_mythos.model.few_rows.products import multiply
from open_mythos.model.halting import ACTHalting
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.rows import Array, Bools, Progress, Rows, as_array


class _Halting(NamedTuple):
    """What compiled functions are given of halting; without a weight nobody halts."""

    weight: Array
    bias: Array
    eps: np.float32
    threshold: np.float32


_NEVER = _Halting(np.empty((0, 1), np.float32), np.empty(0, np.float32), np.float32(0), np.float32(1))
_NO_STATES = np.empty((0, 1), np.float32)
_NOWHERE = Progress(
    np.empty(0, np.int64), np.empty(0, np.float32), _NO_STATES, np.empty(0, np.bool_), np.empty(0, np.int64)
)


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
        self._halting = _NEVER
        if recurrent.act is not None:
            self._halting = _Halting(*FewRowsHalting(recurrent.act).given, np.float32(recurrent.config.act_threshold))

    def __call__(self, h: Tensor, e: Tensor, t: int, context: ForwardContext, index: int | Tensor) -> Tensor:
        """The next state, from the state h and the encoded input e; `index` is t as each sequence counts its loops."""
        after = h.clone(memory_format=torch.contiguous_format)
        loops = index.view(-1).numpy() if isinstance(index, Tensor) else np.array([index])
        self.run(_rows(after), _rows(e), t, 1, context, loops)
        return after

    def run(
        self,
        h: Array,
        e: Array,
        t: int,
        n_loops: int,
        context: ForwardContext,
        loops: Rows,
        progress: Progress | None = None,
    ) -> int:
        """Up to `n_loops` loops of states h (n, dim), in place, from loop t on; how many: none goes on when one stops.

        `loops`, (n,) or (1,) for all, is t as each position counts its loops. Without `progress`, nobody stops.
        """
        a, up = context.constant(self, self._of_weights)
        embeddings, scales = self._of_loops(max(loops.tolist()) + n_loops, context)
        first = CacheAddress("recurrent", 0, t)
        halting, where = (_NEVER, _NOWHERE) if progress is None else (self._halting, progress)
        blocks = self._blocks.given(context, first, n_loops)
        given = (a, self._b, embeddings, self._down, scales, up, *halting, *where, *blocks)
        with self._blocks.threads.lock:
            n = _run_loops(h, e, loops, n_loops, *given)
        if n < n_loops:
            self._blocks.leave_out(context, first._replace(loop=t + n), n_loops - n)
        return n

    def _of_weights(self) -> tuple[Array, Array]:
        """The diagonal of A, and the adapter's up as (rank, dim)."""
        return self._injection.get_A().numpy(), np.ascontiguousarray(self._up)

    def _of_loops(self, end: int, context: ForwardContext) -> tuple[Array, Array]:
        """Each loop's embedding and its adapter's scale, at least up to loop `end`; one row if all are the same."""
        n = 1 << (end - 1).bit_length()  # more than is asked for, so that few tables are made
        return context.constant((self, n), lambda: self._tables(torch.arange(n).view(n, 1, 1)))

    def _tables(self, loops: Tensor) -> tuple[Array, Array]:
        embeddings = self._no_embedding if self._embedding is None else _rows(self._embedding(loops))
        return embeddings, self._no_scale if self._adapter is None else _rows(self._adapter.scale(loops))


@compiled
def _run_loops(
    h: Array,
    e: Array,
    loops: Rows,
    n_loops: int,
    a: Array,
    b: Array,
    embeddings: Array,
    down: Array,
    scales: Array,
    up: Array,
    halt: Array,
    bias: Array,
    eps: np.float32,
    threshold: np.float32,
    lines: Rows,
    mass: Array,
    output: Array,
    stops: Bools,
    left: Rows,
    rotations: Array,
    layers: Any,
    entries: Rows,
    rows: Rows,
    counts: Rows,
    wanted: Rows,
    threads: int,
) -> int:
    """Loops in one call: to call a compiled function takes as long as what stands around the blocks."""
    u = np.empty_like(h)
    embedding, scale = np.empty((len(loops), h.shape[1]), np.float32), np.empty((len(loops), up.shape[0]), np.float32)
    for k in range(n_loops):
        _of_loop(embeddings, loops, k, embedding)
        inject(h, e, a, b, embedding, u)
        for i in range(len(h)):
            copied(u[i], h[i])
        own_entries, own_rows = entries[k % len(entries)], rows[k % len(rows)]
        add_layers(h, rotations, layers, own_entries, own_rows, counts, wanted, threads)
        if len(down):
            _of_loop(scales, loops, k, scale)
            adapt(h, u, down, scale, up, threads)
        for i in range(len(left)):
            stops[i] = left[i] == k + 1
        if len(halt):
            _weigh(h, halt, bias, eps, threshold, lines, mass, output, stops)
        if stops.any():
            return k + 1
    return n_loops


@compiled
def _of_loop(table: Array, loops: Rows, k: int, out: Array) -> None:
    """What the table has for the loop k after each of `loops`, to `out`; one row is that of every loop."""
    for i in range(len(loops)):
        copied(table[loops[i] + k if len(table) > 1 else 0], out[i])


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

    @property
    def given(self) -> tuple[Array, Array, np.float32]:
        """What compiled functions are given of it."""
        return self._weight, self._bias, self._eps

    def __call__(self, h: Tensor) -> Tensor:
        return torch.from_numpy(self.rows(_rows(h))).view(h.shape[:-1])

    def rows(self, h: Array) -> Array:
        out = np.empty(len(h), np.float32)
        halting_probability(h, *self.given, out)
        return out

    def weigh(self, h: Array, threshold: float, lines: Rows, mass: Array, output: Array, stops: Bools) -> None:
        """Add states h (n, dim) to the output, each with its weight, as `ACTAccumulator` does.

        The rest is as in `Progress`; who is told to stop before does in any case.
        """
        _weigh(h, *self.given, np.float32(threshold), lines, mass, output, stops)


@compiled
def _weigh(
    h: Array,
    weight: Array,
    bias: Array,
    eps: np.float32,
    threshold: np.float32,
    lines: Rows,
    mass: Array,
    output: Array,
    stops: Bools,
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
        logits = np.empty((len(features), len(self._weight)), np.float32)
        with self._threads.lock:
            multiply(features, self._weight, np.float32(1), logits, 0, self._threads.n)
        return logits


def _rows(x: Tensor) -> Array:
    return x.contiguous().view(-1, x.shape[-1]).numpy()  # type: ignore[no-any-return]
