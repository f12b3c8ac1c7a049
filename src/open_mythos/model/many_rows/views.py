"""A pass over a layer as compiled code is given it: addresses and sizes, and arrays that lie there.

Main entry: `PASS`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, typeof  # type: ignore[attr-defined]

from open_mythos.model.arithmetic.addresses import pointer
from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.rows import Array

KEPT = (
    *("attn_scales", "raw", "q", "rebuilt_keys", "rebuilt_values", "mixed", "lse", "middle"),
    *("ffn_scales", "gates", "ups", "logits", "factors", "expert_gates", "expert_ups"),
)
"""What the way back needs."""
SCRATCH = ("normed", "low", "latents", "dkv", "ffn_normed", "hidden", "rows", "expert_hidden")
"""What is needed for a moment, both ways. On the way there, `dkv` has the keys and values of latents themselves."""
SCRATCH_BACK = (
    *("dnormed", "draw", "dq", "dkeys", "dvalues", "dmixed", "dlow", "dlatents", "dlatent"),
    *("scaled_dmiddle", "dmiddle", "scaled_dy", "dgates", "dups", "dlogits", "dhidden"),
    *("drows", "row_grads", "dexpert_hidden", "dexpert_gates", "dexpert_ups"),
)
"""The same, on the way back alone."""
COUNTED = ("ends", "owners", "loads")
"""Integers: where the slots of each part's experts end, whose they are, and how many of these are active."""
GIVEN = (
    *("x", "y", "entry_0", "entry_1", "before_0", "before_1", "active", "attn_factors", "ffn_factors"),
    *("dx", "dy", "dentry_0", "dentry_1", "dbefore_0", "dbefore_1", "dsink", "gains"),
)
"""Entries are keys and values, or latents and nothing; those of the loop before serve where a row is not active.
`attn_factors` and `ffn_factors` are what dropout multiplies branches by. What there is not has the address 0. Of gains,
every part has a line, zeros before: both norms' of the layer, then those of attention's own."""
SIZES = (
    "rotations",
    "batch",
    "seq",
    "window",
    "parts",
    "n_heads",
    "n_kv",
    "key_width",
    "value_width",
    "rotary_width",
    "n_gains",
)
PASS = np.dtype([(name, np.int64) for name in (*KEPT, *SCRATCH, *SCRATCH_BACK, *COUNTED, *GIVEN, *SIZES)])
"""Addresses and sizes of one pass."""
PASSES = typeof(np.zeros(1, PASS))
"""What a step is given one of, to Numba."""


@compiled
def numbers_at(address: int, first: int, end: int) -> Array:
    return carray(pointer(address + 4 * first), (end - first,), np.float32)


@compiled
def rows_at(address: int, first: int, end: int, width: int) -> Array:
    """Rows `first` to `end` of a matrix that lies there."""
    return carray(pointer(address + 4 * first * width), (end - first, width), np.float32)


@compiled
def heads_at(address: int, first: int, end: int, heads: int, width: int) -> Array:
    return carray(pointer(address + 4 * first * heads * width), (end - first, heads, width), np.float32)


@compiled
def share_of(n: int, p: Any, part: int) -> tuple[int, int]:
    return n * part // p.parts, n * (part + 1) // p.parts


@compiled
def keys_and_values(layer: Any, p: Any) -> tuple[int, int]:
    if layer.is_latent:
        return p.rebuilt_keys, p.rebuilt_values
    return p.entry_0, p.entry_1


@compiled
def gains_of(p: Any, part: int, first: int, n: int) -> Array:
    start = part * p.n_gains + first
    return numbers_at(p.gains, start, start + n)


@compiled
def active_at(p: Any, first: int, end: int) -> npt.NDArray[np.uint8]:
    return carray(pointer(p.active + first), (end - first,), np.uint8)


@compiled
def rotation_of(p: Any, row: int) -> Array:
    """Cosines and sines of a row's position, (dim,); (0,) without rotary positions."""
    position = row % p.seq
    return numbers_at(p.rotations, position * p.rotary_width, (position + 1) * p.rotary_width)
