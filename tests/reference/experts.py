"""Mixture of experts, one token and one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from open_mythos.model.experts import MoEFFN
from reference.elementary import swiglu


def mixture(moe: MoEFFN, x: Tensor) -> Tensor:
    """What `moe` should return for x (tokens, dim), in x's precision."""
    return torch.stack([_one_token(moe, token) for token in x])


def _one_token(moe: MoEFFN, x: Tensor) -> Tensor:
    logits = moe.router.weight.to(x.dtype) @ x
    ranking = (logits + moe.router_bias.to(x.dtype)).tolist()
    chosen = sorted(range(moe.n_experts), key=lambda expert: -ranking[expert])[: moe.topk]
    scores = [logits[expert].exp() if moe.score == "softmax" else logits[expert].sigmoid() for expert in chosen]
    out = torch.zeros_like(x)
    for expert, score in zip(chosen, scores, strict=True):
        weights = (matrix[expert].to(x.dtype) for matrix in (moe.gate, moe.up, moe.down))
        gate, up, down = weights
        out = out + moe.scale * score / sum(scores) * swiglu(x, gate, up, down.T)
    if moe.shared is not None:
        shared = (layer.weight.to(x.dtype) for layer in (moe.shared.gate, moe.shared.up, moe.shared.down))
        out = out + swiglu(x, *shared)
    return out
