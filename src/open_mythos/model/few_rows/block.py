"""Blocks for a few positions, of one sequence or of several.

Main entry: `FewRowsBlocks`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.few_rows.compiled import Threads
from open_mythos.model.few_rows.layers import Layer, add_layers, table
from open_mythos.model.rows import Array


class FewRowsBlocks:
    """What the blocks of a stage, one or several in a row, compute for positions that have not halted.

    Float32 on a CPU only: everything else is better served by `Block`.
    """

    def __init__(self, layers: Sequence[Layer], threads: Threads) -> None:
        self._layers, self._threads, self._window = layers, threads, layers[0].window
        self._table = table(layers)

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """(batch, seq, dim) to the same shape."""
        out = x.clone(memory_format=torch.contiguous_format)
        self.add_to(out.view(-1, x.shape[-1]).numpy(), context, address)
        return out

    def add_to(self, stream: Array, context: ForwardContext, first: CacheAddress) -> None:
        """Add to the stream (positions, dim) what the blocks add to it, in place; the first one is at `first`."""
        seen = context.seen(first, len(self._table), self._window)
        with self._threads.lock:
            add_layers(stream, context.rotations, self._table, *seen, self._threads.n)
