"""Which experts a token goes to, and how the choice is kept balanced.

Main entries: `route`, `route_few`, `balance_step`. A bias decides the choice and never the weights (Wang et al. 2024,
arXiv 2408.15664).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from open_mythos.model.vectors import Array


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


def route_few(logits: Array, bias: Array, top_k: int, score: str, scale: float) -> tuple[NDArray[np.int64], Array]:
    """`route` for few tokens, in NumPy: experts and weights, both (tokens, experts per token).

    Of experts that rank exactly alike, it may take others.
    """
    experts = (logits + bias).argsort(1)[:, -top_k:]
    chosen = logits[np.arange(len(logits))[:, None], experts].astype(np.float64)
    raw = chosen - chosen.max(1, keepdims=True) if score == "softmax" else -np.logaddexp(0, -chosen)
    weights = np.exp(raw)
    weights *= scale / (weights.sum(1, keepdims=True) + 1e-20)
    return experts, weights.astype(np.float32)


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
