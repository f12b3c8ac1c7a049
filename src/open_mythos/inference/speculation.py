"""Drafting across depth: few loops guess the next token, all of them verify it.

Main entries: `Speculation`, `settle`. A drafted position's loops are the very loops that verification needs: they go on
where the draft was read, so that no loop is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Speculation:
    """After some loops, or later where others go first, a position's state is read for a guess.

    From that the next position starts.
    """

    loops: int | None = None
    """How many; None is a quarter of the request's `n_loops`, rounded down, at least one."""
    most: int = 8
    """Unverified guesses at a time."""

    def __post_init__(self) -> None:
        if self.loops is not None and self.loops < 1:
            raise ValueError(f"loops is {self.loops}; it must be None or at least 1")
        if self.most < 1:
            raise ValueError(f"most is {self.most}; it must be at least 1")

    def guesses_after(self, n_loops: int) -> int:
        """How many loops a position runs before it is read for a guess, in a request of so many."""
        return max(1, n_loops // 4) if self.loops is None else self.loops


class Draft(NamedTuple):
    """A guess, and the probabilities (vocab_size,) from which it was drawn; None where the likeliest token is taken."""

    token: int
    probabilities: Tensor | None


def settle(draft: Draft, probabilities: Tensor, random: torch.Generator) -> int:
    """A token of the distribution `probabilities` (vocab_size,), which is the draft wherever that is possible.

    Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5): the guess stands with probability
    p / q; otherwise the token is drawn from what p has more than q.
    """
    assert draft.probabilities is not None, "whoever takes the likeliest token need not settle"
    p, q = probabilities[draft.token], draft.probabilities[draft.token]
    if float(torch.rand((), generator=random)) * float(q) < float(p):
        return draft.token
    return int(torch.multinomial((probabilities - draft.probabilities).clamp_min(0), 1, generator=random))
