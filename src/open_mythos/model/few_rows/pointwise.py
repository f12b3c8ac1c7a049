"""Norms and what stands around the blocks of a loop, row by row.

Main entries: `rms_norm`, `inject`, `adapt`, `halting_probability`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from open_mythos.model.arithmetic.compiled import compiled, n_parts, parallel
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


@parallel
def adapt(x: Array, u: Array, down: Array, scale: Array, up: Array, threads: int) -> None:
    """Add to x (n, dim) what the adapter makes of x - u, which is left in u.

    Down and up are (rank, dim), scale is (n, rank), or (1, rank) for all.
    """
    n = x.shape[0]
    parts = n_parts(2 * x.size * down.shape[0], threads)
    if parts == 1:  # other threads are started even for nothing
        _adapt(x, u, down, scale, up, 0, n)
        return
    for part in prange(parts):
        _adapt(x, u, down, scale, up, n * part // parts, n * (part + 1) // parts)


@compiled
def _adapt(x: Array, u: Array, down: Array, scale: Array, up: Array, first: int, end: int) -> None:
    """`adapt` of the rows from `first` to `end`."""
    rank, dim = down.shape
    low, fours = np.empty(rank, np.float32), rank // 4 * 4
    for i in range(first, end):
        factors, own, branches = scale[i % scale.shape[0]], x[i], u[i]
        for j in range(dim):
            branches[j] = own[j] - branches[j]
        for r in range(rank):
            total = np.float32(0)
            for j in range(dim):
                total += down[r, j] * branches[j]
            low[r] = total * factors[r]
        for r in range(0, fours, 4):
            a, b, c, d = low[r], low[r + 1], low[r + 2], low[r + 3]
            for j in range(dim):
                own[j] += a * up[r, j] + b * up[r + 1, j] + c * up[r + 2, j] + d * up[r + 3, j]
        for r in range(fours, rank):
            for j in range(dim):
                own[j] += low[r] * up[r, j]


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
