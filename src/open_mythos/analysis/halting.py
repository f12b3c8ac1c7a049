"""When positions stop.

Main entries: `halting_matrix`, `under_halting`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from open_mythos.model.evaluation import evaluating
from open_mythos.model.mythos import OpenMythos


@dataclass(frozen=True)
class HaltingReport:
    """The loops at which positions stopped in one forward pass, and the halting probabilities if there are any."""

    running: tuple[tuple[float, ...], ...]
    """Loops x positions: the share of sequences whose position runs that loop; loops that nobody runs are left out."""
    probabilities: tuple[tuple[float, ...], ...] | None
    """Loops x positions, the mean over the batch; where all have halted, the probability they halted with. None where
    the model has no halting head."""
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
    """Halting of ids (batch, seq) within `n_loops` loops, by default `max_loop_iters`."""
    with evaluating(model.modules()):
        output = model(ids, n_loops, full_output=True)
    exits, probabilities = output.exit_loops, output.halting_probabilities
    running = exits > torch.arange(int(exits.max()), device=exits.device).view(-1, 1, 1)
    return HaltingReport(
        running=tuple(map(tuple, running.float().mean(1).tolist())),
        probabilities=None if probabilities is None else tuple(map(tuple, probabilities.float().mean(1).tolist())),
        exit_loops=tuple(map(tuple, exits.tolist())),
        n_loops=model.config.max_loop_iters if n_loops is None else n_loops,
    )


def under_halting(model: OpenMythos, halting: Literal["settled", "none"], tolerance: float = 0.1) -> OpenMythos:
    """A copy of the model, in evaluation mode, that halts by another rule, one which has no weights of its own.

    The coda reads each position's last state, where under "act" it reads a weighed mean. `tolerance` is the config's
    `settle_tolerance`, for "settled".
    """
    with torch.random.fork_rng(devices=[]):  # the first weights, soon overwritten, are drawn at random
        copy = OpenMythos(model.config.replace(halting=halting, settle_tolerance=tolerance)).to(model.embed.weight)
    weights = {name: x for name, x in model.state_dict().items() if not name.startswith("recurrent.act.")}
    copy.load_state_dict(weights)
    return copy.eval()
