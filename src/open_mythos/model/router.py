"""Which experts a token goes to, and how the choice is kept balanced.

Main entries: `route`, `balance_step`. A bias decides the choice and never the weights (Wang et al. 2024,
arXiv 2408.15664).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Experts of each token and their weights, both (tokens, experts per token)."""

    experts: Tensor
    weights: Tensor


def route(logits: Tensor, bias: Tensor, top_k: int, score: str, scale: float) -> Routing:
    """Choose the `top_k` highest of `logits + bias` (tokens, experts).

    The weights come from the unbiased scores and sum to `scale`.
    """
    logits = logits.float()
    experts = (logits.detach() + bias).topk(top_k, -1, sorted=False).indices
    chosen = logits.gather(-1, experts)
    if score == "softmax":
        weights = chosen.softmax(-1)  # a softmax over all experts, renormalised over the chosen ones
    else:
        weights = chosen.sigmoid()
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * scale)


def count_load(experts: Tensor, n_experts: int, counted: Tensor | None = None) -> Tensor:
    """How many slots of `experts` each expert received, (n_experts,); only slots that are `counted`, if given."""
    flat = experts.flatten()
    ones = torch.ones_like(flat) if counted is None else counted.reshape(-1).to(flat.dtype)
    return flat.new_zeros(n_experts).scatter_add_(0, flat, ones)


def balance_step(bias: Tensor, load: Tensor, rate: float) -> None:
    """Raise the bias of experts below the mean load and lower that of those above, in place.

    The step is `rate` times the relative shortfall, at most `rate` either way, and keeps the bias centred.
    """
    load = load.to(bias.dtype)
    mean = load.mean().clamp_min(1e-9)
    step = ((mean - load) / mean).clamp(-1, 1)
    bias.add_(step - step.mean(), alpha=rate)
