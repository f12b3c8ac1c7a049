"""Rows of a few sequences, one each, in memory that PyTorch and NumPy share.

Main entries: `Buffer`, `Product`, `Norm`. PyTorch multiplies by the weights, on as many threads as it was given. What
is small goes to NumPy: an operation costs some two microseconds there and a view less than one, against six and three.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from open_mythos.model.norm import RMSNorm

Array: TypeAlias = npt.NDArray[np.float32]


class Seen(NamedTuple):
    """What one query of each of n sequences sees of a cache."""

    entries: dict[str, Array]
    """By name: (n, positions, width), or (heads, n, positions, width)."""
    bias: Array | None
    """(n, 1, positions): what to add to the scores; None if all is visible."""


class Buffer:
    """The same float32 numbers as an array (rows, width) and as a tensor of that shape; of one row, a vector."""

    def __init__(self, rows: int, width: int) -> None:
        whole = torch.empty(rows, width)
        self.array: Array = whole.numpy()
        self.tensor = whole[0] if rows == 1 else whole

    @cached_property
    def _rows(self) -> list[Tensor]:
        return list(self.tensor.view(len(self.array), -1))

    def part(self, rows: slice) -> Tensor:
        """Some of the rows; a single one as a vector."""
        return self._rows[rows.start] if rows.stop - rows.start == 1 else self.tensor[rows]


class Product(Buffer):
    """What a matrix (width, dim) makes of a buffer's tensor, in the same memory every time."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        super().__init__(rows, weight.shape[0])
        self._weight = weight

    def __call__(self, x: Tensor) -> Array:
        multiply(x, self._weight, self.tensor)
        return self.array


class Norm(Buffer):
    """What an `RMSNorm` makes of rows, in the same memory every time."""

    def __init__(self, norm: RMSNorm, rows: int) -> None:
        super().__init__(rows, norm.weight.shape[0])
        self._gain, self._eps = as_array(norm.weight), norm.eps

    def __call__(self, x: Array) -> Tensor:
        np.multiply(x, self._gain, out=self.array)
        np.multiply(self.array, self._reciprocal_rms(x), out=self.array)
        return self.tensor

    def _reciprocal_rms(self, x: Array) -> np.float32 | Array:
        dim = x.shape[-1]
        if len(x) == 1:  # as a Python number: for one, an array's operations cost three times as much
            return np.float32((float(x[0].dot(x[0])) / dim + self._eps) ** -0.5)
        scale: Array = (np.vecdot(x, x)[:, None] / np.float32(dim) + np.float32(self._eps)) ** np.float32(-0.5)
        return scale


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


def as_array(weight: nn.Parameter | Tensor) -> Array:
    """The weight itself, not a copy."""
    array: Array = weight.detach().numpy()
    return array


def softmax(scores: Array, sink: Array | None) -> Array:
    """Weights over the last dimension, in which a sink (..., 1) takes part without being returned."""
    most = np.maximum.reduce(scores, axis=-1, keepdims=True)
    if sink is not None:
        most = np.maximum(most, sink)
    weights: Array = np.exp(scores - most)
    total = np.add.reduce(weights, axis=-1, keepdims=True)
    if sink is not None:
        total += np.exp(sink - most)
    weights /= total
    return weights
