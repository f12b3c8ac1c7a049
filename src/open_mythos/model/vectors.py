"""One vector at a time, in memory that PyTorch and NumPy share.

Main entries: `Buffer`, `Product`, `Norm`. PyTorch multiplies by the weights, on as many threads as it was given. What
is small goes to NumPy: an operation costs some two microseconds there and a view less than one, against six and three.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from open_mythos.model.norm import RMSNorm

Array: TypeAlias = npt.NDArray[np.float32]

ArrayEntries: TypeAlias = dict[str, Array]
"""What one query sees of a cache, by name: (positions, width), or (heads, positions, width)."""


class Buffer:
    """The same float32 numbers as a tensor and as an array."""

    def __init__(self, size: int) -> None:
        self.tensor = torch.empty(size)
        self.array: Array = self.tensor.numpy()


class Product(Buffer):
    """What a matrix (rows, dim) makes of a vector (dim,), in the same memory every time."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[0])
        self._weight = weight

    def __call__(self, x: Tensor) -> Array:
        torch.mv(self._weight, x, out=self.tensor)
        return self.array


class Norm(Buffer):
    """What an `RMSNorm` makes of a vector, in the same memory every time."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__(norm.weight.shape[0])
        self._gain, self._eps = as_array(norm.weight), norm.eps

    def __call__(self, x: Array) -> Tensor:
        mean_square = float(x.dot(x)) / x.shape[0]
        np.multiply(x, self._gain, out=self.array)
        np.multiply(self.array, np.float32((mean_square + self._eps) ** -0.5), out=self.array)
        return self.tensor


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
