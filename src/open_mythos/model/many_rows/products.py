"""Products of whole matrices, all contiguous.

Main entries: `by`, `by_turned` and `across`. Of many rows, a panel of the other matrix at a time is copied together:
rows of a wide matrix lie as far apart as numbers that take each other's place in a cache, and long columns do not fit
into one.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.arithmetic.product import PANEL, flat, moved, product
from open_mythos.model.arithmetic.product import by_turned as whole_by_turned
from open_mythos.model.rows import Array

_MANY = 96
"""From how many rows on copying pays."""
_DEEP = 256
"""How many rows of a panel are copied together."""


@compiled
def by(x: Array, matrix: Array, out: Array, add: bool) -> None:
    """`out = x @ matrix`, or with `add` `out += x @ matrix`; (rows, depth) by (depth, columns)."""
    rows, depth = x.shape
    columns = matrix.shape[1]
    if rows < _MANY:
        product(flat(x), 0, depth, 1, flat(matrix), 0, columns, flat(out), 0, columns, rows, columns, depth, int(add))
    else:
        _by_panels(flat(x), 0, depth, 1, matrix, flat(out), 0, rows, add)


@compiled
def by_turned(x: Array, matrix: Array, out: Array, add: bool) -> None:
    """`out = x @ matrix.T`, or with `add` `out += x @ matrix.T`; (rows, depth) by (columns, depth)."""
    whole_by_turned(x, matrix, 0, matrix.shape[0], np.float32(1), out, add)


@compiled
def across(x: Array, y: Array, first: int, end: int, out: Array, add: bool) -> None:
    """Rows `first` to `end` of `out = x.T @ y`, or with `add` of `out += x.T @ y`; x and y have the same rows."""
    depth, width = x.shape
    columns = y.shape[1]
    rows, target = end - first, first * columns
    if depth < _MANY:
        own, into = flat(x), flat(out)
        product(own, first, 1, width, flat(y), 0, columns, into, target, columns, rows, columns, depth, int(add))
    else:
        _by_panels(flat(x), first, 1, width, y, flat(out), target, rows, add)


@compiled
def _by_panels(
    a: Array, a_first: int, a_row: int, a_column: int, b: Array, out: Array, target: int, rows: int, add: bool
) -> None:
    """`out (+)= a @ b`, so many rows of a, which begins at `a_first` as out does at `target`; as `product` reads a."""
    depth, columns = b.shape
    panel = np.empty(min(_DEEP, depth) * PANEL, np.float32)
    for first in range(0, depth, _DEEP):
        deep, own = min(_DEEP, depth - first), a_first + first * a_column
        for column in range(0, columns, PANEL):
            width, to = min(PANEL, columns - column), target + column
            moved(flat(b), first * columns + column, columns, panel, 0, PANEL, deep, width, np.float32(1))
            product(
                a, own, a_row, a_column, panel, 0, PANEL, out, to, columns, rows, width, deep, int(add or first > 0)
            )
