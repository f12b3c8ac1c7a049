"""What lies at an address, as arrays: what Numba does for every array that it is given takes longer than that.

Main entries: `pointer`, `integers_at`, `vector_at`, `matrix_at`, `stack_at`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.rows import Array, Rows


def _at(_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


pointer: Any = intrinsic(_at)


@compiled
def integers_at(address: int, first: int, end: int) -> Rows:
    """Integers `first` to `end` of those that lie there."""
    return carray(pointer(address + 8 * first), (end - first,), np.int64)


@compiled
def vector_at(place: Rows) -> Array:
    """What is `described`, by its last dimension."""
    return carray(pointer(place[0]), (place[3],), np.float32)


@compiled
def matrix_at(place: Rows) -> Array:
    """By its last two dimensions."""
    return carray(pointer(place[0]), (place[2], place[3]), np.float32)


@compiled
def stack_at(place: Rows) -> Array:
    """By all three."""
    return carray(pointer(place[0]), (place[1], place[2], place[3]), np.float32)
