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
            Block(config, window=config.window, moe=config.n_experts > 0) for _ in range(config.recurrent_layers)
        )
        self.loop_embedding = LoopEmbedding(config.dim) if config.loop_embedding else None
        self.adapter = DepthAdapter(config.dim, config.lora_rank) if config.lora_rank else None
        self.act = ACTHalting(config.dim, config.norm_eps) if config.halting == "act" else None

    @property
    def block(self) -> Block:
        """The first layer of the recurrent block, the only one unless `recurrent_layers` says otherwise."""
        return self.blocks[0]  # type: ignore[return-value]

    def initial_state(self, e: Tensor) -> Tensor:
        """The state before the first loop, of e's shape."""
        if self.config.state_init == "input":
            return e
        h = torch.zeros_like(e)
        if self.config.state_init == "normal":
            nn.init.trunc_normal_(h, std=0.4**0.5, a=-2.0, b=2.0)  # the standard deviation of Huginn, arXiv 2502.05171
        return h

    def step(self, h: Tensor, e: Tensor, t: int, context: ForwardContext, active: Tensor | None = None) -> Tensor:
        """Loop t: the next state from the state h and the encoded input e, all (batch, seq, dim).

        Where `active` (batch, seq) is False the position has halted, and its state stays as it is.
        """
        u = self.injection(h, e)
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
        most = int(n_loops.max())
        budget = n_loops.to(e.device).unsqueeze(-1).expand(e.shape[:2])
        h = self.initial_state(e)
        if self.act is None:
            uniform = bool((n_loops == most).all())
            for t in range(most):
                h = self.step(h, e, t, context, None if uniform else budget > t)
            return LoopResult(h, budget, e.new_zeros(()), None)
        halting = ACTAccumulator(self.config.act_threshold, budget)
        probabilities: list[Tensor] = []
        for t in range(most):
            h = self.step(h, e, t, context, halting.active if t > 0 else None)
            p = self.act(h)
            halting.update(h, p, t)
            if keep_probabilities:
                probabilities.append(p)
            if not self.training and not bool(halting.active.any()):
                break
        assert halting.output is not None
        stacked = torch.stack(probabilities) if keep_probabilities else None
        return LoopResult(halting.output, halting.exit_loops, halting.ponder_cost, stacked)
