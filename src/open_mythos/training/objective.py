"""What one micro-batch contributes to the loss and to the figures of a step.

Main entry: `Objective`, the module that training wraps, shards and differentiates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from open_mythos.model.mythos import OpenMythos
from open_mythos.training.depth import LoopPlan
from open_mythos.training.loss import cross_entropy


class Contribution(NamedTuple):
    """Sums over one micro-batch; the first four have gradients."""

    loss: Tensor
    """Cross-entropy over counted tokens, in nats."""
    z: Tensor
    ponder: Tensor
    """Loops run plus remainder, over positions."""
    movement: Tensor
    """How far one loop more would move the last state, mean square over channels, over positions; 0 if nobody asked."""
    right: Tensor
    exit_loops: Tensor
    """Loops run, over positions."""
    state_norm: Tensor
    """Root mean square of the state that the coda was given, over positions."""
    load: Tensor
    """(loops, layers, experts): slots that each routed expert received; without experts, none."""
    a: Tensor
    """(dim,): the diagonal of A; not a sum."""


class Objective(nn.Module):
    """A model and how its loss is computed."""

    def __init__(
        self, model: OpenMythos, *, with_z: bool = False, with_movement: bool = False, recompute: bool = False
    ) -> None:
        super().__init__()
        self.model, self.with_z, self.with_movement, self.recompute = model, with_z, with_movement, recompute

    def forward(self, ids: Tensor, targets: Tensor, plan: LoopPlan) -> Contribution:
        """The sums for ids and targets, both (batch, seq), at the plan's depths."""
        model = self.model
        context = model.context(ids.shape[1])
        context.expert_load = {} if model.config.n_experts else None
        e = model.encode(ids, context)
        how = {"grad_loops": plan.grad_loops, "recompute": self.recompute, "measure_movement": self.with_movement}
        result = model.recurrent(e, plan.n_loops, context, **how)
        features = model.features(result.state, context)
        sums = cross_entropy(features.flatten(0, 1), model.head_weight, targets.flatten(), with_z=self.with_z)
        return Contribution(
            loss=sums.loss,
            z=sums.z,
            ponder=result.ponder_cost * ids.numel(),
            movement=sums.loss.new_zeros(()) if result.movement is None else result.movement * ids.numel(),
            right=sums.right,
            exit_loops=result.exit_loops.sum().float(),
            state_norm=result.state.detach().float().square().mean(-1).sqrt().sum(),
            load=_float(context.stacked_load(), int(plan.n_loops.max()), ids.device),
            a=model.recurrent.injection.get_A().detach().float(),
        )


def _float(load: Tensor | None, n_loops: int, device: torch.device) -> Tensor:
    return torch.zeros(n_loops, 1, 0, device=device) if load is None else load.float()
