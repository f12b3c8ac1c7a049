"""The inner loop of a matrix product, in LLVM's own terms: a small block of the result stays in registers.

Main entries: `product`, `turned`, `moved`, `by_turned`. Matrices are parts of arrays (n,), with strides in numbers, so
that neither parts nor transposes need a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from open_mythos.model.arithmetic.compiled import VECTOR, compiled, shared
from open_mythos.model.arithmetic.registers import (
    REGISTER,
    WIDE,
    add_products,
    along,
    array_of,
    fetch,
    indices,
    mask_of,
    read,
    repeated,
    start_of,
    up_to,
    write,
)
from open_mythos.model.rows import Array

_ROWS, _NARROW_ROWS = 6, 8
_VECTORS = 4 if WIDE == 16 else 2


def _tile(n_rows: int, n_vectors: int, *, cut: bool, masked: bool) -> Callable[..., None]:
    @intrinsic
    def tile(
        _context: Any,
        a: Any,
        a_first: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        b_first: Any,
        b_row: Any,
        c: Any,
        c_first: Any,
        c_row: Any,
        last: Any,
        width: Any,
        depth: Any,
        add: Any,
    ) -> Any:
        """`c (+)= a @ b`, for rows up to `last` of a and c where it is cut, `width` columns of b and c where masked."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, b, c = (start_of(context, builder, signature, args, k) for k in (0, 4, 7))
            (a_row, a_column), b_row, (c_row, last, width, depth, add) = args[2:4], args[6], args[9:]
            number = a_row.type
            mask = mask_of(builder, width) if masked else None
            # Rows behind the last are the last again: they compute and store the same.
            rows = up_to(builder, number(0), n_rows, last) if cut else [number(r) for r in range(n_rows)]
            own = [builder.gep(a, [builder.mul(r, a_row)]) for r in rows]
            targets = [
                builder.gep(c, [builder.add(builder.mul(r, c_row), number(v * WIDE))])
                for r in rows
                for v in range(n_vectors)
            ]
            totals = [cgutils.alloca_once(builder, REGISTER) for _ in targets]
            with builder.if_else(builder.icmp_signed("!=", add, number(0))) as (adding, fresh):
                with adding:
                    for total, target in zip(totals, targets, strict=True):
                        builder.store(read(builder, target, mask), total)
                with fresh:
                    for total in totals:
                        builder.store(ir.Constant(REGISTER, [0.0] * WIDE), total)
            with cgutils.for_range(builder, depth) as loop:
                row = builder.gep(b, [builder.mul(loop.index, b_row)])
                factors = [read(builder, builder.gep(row, [number(v * WIDE)]), mask) for v in range(n_vectors)]
                column = builder.mul(loop.index, a_column)
                for r, numbers in enumerate(own):
                    one = repeated(builder, builder.load(builder.gep(numbers, [column])))
                    add_products(builder, totals[r * n_vectors : (r + 1) * n_vectors], [one] * n_vectors, factors)
            for total, target in zip(totals, targets, strict=True):
                write(builder, builder.load(total), target, mask)
            return context.get_dummy_value()

        arguments = (a, a_first, a_row, a_column, b, b_first, b_row, c, c_first, c_row, last, width, depth, add)
        return types.void(*arguments), generate

    return tile  # type: ignore[no-any-return]


def _turn_square(
    _context: Any, source: Any, first: Any, source_row: Any, target: Any, start: Any, target_row: Any
) -> Any:
    """Write a square of `WIDE` by `WIDE` numbers with rows and columns exchanged."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (start_of(context, builder, signature, args, k) for k in (0, 3))
        source_row, target_row, number = args[2], args[5], args[2].type
        starts = [builder.gep(source, [builder.mul(source_row, number(k))]) for k in range(WIDE)]
        for start in starts:
            fetch(builder, start, number(4 * WIDE), 1)
        rows = [read(builder, start) for start in starts]
        step = 1
        while step < WIDE:
            for k in range(WIDE):
                if k & step == 0:
                    low = [j if j & step == 0 else j - step + WIDE for j in range(WIDE)]
                    high = [j + step if j & step == 0 else j + WIDE for j in range(WIDE)]
                    pair = rows[k], rows[k + step]
                    rows[k], rows[k + step] = (builder.shuffle_vector(*pair, indices(ks)) for ks in (low, high))
            step *= 2
        for k, row in enumerate(rows):
            write(builder, row, builder.gep(target, [builder.mul(target_row, number(k))]))
        return context.get_dummy_value()

    return types.void(source, first, source_row, target, start, target_row), generate


_turn: Callable[..., None] = intrinsic(_turn_square)  # type: ignore[assignment]
_wide = _tile(_ROWS, _VECTORS, cut=True, masked=False)
_narrow, _rest = (_tile(_NARROW_ROWS, 1, cut=cut, masked=cut) for cut in (False, True))
PANEL = _VECTORS * WIDE
"""Columns of the result that are computed together."""


@shared(VECTOR, *["int64"] * 3, VECTOR, *["int64"] * 2, VECTOR, *["int64"] * 6)
def product(
    a: Array,
    a_first: int,
    a_row: int,
    a_column: int,
    b: Array,
    b_first: int,
    b_row: int,
    c: Array,
    c_first: int,
    c_row: int,
    rows: int,
    columns: int,
    depth: int,
    add: int,
) -> None:
    """`c = a @ b`, or `c += a @ b` where `add` is not 0: (rows, depth) by (depth, columns).

    Each begins at its first number and has so many numbers from row to row, a from column to column, too; the columns
    of b and c lie side by side.
    """
    done = 0
    while columns - done >= PANEL:
        for r in range(0, rows, _ROWS):
            own, target, last = a_first + r * a_row, c_first + r * c_row + done, rows - 1 - r
            _wide(a, own, a_row, a_column, b, b_first + done, b_row, c, target, c_row, last, 0, depth, add)
        done += PANEL
    while done < columns:
        for r in range(0, rows, _NARROW_ROWS):
            own, target, last = a_first + r * a_row, c_first + r * c_row + done, rows - 1 - r
            width = columns - done
            if r + _NARROW_ROWS <= rows and width >= WIDE:
                _narrow(a, own, a_row, a_column, b, b_first + done, b_row, c, target, c_row, last, width, depth, add)
            else:
                _rest(a, own, a_row, a_column, b, b_first + done, b_row, c, target, c_row, last, width, depth, add)
        done += WIDE


@shared(VECTOR, *["int64"] * 4, VECTOR, *["int64"] * 2)
def turned(
    source: Array, first: int, source_row: int, rows: int, columns: int, target: Array, start: int, target_row: int
) -> None:
    """Write a matrix (rows, columns) with rows and columns exchanged; each begins at its first number."""
    whole_rows, whole_columns = rows // WIDE * WIDE, columns // WIDE * WIDE
    for i in range(0, whole_rows, WIDE):
        for j in range(0, whole_columns, WIDE):
            _turn(source, first + i * source_row + j, source_row, target, start + j * target_row + i, target_row)
    for i in range(rows):
        for j in range(whole_columns if i < whole_rows else 0, columns):
            target[start + j * target_row + i] = source[first + i * source_row + j]


def _move(
    _context: Any,
    source: Any,
    first: Any,
    source_row: Any,
    target: Any,
    start: Any,
    target_row: Any,
    rows: Any,
    columns: Any,
    scale: Any,
) -> Any:
    """Write a matrix (rows, columns) times `scale`; each begins at its first number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (start_of(context, builder, signature, args, k) for k in (0, 3))
        source_row, target_row, (rows, columns, scale) = args[2], args[5], args[6:]
        factor = repeated(builder, scale)
        with cgutils.for_range(builder, rows) as loop:
            own = builder.gep(source, [builder.mul(loop.index, source_row)])
            to = builder.gep(target, [builder.mul(loop.index, target_row)])

            def move(place: Any, mask: Any) -> None:
                numbers = read(builder, builder.gep(own, [place]), mask)
                write(builder, builder.fmul(numbers, factor), builder.gep(to, [place]), mask)

            along(builder, columns, move)
        return context.get_dummy_value()

    return types.void(source, first, source_row, target, start, target_row, rows, columns, types.float32), generate


moved: Callable[..., None] = intrinsic(_move)  # type: ignore[assignment]


def _flat(_context: Any, x: Any) -> Any:
    """All numbers of a contiguous array, (n,). Numba's `reshape` takes as long as a small product to see that it is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, found = array_of(context, builder, signature, args, 0), context.make_array(signature.return_type)
        found = found(context, builder)
        shared = {name: getattr(source, name) for name in ("data", "itemsize", "meminfo", "parent")}
        populate_array(found, shape=[source.nitems], strides=[source.itemsize], **shared)
        return impl_ret_borrowed(context, builder, signature.return_type, found._getvalue())

    if x.layout != "C":
        return None  # which Numba takes for: there is no such function of this
    return types.Array(x.dtype, 1, "C")(x), generate


flat: Callable[[Array], Array] = intrinsic(_flat)  # type: ignore[assignment]


@compiled
def by_turned(x: Array, matrix: Array, first: int, end: int, scale: np.float32, out: Array, add: bool) -> None:
    """Columns `first` to `end` of `out = scale * x @ matrix.T`, or with `add` of `out += scale * x @ matrix.T`.

    (rows, depth) by (columns, depth), contiguous. A panel of the matrix at a time is turned and stays in a cache.
    """
    rows, depth = x.shape
    panel, width = np.empty(depth * PANEL, np.float32), out.shape[1]
    for column in range(first, end, PANEL):
        columns = min(PANEL, end - column)
        turned(flat(matrix), column * depth, depth, columns, depth, panel, 0, PANEL)
        if scale != 1:
            for k in range(depth):
                for j in range(columns):
                    panel[k * PANEL + j] *= scale
        product(flat(x), 0, depth, 1, panel, 0, PANEL, flat(out), column, width, rows, columns, depth, int(add))
