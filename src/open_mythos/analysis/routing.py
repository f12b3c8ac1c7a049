"""How evenly the router spreads tokens over experts.

Main entry: `expert_load`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.model.evaluation import evaluating
from open_mythos.model.mythos import OpenMythos


@dataclass(frozen=True)
class ExpertLoad:
    """Slots that each routed expert of one layer received."""

    slots: tuple[int, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all slots, by expert; all 0 if no position was active."""
        total = max(1, sum(self.slots))
        return tuple(slots / total for slots in self.slots)

    @property
    def busiest(self) -> int:
        """The expert with most slots."""
        return self.slots.index(max(self.slots))

    @property
    def imbalance(self) -> float:
        """Load of the busiest expert over the mean load: 1 is even, the number of experts is the worst."""
        return self.shares[self.busiest] * len(self.slots) if sum(self.slots) else 1.0


@dataclass(frozen=True)
class RoutingReport:
    """Expert load of one forward pass, `loops[t][layer]`."""

    loops: tuple[tuple[ExpertLoad, ...], ...]

    @property
    def layers(self) -> tuple[ExpertLoad, ...]:
        """Each layer's load, summed over loops."""
        by_layer = zip(*self.loops, strict=True)
        return tuple(
            ExpertLoad(tuple(map(sum, zip(*(load.slots for load in loads), strict=True)))) for loads in by_layer
        )


@torch.no_grad()
def expert_load(model: OpenMythos, ids: Tensor, n_loops: int | None = None) -> RoutingReport:
    """Load of every routed expert, layer and loop on ids (batch, seq); halted positions are not counted.

    Raises `ValueError` if the model has no experts.
    """
    if model.config.n_experts == 0:
        raise ValueError("n_experts is 0; it must be at least 1 for a model to have an expert load")
    with evaluating(model.modules()):
        load = model(ids, n_loops, full_output=True).expert_load
    return RoutingReport(tuple(tuple(ExpertLoad(tuple(row)) for row in loop) for loop in load.tolist()))
