"""Rows of a few positions in memory that PyTorch and NumPy share.

Main entries: `Seen`, `as_array`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array: TypeAlias = npt.NDArray[np.float32]
Rows: TypeAlias = npt.NDArray[np.int64]


class Seen(NamedTuple):
    """What each of n positions sees of a cache."""

    entries: tuple[Array, ...]
    """All that is stored of a layer, (heads, rows, width) for each of what the config's `cache_widths` name."""
    rows: Rows
    """(n, most): the rows that each position sees come first in its line, its own the last of them."""
    counts: Rows
    """(n,): how many they are."""


def as_array(tensor: Tensor) -> Array:
    """The numbers themselves, not a copy."""
    array: Array = tensor.detach().numpy()
    return array
