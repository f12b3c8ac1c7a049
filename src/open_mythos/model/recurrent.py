"""The recurrent block: one set of weights, run `n_loops` times, each position until it halts.

Main entry: `RecurrentBlock`. One loop is `h' = u + F(u)` with `u = A*h + B*e`, F the sum of the layers' branches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from open_mythos.config import MythosConfig
from open_mythos.model.active_context import ActiveContext
from open_mythos.model.block import Block
from open_mythos.model.budget import LoopBudget
from open_mythos.model.cache import CacheAddress, PassStore
from open_mythos.model.context import ForwardContext
from open_mythos.model.depth_adapter import DepthAdapter, LoopEmbedding
from open_mythos.model.halting import ACTAccumulator, ACTHalting, LastState, SettledState
from open_mythos.model.injection import LTIInjection


class LoopResult(NamedTuple):
    """What the loops leave: the state for the coda, and how each position got there."""

    state: Tensor
    exit_loops: Tensor
    ponder_cost: Tensor
    halting_probabilities: Tensor | None
    movement: Tensor | None
    """How far one loop more would move the state of the last loop, mean square over positions and channels; None if not
    asked. With ACT that is not the weighed mean of states that the coda is given, nor is what has halted left alone."""


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
        trained. It helps blocks of two layers, not reliably those of one (docs/experiments.md).
        """
        if self.config.state_init == "input":
            return e
        if self.config.state_init == "noise" and self.training:
            return torch.randn_like(e) * torch.rand(e.shape[0], 1, 1, device=e.device, dtype=e.dtype)
        return torch.zeros_like(e)

    def accumulator(
        self, n_loops: Tensor, e: Tensor, *, end_together: bool = False, reached: Tensor | None = None
    ) -> ACTAccumulator | LastState:
        """What decides when positions stop and weighs their states, for `n_loops` (batch,), a tensor on the CPU.

        `reached` (batch, 1) is how many loops the position before the first one ran, None if there is none.
        """
        budget = LoopBudget(n_loops, e.device, end_together=end_together)
        if self.act is not None:
            return ACTAccumulator(self.config.act_threshold, budget, e)
        if self.config.halting == "settled" and not self.training:
            before = None if reached is None else reached.to(e.device)
            return SettledState(self.config.settle_tolerance, budget, e, before)
        return LastState(budget, e)

    def step(
        self,
        h: Tensor,
        e: Tensor,
        t: int,
        context: ForwardContext,
        active: Tensor | None = None,
        *,
        own_index: int | Tensor | None = None,
    ) -> Tensor:
        """Loop t: the next state from the state h and the encoded input e, all (batch, seq, dim).

        Where `active` (batch, seq) is False the position has halted, and its state stays as it is; out of training it
        is not computed. `own_index` is t as each sequence counts its loops, a tensor (batch, 1, 1) where they did not
        begin together.
        """
        together = not isinstance(own_index, Tensor)
        if active is not None and t > 0 and together and not self.training and ActiveContext.pays(active):
            few = ActiveContext(context, active)
            return few.scatter(self.step(few.gather(h), few.gather(e), t, few), h)
        index = t if own_index is None else own_index
        if active is None and self in context.stand_ins:
            return context.stand_ins[self](h, e, t, context, index)
        whole = None if isinstance(index, Tensor) else context.whole_loop(self, h, e)
        if whole is not None:
            return whole(h, e, t, context, active, index)
        u = self.injection(h, e, context)
        if self.loop_embedding is not None:
            u = u + self.loop_embedding(index)
        x = u
        for layer, block in enumerate(self.blocks):
            x = block(x, context, CacheAddress("recurrent", layer, t), active)
        if self.adapter is not None:
            x = x + self.adapter(x - u, index, context)
        return x if active is None else torch.where(active.unsqueeze(-1), x, h)

    def halting_probabilities(self, h: Tensor, context: ForwardContext) -> Tensor | None:
        """What positions halt with, (batch, seq), given the state h that `step` has just returned; None without ACT."""
        if self.act is None:
            return None
        known = context.halting
        return known.probabilities if known is not None and known.state is h else context.layer(self.act)(h)

    def forward(
        self,
        e: Tensor,
        n_loops: Tensor,
        context: ForwardContext,
        *,
        grad_loops: int | None = None,
        recompute: bool = False,
        keep_probabilities: bool = False,
        measure_movement: bool = False,
    ) -> LoopResult:
        """Run `n_loops` (batch,) loops, a tensor on the CPU, from the encoded input e (batch, seq, dim).

        Gradients flow through each sequence's last `grad_loops` loops, by default through all; sequences with fewer
        loops then begin later, so that all end together and what training keeps is `grad_loops` loops' worth. With
        `recompute`, training keeps one state per loop and computes a loop again on the way back (activation
        checkpointing, Chen et al. 2016, arXiv 1604.06174). With `measure_movement`, one loop more is computed. Out of
        training, the loops end as soon as no position is active.
        """
        halting = self.accumulator(n_loops, e, end_together=grad_loops is not None, reached=context.store.reached)
        budget = halting.budget
        n_constant = 0 if grad_loops is None else max(0, budget.most - grad_loops)
        learning = torch.is_grad_enabled()
        h = first = self.initial_state(e)
        probabilities: list[Tensor] = []
        for t in range(budget.most):
            if t == n_constant > 0:
                h = _begin(h, first, budget, t)
                context.injected = None  # what it holds was computed without a gradient
            with torch.set_grad_enabled(learning and t >= n_constant):
                active = halting.active(t)
                loop = partial(self.step, t=t, context=context, active=active, own_index=budget.own_index(t))
                if recompute and learning:
                    h = self._recomputed(loop, h, e, context, halted=active is not None)
                else:
                    h = loop(h, e)
                p = self.halting_probabilities(h, context)
                halting.update(h, p, t)
            if keep_probabilities and p is not None:
                probabilities.append(p)
            if not self.training and halting.finished:
                break
        kept = torch.stack(probabilities) if probabilities else None
        movement = self._movement(h, e, budget, context, recompute=recompute and learning) if measure_movement else None
        return LoopResult(halting.output, halting.exit_loops, halting.ponder_cost, kept, movement)

    def _movement(
        self, h: Tensor, e: Tensor, budget: LoopBudget, context: ForwardContext, *, recompute: bool
    ) -> Tensor:
        """`LoopResult.movement` of the last state h: one loop more, of which nobody counts the experts' load."""

        def loop(h: Tensor, e: Tensor) -> Tensor:
            load, context.expert_load = context.expert_load, None
            try:
                return self.step(h, e, budget.most, context, own_index=budget.next_index)
            finally:  # a checkpoint leaves by an exception when it has computed all that it needs
                context.expert_load = load

        after = self._recomputed(loop, h, e, context, halted=False) if recompute else loop(h, e)
        return (after - h).square().mean()

    def _recomputed(
        self, loop: Callable[[Tensor, Tensor], Tensor], h: Tensor, e: Tensor, context: ForwardContext, *, halted: bool
    ) -> Tensor:
        """`loop(h, e)`, keeping for the way back only what goes in; `halted` if it looks at the loop before it."""
        self.injection.prepare(e, context).be()  # here: what is kept for all loops must not belong to the graph of one
        store = context.store
        assert isinstance(store, PassStore), "nobody learns through a cache"
        before = store.state() if halted else {}

        def again(h: Tensor, e: Tensor) -> Tensor:
            store.restore(before)
            return loop(h, e)

        return checkpoint(again, h, e, use_reentrant=False)


def _begin(h: Tensor, first: Tensor, budget: LoopBudget, t: int) -> Tensor:
    """The state h with gradients through the first state of the sequences whose loops begin at loop t or later."""
    waiting = budget.begin_after(t - 1)
    return h if waiting is None else torch.where(waiting.unsqueeze(-1), first, h)
