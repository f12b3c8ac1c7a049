"""What stands before and after the loops, for a few positions, from token ids to logits.

Main entry: `FewRowsEnds`. What a pass does besides its arithmetic takes as long there, if it goes through modules.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from open_mythos.config import MythosConfig
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.few_rows.block import FewRowsBlocks
from open_mythos.model.few_rows.loop import FewRowsHead, FewRowsNorm
from open_mythos.model.rows import Array, Rows


class FewRowsEnds(NamedTuple):
    """`encode` and `decode` of a model in evaluation mode."""

    config: MythosConfig
    embedding: Array
    prelude: FewRowsBlocks
    prelude_norm: FewRowsNorm
    coda: FewRowsBlocks
    norm: FewRowsNorm
    head: FewRowsHead

    def encode(self, ids: Rows, context: ForwardContext) -> Array:
        """Encoded inputs (n, dim) of token ids (n,)."""
        x = self.embedding[ids]
        x *= np.float32(self.config.dim**0.5)
        self.prelude.add_to(x, context, CacheAddress("prelude", 0))
        return self.prelude_norm.rows(x)

    def decode(self, h: Array, context: ForwardContext, wanted: Rows | None = None) -> Array:
        """Logits (wanted, vocab_size) of states h (n, dim), which are changed; of all where none are `wanted`."""
        self.coda.add_to(h, context, CacheAddress("coda", 0), wanted)
        return self.head.rows(self.norm.rows(h if wanted is None else h[wanted]))
