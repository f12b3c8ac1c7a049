"""What stands between products: root-mean-square norms of all rows, what is added, and the way back.

Main entries: `normalise`, `normalise_back`, `row_back`.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.arithmetic.vectors import scale_of, scale_row
from open_mythos.model.rows import Array


@compiled
def normalise(x: Array, gain: Array, eps: np.float32, scales: Array, out: Array) -> None:
    """`x * scale * gain` for rows x (n, dim), to `out`; each row's scale is 1 over its root mean square."""
    for i in range(x.shape[0]):
        scales[i] = scale_of(x[i], eps)
    normalise_again(x, gain, scales, out)


@compiled
def normalise_again(x: Array, gain: Array, scales: Array, out: Array) -> None:
    """The same, the scales being known."""
    for i in range(x.shape[0]):
        scale_row(x[i], scales[i], gain, out[i])


@compiled
def normalise_back(
    x: Array, gain: Array, scales: Array, grad: Array, straight: Array, out: Array, dgain: Array
) -> None:
    """The gradient of `normalise` for x, plus `straight`, to `out`, given that of its result; the gain's grows."""
    for i in range(x.shape[0]):
        to, add = out[i], straight[i]
        row_back(x[i], gain, scales[i], grad[i], to, dgain)
        for j in range(to.shape[0]):
            to[j] += add[j]


@compiled
def row_back(row: Array, gain: Array, scale: np.float32, grad: Array, out: Array, dgain: Array) -> None:
    """The gradient of `row * scale * gain`, of which the scale depends on the row; the gain's is added up.

    With y = row * scale: `scale * (g - y * mean(g * y))` for `g = grad * gain`.
    """
    n = row.shape[0]
    total = np.float32(0)
    for j in range(n):
        total += grad[j] * gain[j] * row[j]
    back = total * scale * scale * scale / np.float32(n)
    for j in range(n):
        dgain[j] += grad[j] * row[j] * scale
        out[j] = grad[j] * gain[j] * scale - row[j] * back


@compiled
def add_residual(x: Array, branch_scale: np.float32, out: Array) -> None:
    """`out = x + branch_scale * out`."""
    n, dim = x.shape
    for i in range(n):
        row, to = x[i], out[i]
        for j in range(dim):
            to[j] = row[j] + branch_scale * to[j]


@compiled
def scaled(x: Array, factor: np.float32, out: Array) -> None:
    """`out = factor * x`."""
    n, dim = x.shape
    for i in range(n):
        row, to = x[i], out[i]
        for j in range(dim):
            to[j] = factor * row[j]
