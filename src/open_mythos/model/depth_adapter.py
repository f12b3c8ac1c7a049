"""What may differ from loop to loop although the weights are shared: a low-rank adapter and an embedding of the index.

Main entries: `DepthAdapter`, `LoopEmbedding`. Both are functions of `t` that settle as t grows, so that loops beyond
the trained ones see values between those that training saw and the limit, never an untrained table row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.model.context import ForwardContext


class DepthAdapter(nn.Module):
    """`up(scale_t * down(branches))` with `scale_t = settled + transient * decay^t` per rank.

    It reads what the block's branches added to the stream, so it is bounded where they are. A per-loop adapter in the
    spirit of Relaxed Recursive Transformers (Bae et al. 2024, arXiv 2410.20672).
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        self.settled = nn.Parameter(torch.ones(rank))
        self.transient = nn.Parameter(torch.zeros(rank))
        self.decay_logit = nn.Parameter(torch.zeros(rank))

    def scale(self, t: int | Tensor) -> Tensor:
        """The per-rank factor of loop t, (rank,)."""
        return torch.addcmul(self.settled, self.transient, torch.sigmoid(self.decay_logit) ** t)

    def forward(self, branches: Tensor, t: int | Tensor, context: ForwardContext | None = None) -> Tensor:
        """What to add in loop t for the sum of the block's branches (..., dim)."""
        return self.up(self.down(branches) * self.scale_in(context, t))

    def scale_in(self, context: ForwardContext | None, t: int | Tensor) -> Tensor:
        """`scale`, which a context computes once."""
        if context is None or isinstance(t, Tensor):
            return self.scale(t)
        return context.constant((self, t), lambda: self.scale(t))


class LoopEmbedding(nn.Module):
    """A vector per loop index, `sum_k weight_k * decay_k^t`, decays fixed from 1/2 to 31/32; it fades as t grows."""

    decays: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("decays", 1 - 2.0 ** -torch.arange(1, 6), persistent=False)
        self.weight = nn.Parameter(torch.zeros(5, dim))

    def forward(self, t: int) -> Tensor:
        """The vector of loop t, (dim,)."""
        return self.decays.to(self.weight.dtype) ** t @ self.weight
