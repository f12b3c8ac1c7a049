"""Blocks for a few positions, of one sequence or of several.

Main entry: `FewRowsBlocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from open_mythos.model.arithmetic.compiled import Threads, compiled
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.few_rows.layers import Layer, add_layers, table
from open_mythos.model.rows import Array, Rows


class Given(NamedTuple):
    """What `add_layers` is given beside the stream, in its order."""

    rotations: Array
    layers: npt.NDArray[Any]
    entries: Rows
    """For each loop, or once for all, as are the rows; `add_layers` is given those of its own."""
    rows: Rows
    counts: Rows
    wanted: Rows
    threads: int


_ALL = np.empty(0, np.int64)


class FewRowsBlocks:
    """What the blocks of a stage, one or several in a row, compute for positions that have not halted.

    Float32 on a CPU only: everything else is better served by `Block`.
    """

    def __init__(self, layers: Sequence[Layer], threads: Threads) -> None:
        self._layers, self.threads = layers, threads
        self._window = layers[0].window if layers else None
        self._table = table(layers)

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress, wanted: Rows | None = None) -> Tensor:
        """(batch, seq, dim) to the same shape; what is not `wanted`, of all positions, comes out as anything."""
        out = x.clone(memory_format=torch.contiguous_format)
        self.add_to(out.view(-1, x.shape[-1]).numpy(), context, address, wanted)
        return out

    def add_to(self, stream: Array, context: ForwardContext, first: CacheAddress, wanted: Rows | None = None) -> None:
        """Add to the stream (positions, dim) what the blocks add to it, in place; the first one is at `first`."""
        if not self._layers:
            return
        with self.threads.lock:
            _run(stream, *self.given(context, first, wanted=wanted))

    def given(
        self, context: ForwardContext, first: CacheAddress, n_loops: int = 1, wanted: Rows | None = None
    ) -> Given:
        """What `add_layers` is given beside the stream, by loops; the first of the blocks is at `first`."""
        seen = context.seen(first, len(self._table), self._window, n_loops)
        return Given(context.rotations, self._table, *seen, _ALL if wanted is None else wanted, self.threads.n)

    def leave_out(self, context: ForwardContext, first: CacheAddress, n_loops: int) -> None:
        """Some of the loops that `given` was asked for are not run, those from `first` on."""
        context.leave_out(first, len(self._table), n_loops)


@compiled
def _run(
    stream: Array, rotations: Array, layers: Any, entries: Rows, rows: Rows, counts: Rows, wanted: Rows, threads: int
) -> None:
    add_layers(stream, rotations, layers, entries[0], rows[0], counts, wanted, threads)
