"""Products of whole matrices, all contiguous.

Main entries: `by`, `by_turned` and `across`.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.arithmetic.product import by_turned as whole_by_turned
from open_mythos.model.arithmetic.product import flat, product
from open_mythos.model.rows import Array


@compiled
def by(x: Array, matrix: Array, out: Array, add: bool) -> None:
    """`out = x @ matrix`, or with `add` `out += x @ matrix`; (rows, depth) by (depth, columns)."""
    rows, depth = x.shape
    columns = matrix.shape[1]
    product(flat(x), 0, depth, 1, flat(matrix), 0, columns, flat(out), 0, columns, rows, columns, depth, int(add))


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
    product(flat(x), first, 1, width, flat(y), 0, columns, flat(out), target, columns, rows, columns, depth, int(add))
