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
from open_mythos.model.few_rows.loop import FewRowsHead, FewRowsLoop, FewRowsNorm
from open_mythos.model.rows import Array, Progress

_LINE = np.zeros(1, np.int64)

_LOOPS_AT_ONCE = 4
"""In one call, up to as many as the token before has run: for what is not run after all, room was made in vain."""


class FewRowsToken(NamedTuple):
    """`encode`, the loops and `decode` of a model in evaluation mode, whose halting is "act" or "none"."""

    config: MythosConfig
    embedding: Array
    prelude: FewRowsBlocks
    prelude_norm: FewRowsNorm
    loop: FewRowsLoop
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
        h = e.copy() if self.config.state_init == "input" else np.zeros_like(e)
        output, mass, stops = np.zeros_like(e), np.zeros(1, np.float32), np.zeros(1, np.bool_)
        t, expected = 0, 1 if context.store.reached is None else int(context.store.reached)
        while not stops[0]:
            left, at_once = n_loops - t, max(1, min(_LOOPS_AT_ONCE, expected - t))
            progress = Progress(_LINE, mass, output, stops, np.array([left]))
            t += self.loop.run(h, e, t, min(at_once, left), context, np.array([t]), progress)
        return output if self.config.halting == "act" else h, t
