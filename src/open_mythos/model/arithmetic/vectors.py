"""Single rows: root-mean-square norms, rotations, copies and sums.

Main entries: `scale_of`, `scale_row`, `rotated`, `copied`, `add_to`.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.rows import Array


@compiled
def scale_of(row: Array, eps: np.float32) -> np.float32:
    """1 over the root mean square of a row."""
    total = np.float32(0)
    for j in range(row.shape[0]):
        total += row[j] * row[j]
    return np.float32(1) / np.sqrt(total / np.float32(row.shape[0]) + eps)


@compiled
def scale_row(row: Array, scale: np.float32, gain: Array, out: Array) -> None:
    """`out = row * scale * gain`, all (n,)."""
    for j in range(row.shape[0]):
        out[j] = row[j] * scale * gain[j]


@compiled
def rotated(x: Array, rotation: Array, sign: np.float32) -> None:
    """Rotate x (dim,) in place, channels i and i + dim/2 paired, by the cosines and then sines `rotation` (dim,).

    A rotation (0,) is none; with the sign -1, x is rotated back.
    """
    half = rotation.shape[0] // 2
    a, b, cos, sin = x[:half], x[half:], rotation[:half], rotation[half:]
    for i in range(half):
        low, high, sine = a[i], b[i], sign * sin[i]
        a[i] = low * cos[i] - high * sine
        b[i] = high * cos[i] + low * sine


THERE, BACK = np.float32(1), np.float32(-1)
"""Signs of rotations."""


@compiled
def copied(x: Array, out: Array) -> None:
    """`out = x`, both (n,)."""
    for j in range(x.shape[0]):
        out[j] = x[j]


@compiled
def add_to(x: Array, out: Array) -> None:
    """`out += x`, both (n,)."""
    for j in range(x.shape[0]):
        out[j] += x[j]
