"""Rows of a few positions in memory that PyTorch and NumPy share.

Main entries: `Seen`, `Progress`, `as_array`, `described`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[np.float32]
Rows: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


class Seen(NamedTuple):
    """What each of n positions sees of a cache."""

    entries: Rows
    """(loops, layers, kinds, 4), or (1, ...) if all loops have the same: all that is stored of some layers,
    `described`, for what the config's `cache_widths` name: (heads, rows, width). Whoever keeps the cache keeps all
    these arrays."""
    rows: Rows
    """(loops, n), or (1, n): the address at which the numbers of the rows are listed that a position sees, its own the
    last of them."""
    counts: Rows
    """(n,): how many they are."""


class Progress(NamedTuple):
    """How far n positions have come, each of which has a line in what is kept of them."""

    lines: Rows
    """(n,): which they are."""
    mass: Array
    """(lines,): sum of the weights so far."""
    output: Array
    """(lines, dim): what has been added up of their states so far."""
    stops: Bools
    """(n,): set for those that stop."""
    left: Rows
    """(n,): how many loops they may still run."""


def as_array(tensor: Tensor) -> Array:
    """The numbers themselves, not a copy."""
    array: Array = tensor.detach().numpy()
    return array


def described(tensor: Tensor) -> tuple[int, ...]:
    """Where a contiguous float32 tensor lies, and its sizes, at most three; where there are fewer, the first are 1."""
    assert tensor.dtype == torch.float32, "nobody who is given an address can ask"
    assert tensor.is_contiguous()
    return tensor.data_ptr(), *as_dimensions(tensor)


def as_dimensions(tensor: Tensor) -> tuple[int, ...]:
    """Three sizes; where there are fewer, the first are 1."""
    return (*(1,) * (3 - tensor.dim()), *tensor.shape)
