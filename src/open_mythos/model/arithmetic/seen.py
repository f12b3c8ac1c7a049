"""What a few queries make of rows that a list names, in LLVM's own terms: sums stay in registers.

Main entries: `score_1` and `score_4` for as many queries, `mix_1` and `mix_4` for as many outputs, and `narrow_1` and
`narrow_4` for the last columns. All matrices are float32 and contiguous. Neighbours share what is read: four queries a
row of the list, four rows a query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from open_mythos.model.arithmetic.registers import (
    REGISTER,
    REGISTERS,
    WIDE,
    add_products,
    along,
    array_of,
    indices,
    mask_of,
    read,
    repeated,
    row_of,
    sums_of,
    up_to,
    write,
    zeros,
)

_SUMS = 16
"""How many sums are taken of their vectors together; where there are fewer registers, some are of nothing."""
_QUAD = 4

ROWS_1, ROWS_4 = (REGISTERS // queries for queries in (1, 4))
"""How many rows of the list `score_1` and `score_4` multiply by."""

SPARE = _SUMS
"""How many numbers behind the last score may be written."""

MIXED = REGISTERS // 4 * WIDE
"""How many columns `mix_1` and `mix_4` take, whatever `width` says; `narrow_1` and `narrow_4` take that or `WIDE`."""


def _score(queries: int) -> Callable[..., None]:
    @intrinsic
    def score(_context: Any, x: Any, row: Any, last: Any, matrix: Any, seen: Any, first: Any, out: Any) -> Any:
        """Rows of x (n, dim) from `row` on, none behind `last`, by the matrix's rows that `seen` names from `first` on.

        To the columns of out (n, ...) from `first` on, in its first rows; there are some numbers more than `seen` has.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, weights, listed, target = (array_of(context, builder, signature, args, k) for k in (0, 3, 4, 6))
            dim, stride = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (source, target))
            n_rows, apart = REGISTERS // queries, _SUMS // queries
            end = builder.sub(cgutils.unpack_tuple(builder, listed.shape)[0], dim.type(1))
            places = [builder.load(builder.gep(listed.data, [at])) for at in up_to(builder, args[5], n_rows, end)]
            own = [row_of(builder, source, at, 0, dim) for at in up_to(builder, args[1], queries, args[2])]
            others = [row_of(builder, weights, place, 0, dim) for place in places]
            totals = zeros(builder, queries * n_rows)

            def add(place: Any, mask: Any) -> None:
                factors = [read(builder, builder.gep(other, [place]), mask) for other in others]
                for k, numbers in enumerate(own):
                    one = read(builder, builder.gep(numbers, [place]), mask)
                    add_products(builder, totals[k * n_rows : (k + 1) * n_rows], [one] * n_rows, factors)

            along(builder, dim, add)
            vectors = [ir.Constant(REGISTER, [0.0] * WIDE)] * _SUMS
            for k in range(queries):
                for j in range(n_rows):
                    vectors[k * apart + j] = builder.load(totals[k * n_rows + j])
            sums = sums_of(builder, vectors)
            for k in range(0, _SUMS, _QUAD):
                whole, begin = sums[k // WIDE], k % WIDE
                quad = builder.shuffle_vector(whole, whole, indices(range(begin, begin + _QUAD)))
                place = builder.add(
                    builder.mul(stride, dim.type(k // apart)), builder.add(args[5], dim.type(k % apart))
                )
                write(builder, quad, builder.gep(target.data, [place]))
            return context.get_dummy_value()

        return types.void(x, row, last, matrix, seen, first, out), generate

    return score  # type: ignore[no-any-return]


def _mix(outputs: int, n_vectors: int, *, masked: bool) -> Callable[..., None]:
    @intrinsic
    def mix(
        _context: Any, weights: Any, matrix: Any, seen: Any, column: Any, width: Any, out: Any, row: Any, last: Any
    ) -> Any:
        """Sums of the matrix's rows that `seen` names, by rows of weights (n, ...): their columns from `column` on.

        To rows `row` to `last` of out, `width` columns of each where it is masked.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            factors, source, listed, target = (array_of(context, builder, signature, args, k) for k in (0, 1, 2, 5))
            stride, dim, to = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (factors, source, target))
            (n,) = cgutils.unpack_tuple(builder, listed.shape)
            mask = mask_of(builder, args[4]) if masked else None
            rows = up_to(builder, args[6], outputs, args[7])
            own = [builder.gep(factors.data, [builder.mul(builder.sub(r, args[6]), stride)]) for r in rows]
            totals = zeros(builder, outputs * n_vectors)
            parts = [dim.type(v * WIDE) for v in range(n_vectors)]
            with cgutils.for_range(builder, n) as loop:
                place = builder.mul(builder.load(builder.gep(listed.data, [loop.index])), dim)
                start = builder.gep(source.data, [builder.add(place, args[3])])
                numbers = [read(builder, builder.gep(start, [part]), mask) for part in parts]
                for k, weight in enumerate(own):
                    one = repeated(builder, builder.load(builder.gep(weight, [loop.index])))
                    add_products(builder, totals[k * n_vectors : (k + 1) * n_vectors], [one] * n_vectors, numbers)
            for k, r in enumerate(rows):
                start = builder.gep(target.data, [builder.add(builder.mul(r, to), args[3])])
                for v, part in enumerate(parts):
                    write(builder, builder.load(totals[k * n_vectors + v]), builder.gep(start, [part]), mask)
            return context.get_dummy_value()

        return types.void(weights, matrix, seen, column, width, out, row, last), generate

    return mix  # type: ignore[no-any-return]


score_1, score_4 = _score(1), _score(4)
mix_1, mix_4 = (_mix(outputs, MIXED // WIDE, masked=False) for outputs in (1, 4))
narrow_1, narrow_4 = (_mix(outputs, 1, masked=True) for outputs in (1, 4))
