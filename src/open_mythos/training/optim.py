"""Which optimizer moves which parameter, and which of them decay.

Main entry: `build_optimizers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from open_mythos.model.mythos import OpenMythos
from open_mythos.training.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW for everything; or Muon for the blocks' matrices and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 5e-4
    """Peak, for both: Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982)."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.95
    """Muon's."""

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise ValueError(f"kind is {self.kind!r}; it must be 'adamw' or 'muon'")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be a number above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be a number of at least 0")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")


@dataclass(frozen=True)
class Groups:
    """Every parameter of a model, in exactly one of three lists."""

    hidden: list[nn.Parameter]
    """Matrices inside blocks and the depth adapter, those of routed experts apart: Muon's share."""
    outer: list[nn.Parameter]
    """Embedding, head, routers, and the experts' stacked matrices, which Muon does not take. They decay."""
    free: list[nn.Parameter]
    """A, dt, B, gains, sinks, biases, the halting head, and what sets a loop apart. They do not decay."""


def group_parameters(model: OpenMythos) -> Groups:
    """Sort the parameters; a parameter that is shared counts once."""
    groups = Groups([], [], [])
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and not name.endswith(("qk_gain", "act.halt.weight", "loop_embedding.weight"))
        if not matrix:
            groups.free.append(parameter)
        elif parameter.dim() == 2 and not name.startswith(("embed.", "head.")) and not name.endswith("router.weight"):
            groups.hidden.append(parameter)
        else:
            groups.outer.append(parameter)
    sorted_ids = sorted(id(p) for group in (groups.hidden, groups.outer, groups.free) for p in group)
    assert sorted_ids == sorted(id(p) for p in model.parameters()), "every parameter in exactly one group"
    return groups


def build_optimizers(model: OpenMythos, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """One AdamW, and before it a Muon if the config says so."""
    groups, decay = group_parameters(model), config.weight_decay
    decayed = groups.outer if config.kind == "muon" else groups.hidden + groups.outer
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": decay}, {"params": groups.free, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,  # one pass over memory in place of a dozen: a third of the time on a CPU
    )
    if config.kind == "adamw":
        return [adamw]
    muon = Muon(groups.hidden, lr=config.learning_rate, weight_decay=decay, momentum=config.momentum)
    return [muon, adamw]


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Give every group the learning rate."""
    for group in _groups(optimizers):
        group["lr"] = rate


def _groups(optimizers: list[torch.optim.Optimizer]) -> Iterator[dict[str, object]]:
    for optimizer in optimizers:
        yield from optimizer.param_groups
