"""Norms and what stands around the blocks of a loop, row by row.

Main entries: `rms_norm`, `inject`, `adapt`, `halting_probability`.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.arithmetic.exponential import exp
from open_mythos.model.arithmetic.vectors import scale_of, scale_row
from open_mythos.model.rows import Array


@compiled
def rms_norm(x: Array, gain: Array, eps: np.float32, out: Array) -> None:
    """The first channels of x (n, ...) over their root mean square, times gain (dim,), to out (n, dim)."""
    n, dim = out.shape
    for i in range(n):
        row = x[i, :dim]
        scale_row(row, scale_of(row, eps), gain, out[i])


@compiled
def inject(h: Array, e: Array, a: Array, b: Array, embedding: Array, out: Array) -> None:
    """`A*h + B*e` of rows h and e (n, dim), to `out`, and the loop's embedding: (n, dim), or (1, dim) for all."""
    n, dim = h.shape
    for i in range(n):
        of_loop = embedding[i % embedding.shape[0]]
        for j in range(dim):
            out[i, j] = a[j] * h[i, j] + b[j] * e[i, j] + of_loop[j]


@compiled
def adapt(x: Array, u: Array, down: Array, scale: Array, up: Array) -> None:
    """Add to x (n, dim), in place, what the adapter makes of x - u; scale is (n, rank), or (1, rank) for all."""
    n, dim = x.shape
    rank = down.shape[0]
    low = np.empty(rank, np.float32)
    for i in range(n):
        factors = scale[i % scale.shape[0]]
        for r in range(rank):
            total = np.float32(0)
            for j in range(dim):
                total += down[r, j] * (x[i, j] - u[i, j])
            low[r] = total * factors[r]
        for j in range(dim):
            total = np.float32(0)
            for r in range(rank):
                total += up[j, r] * low[r]
            x[i, j] += total


@compiled
def halting_probability(h: Array, weight: Array, bias: Array, eps: np.float32, out: Array) -> None:
    """`sigmoid(w . h / rms(h) + b)` of rows h (n, dim), to out (n,)."""
    n, dim = h.shape
    for i in range(n):
        squares, product = np.float32(0), np.float32(0)
        for j in range(dim):
            squares += h[i, j] * h[i, j]
            product += h[i, j] * weight[0, j]
        rms = np.sqrt(squares / np.float32(dim)) + eps
        out[i] = np.float32(1) / (np.float32(1) + exp(-(product / rms + bias[0])))
