"""The inner loops of products of few rows, in LLVM's own terms: sums stay in registers.

Main entries: `sums_1`, `sums_2` and `sums_most` for some rows of x by a matrix (width, dim); `tile_along` by the
columns of a matrix. All arrays are float32 and contiguous. Where a matrix comes from memory, what counts is how it is
read: `sums_` in four long streams; both fetch ahead what comes next (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from open_mythos.model.arithmetic.registers import (
    REGISTERS,
    WIDE,
    add_products,
    along,
    array_of,
    fetch,
    read,
    repeated,
    row_of,
    sums_of,
    up_to,
    write,
    zeros,
)

_ROWS_AHEAD = 8
"""How far ahead `tile_along` fetches."""

CHANNELS = 4
"""How many of a matrix's rows `sums_1`, `sums_2` and `sums_most` multiply by."""

ROWS = 4 if REGISTERS >= 4 * CHANNELS else 2
"""How many rows of x `sums_most` takes."""

COLUMNS = REGISTERS // 4 * WIDE
"""How many of a matrix's columns `tile_along` multiplies by."""


def _sums(rows: int) -> Callable[..., None]:
    """Products along what is contiguous, each in a register of partial sums."""

    @intrinsic
    def sums(
        _context: Any, x: Any, row: Any, weight: Any, channel: Any, apart: Any, ahead: Any, out: Any, place: Any
    ) -> Any:
        """Rows of x (n, dim) from `row` on, by four rows of a matrix (width, dim): `channel` and others so far `apart`.

        To the same rows of `out` (n, 4, ...), at that place. Of rows behind the last, the last is computed again. The
        matrix's row `ahead` is fetched.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, matrix, target = (array_of(context, builder, signature, args, k) for k in (0, 2, 6))
            n, dim = cgutils.unpack_tuple(builder, source.shape)
            places = cgutils.unpack_tuple(builder, target.shape)[-1]
            chosen = up_to(builder, args[1], rows, builder.sub(n, n.type(1)))
            own = [row_of(builder, source, row, 0, dim) for row in chosen]
            channels = [builder.add(args[3], builder.mul(args[4], args[4].type(k))) for k in range(CHANNELS)]
            others = [row_of(builder, matrix, channel, 0, dim) for channel in channels]
            next_row = row_of(builder, matrix, args[5], 0, dim)
            totals = zeros(builder, rows * CHANNELS)

            def add(place: Any, mask: Any) -> None:
                fetch(builder, next_row, place, 1)
                factors = [read(builder, builder.gep(other, [place]), mask) for other in others]
                for k, row in enumerate(own):
                    numbers = [read(builder, builder.gep(row, [place]), mask)] * CHANNELS
                    add_products(builder, totals[k * CHANNELS : (k + 1) * CHANNELS], numbers, factors)

            along(builder, dim, add)
            found = sums_of(builder, [builder.load(total) for total in totals])
            for k, row in enumerate(chosen):
                first = builder.mul(row, row.type(CHANNELS))
                for c in range(CHANNELS):
                    vector, lane = divmod(k * CHANNELS + c, WIDE)
                    number = builder.extract_element(found[vector], ir.IntType(32)(lane))
                    builder.store(number, builder.gep(row_of(builder, target, first, c, places), [args[7]]))
            return context.get_dummy_value()

        return types.void(x, row, weight, channel, apart, ahead, out, place), generate

    return sums  # type: ignore[no-any-return]


def _tile_along(_context: Any, x: Any, row: Any, last: Any, matrix: Any, column: Any, out: Any) -> Any:
    """Four rows of x (n, dim) from `row` on, none behind `last`, by columns of a matrix (dim, width) from `column` on.

    To `out`, `COLUMNS` numbers for each of the rows; for those behind the last, its own.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, weights, target = (array_of(context, builder, signature, args, k) for k in (0, 3, 5))
        dim, width = cgutils.unpack_tuple(builder, weights.shape)
        own = [row_of(builder, source, row, 0, dim) for row in up_to(builder, args[1], 4, args[2])]
        totals = zeros(builder, 4 * (COLUMNS // WIDE))
        with cgutils.for_range(builder, dim) as loop:
            place = builder.add(builder.mul(loop.index, width), args[4])
            fetch(builder, weights.data, builder.add(place, builder.mul(width, width.type(_ROWS_AHEAD))), COLUMNS)
            parts = range(0, COLUMNS, WIDE)
            row = builder.gep(weights.data, [place])
            factors = [read(builder, builder.gep(row, [place.type(k)])) for k in parts]
            for k, numbers in enumerate(own):
                number = repeated(builder, builder.load(builder.gep(numbers, [loop.index])))
                add_products(
                    builder, totals[k * len(factors) : (k + 1) * len(factors)], [number] * len(factors), factors
                )
        for k, total in enumerate(totals):
            place = builder.gep(target.data, [dim.type(k * WIDE)])
            write(builder, builder.load(total), place)
        return context.get_dummy_value()

    return types.void(x, row, last, matrix, column, out), generate


tile_along: Callable[..., None] = intrinsic(_tile_along)  # type: ignore[assignment]


sums_1, sums_2, sums_most = _sums(1), _sums(2), _sums(ROWS)
