"""Rotary position embedding in the half-rotation layout of Llama (Su et al. 2021, arXiv 2104.09864).

Main entries: `rotary_table`, `apply_rotary`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTable(NamedTuple):
    """Cosines and signed sines of every position, each (seq, 1, dim), ready to broadcast over heads."""

    cos: Tensor
    signed_sin: Tensor


def rotary_table(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> RotaryTable:
    """Angles `position / theta^(2i/dim)`, computed in float32 whatever `dtype` they are returned in."""
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions.to(torch.float32).unsqueeze(-1) * theta**-exponent
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return RotaryTable(torch.cat([cos, cos], -1).unsqueeze(-2), torch.cat([-sin, sin], -1).unsqueeze(-2))


def apply_rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate `x` (..., seq, heads, dim): channel i is paired with channel i + dim/2."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * table.cos, x.roll(half, -1), table.signed_sin)
