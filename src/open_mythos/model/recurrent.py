"""The recurrent block: one set of weights, run `n_loops` times, each position until it halts.

Main entry: `RecurrentBlock`. One loop is `h' = u + F(u)` with `u = A*h + B*e`, F the sum of the layers' branches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.block import Block
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.depth_adapter import DepthAdapter, LoopEmbedding
from open_mythos.model.halting import ACTAccumulator, ACTHalting
from open_mythos.model.injection import LTIInjection


class LoopResult(NamedTuple):
    """What the loops leave: the state for the coda, and how each position got there."""

    state: Tensor
    exit_loops: Tensor
    ponder_cost: Tensor
    halting_probabilities: Tensor | None


class RecurrentBlock(nn.Module):
    """The looped stage of the model."""

    def __init__(self, config: MythosConfig) -> None:
        super().__init__()
        self.config = config
        self.injection = LTIInjection(config.dim)
        self.blocks = nn.ModuleList(
            Block(config, window=config.loop_reach, moe=config.n_experts > 0) for _ in range(config.recurrent_layers)
        )
        self.loop_embedding = LoopEmbedding(config.dim) if config.loop_embedding else None
        self.adapter = DepthAdapter(config.dim, config.lora_rank) if config.lora_rank else None
        self.act = ACTHalting(config.dim, config.norm_eps) if config.halting == "act" else None

    @property
    def block(self) -> Block:
        """The first layer of the recurrent block, the only one unless `recurrent_layers` says otherwise."""
        return self.blocks[0]  # type: ignore[return-value]

    def initial_state(self, e: Tensor) -> Tensor:
        """The state before the first loop, of e's shape.

        Noise is meant to teach the loop to reach its answer from anywhere (path independence, Anil et al. 2022, arXiv
        2211.09961). Its size is drawn per sequence from 0 to 1, so that the zeros of inference are among what was
        trained. On parity it did not help on every seed (docs/experiments.md).
        """
        if self.config.state_init == "input":
            return e
        if self.config.state_init == "noise" and self.training:
            return torch.randn_like(e) * torch.rand(e.shape[0], 1, 1, device=e.device, dtype=e.dtype)
        return torch.zeros_like(e)

    def step(self, h: Tensor, e: Tensor, t: int, context: ForwardContext, active: Tensor | None = None) -> Tensor:
        """Loop t: the next state from the state h and the encoded input e, all (batch, seq, dim).

        Where `active` (batch, seq) is False the position has halted, and its state stays as it is.
        """
        u = self.injection(h, e, context)
        if self.loop_embedding is not None:
            u = u + self.loop_embedding(t)
        x = u
        for layer, block in enumerate(self.blocks):
            x = block(x, context, CacheAddress("recurrent", layer, t), active)
        if self.adapter is not None:
            x = x + self.adapter(x - u, t)
        return x if active is None else torch.where(active.unsqueeze(-1), x, h)

    def forward(
        self, e: Tensor, n_loops: Tensor, context: ForwardContext, *, keep_probabilities: bool = False
    ) -> LoopResult:
        """Run at most `n_loops` (batch,) loops, a tensor on the CPU, from the encoded input e (batch, seq, dim).

        Out of training, the loops end as soon as no position is active.
        """
        h = self.initial_state(e)
        halting = ACTAccumulator(self.config.act_threshold, n_loops, e)
        if self.act is None:
            for t in range(halting.most):
                h = self.step(h, e, t, context, None if t < halting.fewest else halting.budget > t)
            return LoopResult(h, halting.budget, e.new_zeros(()), None)
        probabilities: list[Tensor] = []
        for t in range(halting.most):
            h = self.step(h, e, t, context, halting.active)
            p = self.act(h)
            halting.update(h, p, t)
            if keep_probabilities:
                probabilities.append(p)
            if not self.training and halting.finished:
                break
        stacked = torch.stack(probabilities) if keep_probabilities else None
        return LoopResult(halting.output, halting.exit_loops, halting.ponder_cost, stacked)
