"""Rows of a few positions in memory that PyTorch and NumPy share.

Main entries: `Scratch`, `Product`, `Seen`. PyTorch multiplies by the weights, on as many threads as it was given; what
lies between the products is `kernels`'.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
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


class Shared:
    """The same float32 numbers as an array (rows, width) and as a tensor of that shape; of one row, a vector."""

    def __init__(self, whole: Tensor) -> None:
        self.array: Array = whole.numpy()
        self.tensor = whole[0] if len(whole) == 1 else whole

    @cached_property
    def _rows(self) -> list[Tensor]:
        return list(self.tensor.view(len(self.array), -1))

    def part(self, rows: slice) -> Tensor:
        """Some of the rows; a single one as a vector."""
        return self._rows[rows.start] if rows.stop - rows.start == 1 else self.tensor[rows]


class Buffer:
    """Memory for at most `most` rows, written anew in every pass."""

    def __init__(self, most: int, width: int) -> None:
        self._whole = torch.empty(most, width, dtype=torch.float32, device="cpu")
        self._parts: dict[int, Shared] = {}

    def __call__(self, n: int) -> Shared:
        """The first n rows."""
        if n not in self._parts:
            self._parts[n] = Shared(self._whole[:n])
        return self._parts[n]


class Scratch:
    """Buffers by what they are for: layers, which run one after the other, have the same ones."""

    def __init__(self, most: int) -> None:
        """`most` positions in a pass."""
        self._most = most
        self._buffers: dict[tuple[str, int, int], Buffer] = {}

    def __call__(self, name: str, width: int, per_position: int = 1) -> Buffer:
        """The buffer of that name, with so many rows for each position."""
        key = (name, width, per_position)
        if key not in self._buffers:
            self._buffers[key] = Buffer(self._most * per_position, width)
        return self._buffers[key]


class Product:
    """What a matrix (width, dim) makes of rows (n, dim) or a vector (dim,)."""

    def __init__(self, weight: Tensor, scratch: Scratch, name: str) -> None:
        self._weight, self._out = weight.detach(), scratch(name, len(weight))

    def __call__(self, x: Tensor) -> Shared:
        out = self._out(1 if x.dim() == 1 else len(x))
        multiply(x, self._weight, out.tensor)
        return out


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write `x @ weight.T` to `out`, for x (rows, dim) or (dim,) and a weight (width, dim)."""
    if x.dim() == 1:
        torch.mv(weight, x, out=out)
    else:
        torch.mm(x, weight.mT, out=out)


def add_product(stream: Tensor, x: Tensor, weight: Tensor, scale: float) -> None:
    """Add `scale * x @ weight.T` to `stream`, for x (rows, dim) or (dim,) and a weight (width, dim)."""
    if x.dim() == 1:
        stream.addmv_(weight, x, alpha=scale)
    else:
        stream.addmm_(x, weight.mT, alpha=scale)


def as_array(tensor: Tensor) -> Array:
    """The numbers themselves, not a copy."""
    array: Array = tensor.detach().numpy()
    return array
