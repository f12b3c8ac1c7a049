"""Products of rows with a matrix, on all threads. For few rows the matrix is read once, where it lies.

Main entries: `multiply`, `multiply_part`, `side_by_side`, `share`. Matrices are (width, dim), as in `nn.Linear`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from open_mythos.model.arithmetic.compiled import MATRIX, STACK, compiled, n_parts, parallel, shared
from open_mythos.model.arithmetic.product import by_turned, turned
from open_mythos.model.arithmetic.tiles import (
    CHANNELS,
    CHANNELS_16,
    CHANNELS_32,
    sums_1,
    sums_2,
    sums_4,
    tile_16,
    tile_32,
)
from open_mythos.model.rows import Array, Rows

_LANES = 32
"""Rows that lie side by side in a panel, at most; more rows than this are multiplied as whole matrices are."""

_MOST_TOGETHER = 64 + CHANNELS_16
"""Channels whose sums are turned together, from channel by channel to row by row."""


@compiled
def share(width: int, part: int, parts: int) -> int:
    """Where the channels of one of several parts begin: at a multiple of four."""
    return width if part == parts else width * part // parts // CHANNELS * CHANNELS


@parallel
def multiply(x: Array, weight: Array, scale: np.float32, out: Array, add: int, threads: int) -> None:
    """`out = scale * x @ weight.T`, or with `add` `out += scale * x @ weight.T`: (n, width) from x (n, dim)."""
    n, width = out.shape
    panels = side_by_side(x, np.full(1, n), threads)
    parts = n_parts(x.size * width, threads)
    if parts == 1:  # other threads are started even for nothing
        multiply_part(x, panels, 0, weight, scale, 0, width, out, add)
        return
    for part in prange(parts):
        first, end = share(width, part, parts), share(width, part + 1, parts)
        multiply_part(x, panels, 0, weight, scale, first, end, out, add)


@shared(MATRIX, STACK, "int64", MATRIX, "float32", "int64", "int64", MATRIX, "int64")
def multiply_part(
    x: Array, panels: Array, panel: int, weight: Array, scale: np.float32, first: int, end: int, out: Array, add: int
) -> None:
    """`multiply` for the channels of `out` from `first` to `end`; x also lies in the panels from `panel` on."""
    if x.shape[0] > _LANES:
        by_turned(x, weight, first, end, scale, out, add != 0)
        return
    if add == 0:
        for i in range(out.shape[0]):
            for j in range(first, end):
                out[i, j] = np.float32(0)
    if _lanes(x.shape[0]) and end - first >= CHANNELS_16:
        _add_panels(x.shape[0], panels, panel, weight, scale, first, end, out)
    else:
        _add_rows(x, weight, scale, first, end, out)


@compiled
def _lanes(n: int) -> int:
    """How many rows a panel for n of them has; 0 if they would leave a quarter of it empty, or are too many."""
    lanes = 16 if n <= 16 else 32
    return lanes if 4 * n > 3 * lanes and n <= _LANES else 0


@parallel
def side_by_side(x: Array, ends: Rows, threads: int) -> Array:
    """Rows of x (n, dim) in panels (panels, dim, rows), for the runs of rows that are long enough, else nowhere.

    Run r has the rows up to `ends[r]`, and panels from `first_panel` of its first row and r on. Runs that are
    multiplied otherwise have room for panels, which is not touched.
    """
    dim, most, start = x.shape[1], 0, 0
    for run in range(ends.shape[0]):
        most, start = max(most, _lanes(ends[run] - start)), ends[run]
    if most == 0:
        return np.empty((0, dim, _LANES), np.float32)
    panels = np.empty((first_panel(x.shape[0], ends.shape[0]), dim, _LANES), np.float32)
    parts = n_parts(8 * x.size, threads)
    for part in prange(parts):
        _fill(panels, x, ends, dim * part // parts, dim * (part + 1) // parts)
    return panels


@compiled
def first_panel(start: int, run: int) -> int:
    """Where the panels of a run begin whose first row is `start`, so that there is room for all before it."""
    return start // _LANES + run


@compiled
def _fill(panels: Array, x: Array, ends: Rows, first: int, end: int) -> None:
    """The channels of all panels from `first` to `end`; behind the last row of a run, zeros."""
    start = 0
    for run in range(ends.shape[0]):
        rows = ends[run] - start
        lanes = _lanes(rows)
        if lanes:
            flat = panels[first_panel(start, run)].reshape(-1)
            for k in range(first, end):
                for i in range(rows):
                    flat[k * lanes + i] = x[start + i, k]
                for i in range(rows, lanes):
                    flat[k * lanes + i] = np.float32(0)
        start = ends[run]


@compiled
def _add_rows(x: Array, weight: Array, scale: np.float32, first: int, end: int, out: Array) -> None:
    """Four rows of the matrix at a time, a quarter of the matrix apart: memory then is read in four long streams.

    That is what processors fetch ahead by themselves: 1.5 to 2.5 times as fast as four rows side by side, from memory.
    """
    n, apart = len(x), (end - first) // CHANNELS
    for o in range(first, first + apart):
        i = 0
        while i + 4 <= n:
            four = sums_4(x, i, weight, o, apart)
            for k in range(4 * CHANNELS):
                out[i + k // CHANNELS, o + k % CHANNELS * apart] += scale * four[k]
            i += 4
        if i + 2 <= n:
            two = sums_2(x, i, weight, o, apart)
            for k in range(2 * CHANNELS):
                out[i + k // CHANNELS, o + k % CHANNELS * apart] += scale * two[k]
            i += 2
        if i < n:
            one = sums_1(x, i, weight, o, apart)
            for k in range(CHANNELS):
                out[i, o + k * apart] += scale * one[k]
    for o in range(first + CHANNELS * apart, end):
        for i in range(n):
            total = np.float32(0)
            for k in range(x.shape[1]):
                total += x[i, k] * weight[o, k]
            out[i, o] += scale * total


@compiled
def _add_panels(
    n: int, panels: Array, panel: int, weight: Array, scale: np.float32, first: int, end: int, out: Array
) -> None:
    """Some channels at a time: what is read of the matrix is used for all panels while it is in a near cache."""
    lanes, channels = (16, CHANNELS_16) if n <= 16 else (32, CHANNELS_32)
    sums, across = np.empty(_MOST_TOGETHER * lanes, np.float32), np.empty(_MOST_TOGETHER * lanes, np.float32)
    base = first
    while base < end:
        stop = end if end - base <= _MOST_TOGETHER else base + _MOST_TOGETHER - CHANNELS_16  # none is left with too few
        width = stop - base
        done = base
        while done < stop:
            o = min(done, stop - channels)  # the last may compute some channels again
            place = sums[(o - base) * lanes :]
            if n <= 16:
                tile_16(panels[panel], weight, o, place)
            else:
                tile_32(panels[panel], weight, o, place)
            done = o + channels
        turned(sums, 0, lanes, width, lanes, across, 0, width)
        for i in range(n):
            own, more = out[i], across[i * width : (i + 1) * width]
            for j in range(width):
                own[base + j] += scale * more[j]
        base = stop
