"""How compiled code multiplies in LLVM's own terms: vectors that stay in registers, read and written whole or masked.

Main entries: `WIDE`, `REGISTERS`; the others are steps of the intrinsics beside this file, which are given a builder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils

_FLOAT, _INT32, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
_FLAGS = ("reassoc", "contract", "nsz", "arcp")
_CACHE_LINE = 16
"""Numbers in a line of the caches."""
_LANE = 4
"""Numbers in 128 bits of a register."""


def _registers() -> tuple[int, int]:
    """Numbers in a register, and how many registers of sums leave room for what is multiplied."""
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know them everywhere
        features = {}
    return (16, 16) if features.get("avx512f") else (8, 12)


WIDE, REGISTERS = _registers()
REGISTER, _MASK = ir.VectorType(_FLOAT, WIDE), ir.VectorType(ir.IntType(1), WIDE)
"""A register of numbers."""


def array_of(context: Any, builder: Any, signature: Any, args: Any, k: int) -> Any:
    """Argument k, an array."""
    return context.make_array(signature.args[k])(context, builder, args[k])


def start_of(context: Any, builder: Any, signature: Any, args: Any, k: int) -> Any:
    """Where argument k, an array, has the number that the argument behind it says."""
    return builder.gep(array_of(context, builder, signature, args, k).data, [args[k + 1]])


def row_of(builder: Any, matrix: Any, first: Any, k: int, dim: Any) -> Any:
    """Where row `first + k` of a matrix begins."""
    return builder.gep(matrix.data, [builder.mul(builder.add(first, first.type(k)), dim)])


def up_to(builder: Any, first: Any, n: int, last: Any) -> list[Any]:
    """The n numbers from `first` on; for those behind the last, the last again."""
    numbers = [builder.add(first, first.type(k)) for k in range(n)]
    return [builder.select(builder.icmp_signed("<", number, last), number, last) for number in numbers]


def zeros(builder: Any, n: int) -> list[Any]:
    """Sums that have just begun."""
    none = ir.Constant(REGISTER, [0.0] * WIDE)
    return [cgutils.alloca_once_value(builder, none) for _ in range(n)]


def mask_of(builder: Any, n: Any) -> Any:
    """A mask of the first n numbers of a vector."""
    whole = ir.VectorType(n.type, WIDE)
    return builder.icmp_signed("<", ir.Constant(whole, list(range(WIDE))), repeated(builder, n, whole))


def read(builder: Any, pointer: Any, mask: Any = None) -> Any:
    """A vector, zeros where it is masked."""
    pointer = builder.bitcast(pointer, REGISTER.as_pointer())
    if mask is None:
        return builder.load(pointer, align=4)
    kind = ir.FunctionType(REGISTER, [REGISTER.as_pointer(), _INT32, _MASK, REGISTER])
    load = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{WIDE}f32.p0v{WIDE}f32")
    return builder.call(load, [pointer, _INT32(4), mask, ir.Constant(REGISTER, [0.0] * WIDE)])


def write(builder: Any, vector: Any, pointer: Any, mask: Any = None) -> None:
    """Store a vector, where it is masked nothing."""
    pointer = builder.bitcast(pointer, vector.type.as_pointer())
    if mask is None:
        builder.store(vector, pointer, align=4)
        return
    kind = ir.FunctionType(ir.VoidType(), [REGISTER, REGISTER.as_pointer(), _INT32, _MASK])
    store = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.v{WIDE}f32.p0v{WIDE}f32")
    builder.call(store, [vector, pointer, _INT32(4), mask])


def repeated(builder: Any, number: Any, vectors: Any = REGISTER) -> Any:
    """A vector of one number."""
    alone = builder.insert_element(ir.Constant(vectors, ir.Undefined), number, _INT32(0))
    return builder.shuffle_vector(alone, alone, indices([0] * vectors.count))


def add_products(builder: Any, totals: list[Any], a: list[Any], b: list[Any]) -> None:
    """`total += a * b` for each of the three's numbers."""
    for total, one, other in zip(totals, a, b, strict=True):
        product = builder.fmul(one, other, flags=_FLAGS)
        builder.store(builder.fadd(builder.load(total), product, flags=_FLAGS), total)


def along(builder: Any, n: Any, step: Callable[[Any, Any], None]) -> None:
    """A `step` for each `WIDE` of n numbers, told where they begin, and a masked one for what is left."""
    wide = n.type(WIDE)
    with cgutils.for_range(builder, builder.udiv(n, wide)) as loop:
        step(builder.mul(loop.index, wide), None)
    rest = builder.urem(n, wide)
    with builder.if_then(builder.icmp_signed("!=", rest, n.type(0))):
        step(builder.sub(n, rest), mask_of(builder, rest))


def fetch(builder: Any, data: Any, place: Any, n: int) -> None:
    """Ask for n numbers that will be read soon, line by line; it may be asked for what is not there."""
    address = _BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [address, _INT32, _INT32, _INT32])
    ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    for first in range(0, n, _CACHE_LINE):
        pointer = builder.gep(data, [builder.add(place, place.type(first))])
        builder.call(ask, [builder.bitcast(pointer, address), _INT32(0), _INT32(3), _INT32(1)])


def sums_of(builder: Any, vectors: list[Any]) -> list[Any]:
    """The sums of each of the vectors' numbers, in order, of 1, 2, 4, ... vectors; up to `WIDE` of them in a vector.

    First within lanes of 128 bits, then of whole lanes: these, processors exchange faster than just any numbers.
    """
    for step in range(WIDE.bit_length() - 1):
        piece, span = (1, _LANE) if step < _LANE.bit_length() - 1 else (_LANE, WIDE)
        if len(vectors) == 1:
            vectors = vectors * 2  # whose sums are not looked at
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [_sums_of_pair(builder, *pair, piece, span) for pair in pairs]
    return vectors


def _sums_of_pair(builder: Any, a: Any, b: Any, piece: int, span: int) -> Any:
    """Sums of neighbouring pieces: of every span, those of a in the first half, those of b in the second."""
    first = [
        vector + start + place + k
        for start in range(0, WIDE, span)
        for vector in (0, WIDE)
        for place in range(0, span, 2 * piece)
        for k in range(piece)
    ]
    even, odd = (builder.shuffle_vector(a, b, indices([k + by for k in first])) for by in (0, piece))
    return builder.fadd(even, odd, flags=_FLAGS)


def indices(places: Any) -> Any:
    """Places of a vector's numbers, for a shuffle."""
    return ir.Constant(ir.VectorType(_INT32, len(places)), list(places))
