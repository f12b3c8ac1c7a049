"""When positions stop.

Main entry: `halting_matrix`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.model.evaluation import evaluating
from open_mythos.model.mythos import OpenMythos


@dataclass(frozen=True)
class HaltingReport:
    """The halting probabilities of one forward pass and the loops at which positions stopped."""

    probabilities: tuple[tuple[float, ...], ...]
    """Loops x positions, the mean over the batch; where all have halted, the probability they halted with."""
    exit_loops: tuple[tuple[int, ...], ...]
    """Sequences x positions: how many loops each position ran."""
    n_loops: int
    """The most that a position may run."""

    @property
    def mean_exit_by_position(self) -> tuple[float, ...]:
        """Mean exit loop of each position over the batch."""
        return tuple(sum(column) / len(column) for column in zip(*self.exit_loops, strict=True))

    @property
    def mean_exit(self) -> float:
        """Mean exit loop over everything; the loops' compute is in proportion to it."""
        exits = self.mean_exit_by_position
        return sum(exits) / len(exits)


@torch.no_grad()
def halting_matrix(model: OpenMythos, ids: Tensor, n_loops: int | None = None) -> HaltingReport:
    """Halting of ids (batch, seq) within `n_loops` loops, by default `max_loop_iters`.

    Raises `ValueError` if the model was built without halting.
    """
    if model.recurrent.act is None:
        raise ValueError(
            f"halting is {model.config.halting!r}; it must be 'act' for a model to have halting probabilities"
        )
    with evaluating(model.modules()):
        output = model(ids, n_loops, full_output=True)
    return HaltingReport(
        probabilities=tuple(map(tuple, output.halting_probabilities.float().mean(1).tolist())),
        exit_loops=tuple(map(tuple, output.exit_loops.tolist())),
        n_loops=model.config.max_loop_iters if n_loops is None else n_loops,
    )
