"""Products of rows with a matrix, on all threads. For few rows the matrix is read once, where it lies.

Main entries: `multiply`, `multiply_part`, `share`. Matrices are (width, dim), as in `nn.Linear`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from open_mythos.model.arithmetic.compiled import MATRIX, compiled, n_parts, parallel, shared
from open_mythos.model.arithmetic.product import by_turned
from open_mythos.model.arithmetic.tiles import CHANNELS, ROWS, sums_1, sums_2, sums_most
from open_mythos.model.rows import Array

_TOGETHER = 64
"""Neighbouring channels that are written together."""

_FEW = 48
"""More rows than this are multiplied as whole matrices are."""


@compiled
def share(width: int, part: int, parts: int) -> int:
    """Where the channels of one of several parts begin: at a multiple of four."""
    return width if part == parts else width * part // parts // CHANNELS * CHANNELS


@parallel
def multiply(x: Array, weight: Array, scale: np.float32, out: Array, add: int, threads: int) -> None:
    """`out = scale * x @ weight.T`, or with `add` `out += scale * x @ weight.T`: (n, width) from x (n, dim)."""
    width = out.shape[1]
    parts = n_parts(x.size * width, threads)
    if parts == 1:  # other threads are started even for nothing
        multiply_part(x, weight, scale, 0, width, out, add)
        return
    for part in prange(parts):
        multiply_part(x, weight, scale, share(width, part, parts), share(width, part + 1, parts), out, add)


@shared(MATRIX, MATRIX, "float32", "int64", "int64", MATRIX, "int64")
def multiply_part(x: Array, weight: Array, scale: np.float32, first: int, end: int, out: Array, add: int) -> None:
    """`multiply` for the channels of `out` from `first` to `end`."""
    if x.shape[0] > _FEW:
        by_turned(x, weight, first, end, scale, out, add != 0)
        return
    _multiply_few(x, weight, scale, first, end, out, add != 0)


@compiled
def _multiply_few(x: Array, weight: Array, scale: np.float32, first: int, end: int, out: Array, add: bool) -> None:
    """Four rows of the matrix at a time, a quarter of the matrix apart: memory then is read in four long streams.

    That is what processors fetch ahead by themselves: 1.5 to 2.5 times as fast as four rows side by side, from memory.
    Not so where there are many rows of x, and the streams stand still meanwhile: each `ROWS` of these fetch a row of
    another stream, the first four the next ones, then those behind. Sums wait until there are some for neighbouring
    channels: a number here and there misses the caches.
    """
    n, apart = len(x), (end - first) // CHANNELS
    sums = np.empty((n, CHANNELS, _TOGETHER), np.float32)
    for base in range(first, first + apart, _TOGETHER):
        channels = min(_TOGETHER, first + apart - base)
        for o in range(channels):
            for i in range(0, n, ROWS):
                tile = i // ROWS
                ahead = base + o + 1 + tile // CHANNELS + tile % CHANNELS * apart
                if i + 2 < n:  # three rows take longer as two and one than as four
                    sums_most(x, i, weight, base + o, apart, ahead, sums, o)
                elif i + 2 == n:
                    sums_2(x, i, weight, base + o, apart, ahead, sums, o)
                else:
                    sums_1(x, i, weight, base + o, apart, ahead, sums, o)
        for i in range(n):
            for c in range(CHANNELS):
                _put(sums[i, c, :channels], scale, out[i, base + c * apart : base + c * apart + channels], add)
    for o in range(first + CHANNELS * apart, end):
        for i in range(n):
            total = np.float32(0)
            for k in range(x.shape[1]):
                total += x[i, k] * weight[o, k]
            out[i, o] = scale * total + (out[i, o] if add else np.float32(0))


@compiled
def _put(sums: Array, scale: np.float32, out: Array, add: bool) -> None:
    if add:
        for j in range(sums.shape[0]):
            out[j] += scale * sums[j]
    else:
        for j in range(sums.shape[0]):
            out[j] = scale * sums[j]
