"""Rotary position embedding in the half-rotation layout of Llama (Su et al. 2021, arXiv 2104.09864).

Main entries: `rotary_table` and `apply_rotary`; `rotations` where positions are few.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_mythos.model.rows import Array, Rows, as_array

# Rows shorter than this are too short for the vector loops of a CPU: a product that broadcasts them takes three times
# as long as one of whole tensors.
_SHORT_ROW = 32


class RotaryTable(NamedTuple):
    """Cosines and signed sines of every position, each (seq, 1 or heads, dim)."""

    cos: Tensor
    signed_sin: Tensor


def rotary_table(
    positions: Tensor, dim: int, theta: float, dtype: torch.dtype, heads: int | None = None
) -> RotaryTable:
    """Angles `position / theta^(2i/dim)`, computed in float32 whatever `dtype` they are returned in.

    If all that is rotated has that many `heads`, short rows are laid out for every one of them.
    """
    angles = positions.to(torch.float32).unsqueeze(-1) * _frequencies(dim, theta, positions.device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    table = RotaryTable(torch.cat([cos, cos], -1).unsqueeze(-2), torch.cat([-sin, sin], -1).unsqueeze(-2))
    if heads is None or dim >= _SHORT_ROW:
        return table
    return RotaryTable(*(rows.expand(-1, heads, -1).contiguous() for rows in table))


def _frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    return theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def rotations(positions: Rows, dim: int, theta: float) -> Array:
    """The cosines, then the sines, of the angles of positions (n,), for `few_rows`; (n, dim)."""
    angles = positions.astype(np.float32)[:, None] * _frequencies_of_numpy(dim, theta)
    return np.concatenate([np.cos(angles), np.sin(angles)], 1)


@cache
def _frequencies_of_numpy(dim: int, theta: float) -> Array:
    return as_array(_frequencies(dim, theta, torch.device("cpu")))


def apply_rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate `x` (..., seq, heads, dim): channel i is paired with channel i + dim/2."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * table.cos, x.roll(half, -1), table.signed_sin)
