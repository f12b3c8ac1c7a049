"""The inner loops of products of few rows, in LLVM's own terms: sums stay in registers.

Main entries: `sums_1`, `sums_2` and `sums_4` for as many rows of x, `tile_16` and `tile_32` for rows side by side, all
by a matrix (width, dim); `tile_along` by the columns of a matrix. All arrays are float32 and contiguous. Where a matrix
comes from memory, what counts is how it is read: `sums_` in four long streams, tiles with what is next fetched ahead
(docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from open_mythos.model.arithmetic.registers import (
    FLOAT,
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
"""How many of a matrix's rows `sums_1`, `sums_2` and `sums_4` multiply by."""

COLUMNS = REGISTERS // 4 * WIDE
"""How many of a matrix's columns `tile_along` multiplies by."""

CHANNELS_16, CHANNELS_32 = (REGISTERS * WIDE // lanes for lanes in (16, 32))
"""How many of a matrix's rows `tile_16` and `tile_32` multiply by."""


def _sums(rows: int) -> Callable[..., tuple[float, ...]]:
    """Products along what is contiguous, each in a register of partial sums."""

    @intrinsic
    def sums(_context: Any, x: Any, row: Any, weight: Any, channel: Any, apart: Any) -> Any:
        """Rows of x (n, dim) from `row` on, by four rows of a matrix (width, dim): `channel` and others so far `apart`.

        Row by row, the four sums of each.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, matrix = (array_of(context, builder, signature, args, k) for k in (0, 2))
            dim = cgutils.unpack_tuple(builder, matrix.shape)[1]
            own = [row_of(builder, source, args[1], k, dim) for k in range(rows)]
            channels = [builder.add(args[3], builder.mul(args[4], args[4].type(k))) for k in range(CHANNELS)]
            others = [row_of(builder, matrix, channel, 0, dim) for channel in channels]
            totals = zeros(builder, rows * CHANNELS)

            def add(place: Any, mask: Any) -> None:
                factors = [read(builder, builder.gep(other, [place]), mask) for other in others]
                for k, row in enumerate(own):
                    numbers = [read(builder, builder.gep(row, [place]), mask)] * CHANNELS
                    add_products(builder, totals[k * CHANNELS : (k + 1) * CHANNELS], numbers, factors)

            along(builder, dim, add)
            found = sums_of(builder, [builder.load(total) for total in totals])
            results = [
                builder.extract_element(found[k // WIDE], ir.IntType(32)(k % WIDE)) for k in range(rows * CHANNELS)
            ]
            return context.make_tuple(builder, signature.return_type, results)

        return types.UniTuple(types.float32, rows * CHANNELS)(x, row, weight, channel, apart), generate

    return sums  # type: ignore[no-any-return]


def _tile(lanes: int, channels: int) -> Callable[..., None]:
    """Products along what is side by side: one number of the matrix by a number of every row."""

    @intrinsic
    def tile(_context: Any, panel: Any, weight: Any, channel: Any, out: Any) -> Any:
        """The columns of a panel (dim, lanes) by `channels` rows of a matrix (width, dim) from `channel` on.

        To `out`, `lanes` numbers for each of the channels.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vectors = ir.VectorType(FLOAT, lanes)
            source, matrix, target = (array_of(context, builder, signature, args, k) for k in (0, 1, 3))
            dim = cgutils.unpack_tuple(builder, matrix.shape)[1]
            others = [row_of(builder, matrix, args[2], k, dim) for k in range(channels)]
            ahead = row_of(builder, matrix, args[2], channels, dim)
            totals = zeros(builder, channels, vectors)
            with cgutils.for_range(builder, dim) as loop:
                fetch(builder, ahead, builder.mul(loop.index, dim.type(channels)), channels)
                place = builder.gep(source.data, [builder.mul(loop.index, dim.type(lanes))])
                numbers = read(builder, place, None, vectors)
                factors = [
                    repeated(builder, builder.load(builder.gep(other, [loop.index])), vectors) for other in others
                ]
                add_products(builder, totals, [numbers] * channels, factors)
            for k, total in enumerate(totals):
                place = builder.gep(target.data, [dim.type(k * lanes)])
                write(builder, builder.load(total), place)
            return context.get_dummy_value()

        return types.void(panel, weight, channel, out), generate

    return tile  # type: ignore[no-any-return]


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


sums_1, sums_2, sums_4 = _sums(1), _sums(2), _sums(4)
tile_16, tile_32 = _tile(16, CHANNELS_16), _tile(32, CHANNELS_32)
