"""In training, some sequences run more loops than asked: what is always asked for the same depth is then right beyond.

Main entry: `Deeper`. With one depth for all, nothing says what a state is to become after it (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.model.context import ForwardContext
from open_mythos.model.recurrent import LoopResult, RecurrentBlock

_MOST_AGAIN = 4
"""How many times as many loops as asked may come on top of these."""


@dataclass(frozen=True)
class Deeper:
    """Who runs how many loops. Those who run deeper are computed apart, so that nobody else waits for them."""

    n_loops: Tensor
    """(batch,) or (batch, seq): of everybody."""
    order: Tensor
    """(batch,): all sequences, those that run deeper first."""
    n: int
    """How many these are."""

    @staticmethod
    def may_be_drawn() -> bool:
        """Not where several processes train together: they would have to run as many loops as one another."""
        distributed = torch.distributed
        return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)

    @classmethod
    def drawn(cls, rate: float, n_loops: Tensor) -> Deeper | None:
        """Who may run deeper than `n_loops` says, up to five times as deep; None if nobody does.

        A share `rate` of the sequences, each by a number of its own, k more loops about 1/k as often as one more: one
        number for all of a pass taught much less, and with fewer at most not all held far beyond. Where positions have
        depths of their own, only those of the deepest go on: others may be padding.
        """
        batch, cpu = len(n_loops), torch.device("cpu")  # whatever the default: nobody then waits for an accelerator
        n = int(rate * batch + torch.rand((), device=cpu))
        if not n:
            return None
        order = torch.randperm(batch, device=cpu)
        share = torch.rand(batch, *[1] * (n_loops.dim() - 1), device=cpu)
        more = torch.exp(share * torch.log(_MOST_AGAIN * n_loops + 1.0)).to(n_loops.dtype)
        more = more.clamp_min(1).minimum(_MOST_AGAIN * n_loops)  # whatever was rounded
        goes_on = torch.zeros(batch, dtype=torch.bool, device=cpu).index_fill_(0, order[:n], True)
        if n_loops.dim() > 1:
            goes_on = goes_on.unsqueeze(-1) & (n_loops == n_loops.amax(1, keepdim=True))
        return cls(n_loops + more * goes_on, order, n)

    def run(
        self, recurrent: RecurrentBlock, e: Tensor, context: ForwardContext, *, keep_probabilities: bool
    ) -> LoopResult:
        """The loops of all sequences, from the encoded input e (batch, seq, dim)."""
        found: list[LoopResult] = []
        for rows in (self.order[: self.n], self.order[self.n :]):
            if len(rows):
                part, own = context.part(), e[rows.to(e.device)]
                found.append(recurrent(own, self.n_loops[rows], part, keep_probabilities=keep_probabilities))
                context.add_load(part)
        return _joined(found, self.order.argsort().to(e.device))


def _joined(parts: Sequence[LoopResult], places: Tensor) -> LoopResult:
    """The results of parts of a batch as one, of which each sequence has its place."""
    sizes = [len(part.state) for part in parts]
    return LoopResult(
        state=torch.cat([part.state for part in parts])[places],
        exit_loops=torch.cat([part.exit_loops for part in parts])[places],
        ponder_cost=torch.stack([part.ponder_cost * n for part, n in zip(parts, sizes, strict=True)]).sum()
        / sum(sizes),
        halting_probabilities=_all_loops([part.halting_probabilities for part in parts], places),
        movement=None,
    )


def _all_loops(parts: Sequence[Tensor | None], places: Tensor) -> Tensor | None:
    """Halting probabilities (loops, batch, seq); who has halted keeps its last state, and so its last probability."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    most = max(len(part) for part in known)
    return torch.cat([torch.cat([part, part[-1:].expand(most - len(part), -1, -1)]) for part in known], 1)[:, places]
