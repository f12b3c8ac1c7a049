"""A whole pass over one position of one sequence, which is what decoding consists of.

Main entry: `FewRowsToken`. What a pass does besides its arithmetic takes as long there, if it goes through modules.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.few_rows.block import FewRowsBlocks
from open_mythos.model.few_rows.loop import FewRowsHalting, FewRowsHead, FewRowsLoop, FewRowsNorm
from open_mythos.model.rows import Array


class FewRowsToken(NamedTuple):
    """`encode`, the loops and `decode` of a model in evaluation mode, whose halting is "act" or "none"."""

    config: MythosConfig
    embedding: Array
    prelude: FewRowsBlocks
    prelude_norm: FewRowsNorm
    loop: FewRowsLoop
    halting: FewRowsHalting | None
    coda: FewRowsBlocks
    norm: FewRowsNorm
    head: FewRowsHead

    def run(self, token: int, n_loops: int, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Logits (1, 1, vocab_size) after a token, and how many loops it ran, (1, 1)."""
        x = self.embedding[token : token + 1] * np.float32(self.config.dim**0.5)
        self.prelude.add_to(x, context, CacheAddress("prelude", 0))
        x, exit_loop = self._loops(self.prelude_norm.rows(x), n_loops, context)
        self.coda.add_to(x, context, CacheAddress("coda", 0))
        logits = self.head.rows(self.norm.rows(x))
        return torch.from_numpy(logits).unsqueeze(0), torch.full((1, 1), exit_loop, dtype=torch.int32)

    def _loops(self, e: Array, n_loops: int, context: ForwardContext) -> tuple[Array, int]:
        """The state for the coda and the loops that it took."""
        h = e if self.config.state_init == "input" else np.zeros_like(e)
        output, mass, threshold = np.zeros_like(e), np.zeros(1, np.float32), self.config.act_threshold
        line, stops = np.zeros(1, np.int64), np.zeros(1, np.bool_)
        for t in range(n_loops):
            h = self.loop.rows(h, e, t, context, t)
            if self.halting is not None:
                stops[0] = t + 1 == n_loops
                self.halting.weigh(h, threshold, line, stops, mass, output)
                if stops[0]:
                    return output, t + 1
        return h, n_loops
