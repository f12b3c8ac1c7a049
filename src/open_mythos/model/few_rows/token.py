"""A whole pass over one position of one sequence, which is what decoding consists of.

Main entry: `FewRowsToken`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_mythos.model.context import ForwardContext
from open_mythos.model.few_rows.ends import FewRowsEnds
from open_mythos.model.few_rows.loop import FewRowsLoop
from open_mythos.model.rows import Array, Progress

_LINE = np.zeros(1, np.int64)

_LOOPS_AT_ONCE = 4
"""In one call, up to as many as the token before has run: for what is not run after all, room was made in vain."""


class FewRowsToken(NamedTuple):
    """A pass of a model in evaluation mode, whose halting is "act" or "none"."""

    ends: FewRowsEnds
    loop: FewRowsLoop

    def run(self, token: int, n_loops: int, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Logits (1, 1, vocab_size) after a token, and how many loops it ran, (1, 1)."""
        e = self.ends.encode(np.array([token]), context)
        state, exit_loop = self._loops(e, n_loops, context)
        logits = self.ends.decode(state, context)
        return torch.from_numpy(logits).unsqueeze(0), torch.full((1, 1), exit_loop, dtype=torch.int32)

    def _loops(self, e: Array, n_loops: int, context: ForwardContext) -> tuple[Array, int]:
        """The state for the coda and the loops that it took."""
        config = self.ends.config
        h = e.copy() if config.state_init == "input" else np.zeros_like(e)
        output, mass, stops = np.zeros_like(e), np.zeros(1, np.float32), np.zeros(1, np.bool_)
        t, expected = 0, 1 if context.store.reached is None else int(context.store.reached)
        while not stops[0]:
            left, at_once = n_loops - t, max(1, min(_LOOPS_AT_ONCE, expected - t))
            progress = Progress(_LINE, mass, output, stops, np.array([left]))
            t += self.loop.run(h, e, t, min(at_once, left), context, np.array([t]), progress)
        return output if config.halting == "act" else h, t
