"""RMSNorm, rotary positions and SwiGLU, written as their papers do."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension."""
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """One head (dim,) at one position: channels i and i + dim/2 turn by `position * theta^(-2i/dim)`."""
    half = x.shape[0] // 2
    first, second = [], []
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[0])
        cos, sin = math.cos(angle), math.sin(angle)
        first.append(x[i] * cos - x[i + half] * sin)
        second.append(x[i + half] * cos + x[i] * sin)
    return torch.stack(first + second)


def rotate_all(x: Tensor, theta: float) -> Tensor:
    """x (seq, heads, dim), position 0 first."""
    return torch.stack([torch.stack([rotate(head, t, theta) for head in row]) for t, row in enumerate(x)])


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`down(silu(gate x) * up x)` for x (..., dim) and weight matrices (out, in)."""
    gated = x @ gate.T
    return (gated / (1 + torch.exp(-gated)) * (x @ up.T)) @ down.T
