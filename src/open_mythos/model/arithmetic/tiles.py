"""The inner loops of products of few rows, in LLVM's own terms: sums stay in registers.

Main entries: `sums_1`, `sums_2` and `sums_4` for as many rows of x, `tile_16` and `tile_32` for rows side by side, all
by a matrix (width, dim); `tile_along` by the columns of a matrix. All arrays are float32 and contiguous. Where a matrix
comes from memory, what counts is how it is read: `sums_` in four long streams, tiles with what is next fetched ahead
(docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT, _INT32, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
_FLAGS = ("reassoc", "contract", "nsz", "arcp")
_ROWS_AHEAD = 8
"""How far ahead `tile_along` fetches."""
_CACHE_LINE = 16
"""Numbers in a line of the caches."""


def _registers() -> tuple[int, int]:
    """Numbers in a register, and how many registers of sums leave room for what is multiplied."""
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know them everywhere
        features = {}
    return (16, 16) if features.get("avx512f") else (8, 12)


WIDE, _REGISTERS = _registers()

CHANNELS = 4
"""How many of a matrix's rows `sums_1`, `sums_2` and `sums_4` multiply by."""

COLUMNS = _REGISTERS // 4 * WIDE
"""How many of a matrix's columns `tile_along` multiplies by."""

CHANNELS_16, CHANNELS_32 = (_REGISTERS * WIDE // lanes for lanes in (16, 32))
"""How many of a matrix's rows `tile_16` and `tile_32` multiply by."""


def _sums(rows: int) -> Callable[..., tuple[float, ...]]:
    """Products along what is contiguous, each in a register of partial sums."""

    @intrinsic
    def sums(_context: Any, x: Any, row: Any, weight: Any, channel: Any, apart: Any) -> Any:
        """Rows of x (n, dim) from `row` on, by four rows of a matrix (width, dim): `channel` and others so far `apart`.

        Without dim's last numbers, those behind the last multiple of `WIDE`. Row by row, the four sums of each.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vectors = ir.VectorType(_FLOAT, WIDE)
            source, matrix = (array_of(context, builder, signature, args, k) for k in (0, 2))
            dim = cgutils.unpack_tuple(builder, matrix.shape)[1]
            own = [_row(builder, source, args[1], k, dim) for k in range(rows)]
            channels = [builder.add(args[3], builder.mul(args[4], args[4].type(k))) for k in range(CHANNELS)]
            others = [_row(builder, matrix, channel, 0, dim) for channel in channels]
            totals = _zeros(builder, vectors, rows * CHANNELS)
            with cgutils.for_range(builder, builder.udiv(dim, dim.type(WIDE))) as loop:
                place = builder.mul(loop.index, dim.type(WIDE))
                factors = [_load(builder, other, place, vectors) for other in others]
                for k, row in enumerate(own):
                    repeated = [_load(builder, row, place, vectors)] * CHANNELS
                    add_products(builder, totals[k * CHANNELS : (k + 1) * CHANNELS], repeated, factors)
            results = [_reduce(builder, builder.load(total)) for total in totals]
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
            vectors = ir.VectorType(_FLOAT, lanes)
            source, matrix, target = (array_of(context, builder, signature, args, k) for k in (0, 1, 3))
            dim = cgutils.unpack_tuple(builder, matrix.shape)[1]
            others = [_row(builder, matrix, args[2], k, dim) for k in range(channels)]
            ahead = _row(builder, matrix, args[2], channels, dim)
            totals = _zeros(builder, vectors, channels)
            with cgutils.for_range(builder, dim) as loop:
                _fetch(builder, ahead, builder.mul(loop.index, dim.type(channels)), channels)
                numbers = _load(builder, source.data, builder.mul(loop.index, dim.type(lanes)), vectors)
                factors = [
                    repeated(builder, builder.load(builder.gep(other, [loop.index])), vectors) for other in others
                ]
                add_products(builder, totals, [numbers] * channels, factors)
            for k, total in enumerate(totals):
                place = builder.gep(target.data, [dim.type(k * lanes)])
                builder.store(builder.load(total), builder.bitcast(place, vectors.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(panel, weight, channel, out), generate

    return tile  # type: ignore[no-any-return]


def _tile_along(_context: Any, x: Any, row: Any, last: Any, matrix: Any, column: Any, out: Any) -> Any:
    """Four rows of x (n, dim) from `row` on, none behind `last`, by columns of a matrix (dim, width) from `column` on.

    To `out`, `COLUMNS` numbers for each of the rows; for those behind the last, its own.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = ir.VectorType(_FLOAT, WIDE)
        source, weights, target = (array_of(context, builder, signature, args, k) for k in (0, 3, 5))
        dim, width = cgutils.unpack_tuple(builder, weights.shape)
        rows = [builder.add(args[1], args[1].type(k)) for k in range(4)]
        rows = [builder.select(builder.icmp_signed("<", k, args[2]), k, args[2]) for k in rows]
        own = [_row(builder, source, k, 0, dim) for k in rows]
        totals = _zeros(builder, vectors, 4 * (COLUMNS // WIDE))
        with cgutils.for_range(builder, dim) as loop:
            place = builder.add(builder.mul(loop.index, width), args[4])
            _fetch(builder, weights.data, builder.add(place, builder.mul(width, width.type(_ROWS_AHEAD))), COLUMNS)
            parts = range(0, COLUMNS, WIDE)
            factors = [_load(builder, weights.data, builder.add(place, place.type(k)), vectors) for k in parts]
            for k, numbers in enumerate(own):
                number = repeated(builder, builder.load(builder.gep(numbers, [loop.index])), vectors)
                add_products(
                    builder, totals[k * len(factors) : (k + 1) * len(factors)], [number] * len(factors), factors
                )
        for k, total in enumerate(totals):
            place = builder.gep(target.data, [dim.type(k * WIDE)])
            builder.store(builder.load(total), builder.bitcast(place, vectors.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(x, row, last, matrix, column, out), generate


tile_along: Callable[..., None] = intrinsic(_tile_along)  # type: ignore[assignment]


def array_of(context: Any, builder: Any, signature: Any, args: Any, k: int) -> Any:
    """Argument k, an array."""
    return context.make_array(signature.args[k])(context, builder, args[k])


def _row(builder: Any, matrix: Any, first: Any, k: int, dim: Any) -> Any:
    """Where row `first + k` of a matrix begins."""
    return builder.gep(matrix.data, [builder.mul(builder.add(first, first.type(k)), dim)])


def _zeros(builder: Any, vectors: Any, n: int) -> list[Any]:
    zeros = ir.Constant(vectors, [0.0] * vectors.count)
    return [cgutils.alloca_once_value(builder, zeros) for _ in range(n)]


def _load(builder: Any, data: Any, place: Any, vectors: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(data, [place]), vectors.as_pointer()), align=4)


def repeated(builder: Any, number: Any, vectors: Any) -> Any:
    alone = builder.insert_element(ir.Constant(vectors, ir.Undefined), number, _INT32(0))
    return builder.shuffle_vector(alone, alone, indices([0] * vectors.count))


def add_products(builder: Any, totals: list[Any], a: list[Any], b: list[Any]) -> None:
    for total, one, other in zip(totals, a, b, strict=True):
        product = builder.fmul(one, other, flags=_FLAGS)
        builder.store(builder.fadd(builder.load(total), product, flags=_FLAGS), total)


def _fetch(builder: Any, data: Any, place: Any, n: int) -> None:
    """Ask for n numbers that will be read soon, line by line; it may be asked for what is not there."""
    address = _BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [address, _INT32, _INT32, _INT32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    for first in range(0, n, _CACHE_LINE):
        pointer = builder.gep(data, [builder.add(place, place.type(first))])
        builder.call(fetch, [builder.bitcast(pointer, address), _INT32(0), _INT32(3), _INT32(1)])


def _reduce(builder: Any, vector: Any) -> Any:
    """The sum of a vector's numbers."""
    while vector.type.count > 1:
        half = vector.type.count // 2
        low, high = (builder.shuffle_vector(vector, vector, indices(range(first, first + half))) for first in (0, half))
        vector = builder.fadd(low, high, flags=_FLAGS)
    return builder.extract_element(vector, _INT32(0))


def indices(places: Any) -> Any:
    return ir.Constant(ir.VectorType(_INT32, len(places)), list(places))


sums_1, sums_2, sums_4 = _sums(1), _sums(2), _sums(4)
tile_16, tile_32 = _tile(16, CHANNELS_16), _tile(32, CHANNELS_32)
