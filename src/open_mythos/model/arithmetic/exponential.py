"""The exponential and the logarithm, in LLVM's own terms: of a number, or of each number of a vector.

Main entries: `exp`, whose loops become vector instructions; `exponential` and `logarithm`, steps of intrinsics, which
are given a builder. The polynomials are those of Cephes (Moshier 1989), `expf` and `logf`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from open_mythos.model.arithmetic.compiled import compiled

_OF_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_OF_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_LOG_2_ROUGH, _LOG_2_REST = 0.693359375, -2.12194440e-4
"""The logarithm of 2 in two parts: the first has so few digits that some number of times it is exact."""
_BIAS, _DIGITS = 127, 23
"""What is added to the exponent of a float32, and the bits of its digits, which come below."""
_WHOLE = 1.5 * 2.0**_DIGITS
"""Numbers near this one are whole."""
_IN_ORDER = ("contract",)
"""Sums are taken as they are written: rounded, they are not the same otherwise."""


def exponential(builder: Any, x: Any) -> Any:
    """`exp(x)` to about one unit in the last place, from 1e-38 to 2e38."""
    low, high = ir.Constant(x.type, -87.33654), ir.Constant(x.type, 88.37626)
    bounded = builder.select(builder.fcmp_ordered(">", low, x), low, x)
    bounded = builder.select(builder.fcmp_ordered("<", high, bounded), high, bounded)
    # So large a number has no digits behind the point, and the last of those before are the exponent as it is stored.
    shifted = _plus(builder, bounded, 1.44269504, _WHOLE + _BIAS)
    power = builder.shl(builder.bitcast(shifted, _integers_like(x)), ir.Constant(_integers_like(x), _DIGITS))
    whole = builder.fsub(shifted, ir.Constant(x.type, _WHOLE + _BIAS), flags=_IN_ORDER)
    rest = _plus(builder, whole, -_LOG_2_REST, _plus(builder, whole, -_LOG_2_ROUGH, bounded))
    series = _polynomial(builder, rest, (*_OF_EXP, 1.0, 1.0))
    return builder.fmul(series, builder.bitcast(power, x.type), flags=_IN_ORDER)


def logarithm(builder: Any, x: Any) -> Any:
    """`log(x)` to about one unit in the last place, of positive numbers from 1e-38 on."""
    integers = _integers_like(x)
    bits = builder.bitcast(x, integers)
    # The exponent is that of x / root, where root is sqrt(1/2), so that what is left lies between root and 2 root.
    root = ir.Constant(integers, 0x3F3504F3)
    exponent = builder.ashr(builder.sub(bits, root), ir.Constant(integers, _DIGITS))
    left = builder.bitcast(builder.sub(bits, builder.shl(exponent, ir.Constant(integers, _DIGITS))), x.type)
    whole = builder.sitofp(exponent, x.type)
    more = builder.fsub(left, ir.Constant(x.type, 1.0), flags=_IN_ORDER)
    square = builder.fmul(more, more, flags=_IN_ORDER)
    cube = builder.fmul(square, more, flags=_IN_ORDER)
    series = _plus(
        builder,
        cube,
        _polynomial(builder, more, _OF_LOG),
        builder.fmul(whole, ir.Constant(x.type, _LOG_2_REST), flags=_IN_ORDER),
    )
    series = builder.fadd(more, _plus(builder, square, -0.5, series), flags=_IN_ORDER)
    found = _plus(builder, whole, _LOG_2_ROUGH, series)
    return builder.select(builder.fcmp_ordered("ord", x, x), found, x)


def _of_number(_context: Any, x: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return exponential(builder, args[0])

    return types.float32(types.float32), generate


_exp: Callable[[np.float32], np.float32] = intrinsic(_of_number)  # type: ignore[assignment]


@compiled
def exp(x: np.float32) -> np.float32:
    """`exponential` of a number."""
    return _exp(x)


def _plus(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, of which b and c may be numbers; rounded once, where the processor can."""
    b, c = (value if isinstance(value, ir.Value) else ir.Constant(a.type, value) for value in (b, c))
    return builder.fadd(builder.fmul(a, b, flags=_IN_ORDER), c, flags=_IN_ORDER)


def _polynomial(builder: Any, x: Any, factors: tuple[float, ...]) -> Any:
    """The sum of the factors times powers of x, the highest first."""
    return reduce(lambda total, factor: _plus(builder, x, total, factor), factors[1:], ir.Constant(x.type, factors[0]))


def _integers_like(x: Any) -> Any:
    number = ir.IntType(32)
    return ir.VectorType(number, x.type.count) if isinstance(x.type, ir.VectorType) else number
