"""Queries, keys and values of grouped-query attention for some rows, and the way back.

Main entries: `project`, `project_back`.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.few_rows.compiled import compiled
from open_mythos.model.many_rows.pointwise import (
    BACK,
    THERE,
    copied,
    normalise,
    normalise_again,
    rotated,
    row_back,
    scale_of,
    scale_row,
)
from open_mythos.model.many_rows.products import by, by_turned
from open_mythos.model.rows import Array


@compiled
def project(
    x: Array,
    gain: Array,
    eps: np.float32,
    qkv: Array,
    normed_heads: bool,
    qk_gain: Array,
    rotations: Array,
    first: int,
    scales: Array,
    normed: Array,
    raw: Array,
    q: Array,
    k: Array,
    v: Array,
) -> None:
    """From rows x (n, dim) to q (n, H, D), k and v (n, K, D); the first row is number `first` of all sequences'.

    `raw` (n, (H + 2K) * D) is what comes out of the matrix, before the heads' norms.
    """
    n, n_heads, n_kv = x.shape[0], q.shape[1], k.shape[1]
    normalise(x, gain, eps, scales, normed)
    by_turned(normed, qkv, raw, False)
    heads = raw.reshape(n, n_heads + 2 * n_kv, q.shape[2])
    for i in range(n):
        rotation = rotations[(first + i) % rotations.shape[0]]
        for h in range(n_heads + n_kv):
            source, own = heads[i, h], qk_gain[h]
            target = q[i, h] if h < n_heads else k[i, h - n_heads]
            scale = scale_of(source, eps) if normed_heads else np.float32(1)
            scale_row(source, scale, own, target)
            rotated(target, rotation, THERE)
        for h in range(n_kv):
            copied(heads[i, n_heads + n_kv + h], v[i, h])


@compiled
def project_back(
    x: Array,
    gain: Array,
    eps: np.float32,
    qkv: Array,
    normed_heads: bool,
    qk_gain: Array,
    rotations: Array,
    first: int,
    scales: Array,
    raw: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    normed: Array,
    draw: Array,
    dnormed: Array,
    dqk_gain: Array,
) -> None:
    """Gradients of the heads, which are changed, to those of `raw` and of the norm's result, computed again."""
    n, n_heads, n_kv = x.shape[0], dq.shape[1], dk.shape[1]
    shape = (n, n_heads + 2 * n_kv, dq.shape[2])
    normalise_again(x, gain, scales, normed)
    heads, to = raw.reshape(shape), draw.reshape(shape)
    for i in range(n):
        rotation = rotations[(first + i) % rotations.shape[0]]
        for h in range(n_heads + n_kv):
            grad = dq[i, h] if h < n_heads else dk[i, h - n_heads]
            rotated(grad, rotation, BACK)
            if normed_heads:
                row_back(heads[i, h], qk_gain[h], scale_of(heads[i, h], eps), grad, to[i, h], dqk_gain[h])
            else:
                copied(grad, to[i, h])
        for h in range(n_kv):
            copied(dv[i, h], to[i, n_heads + n_kv + h])
    by(draw, qkv, dnormed, False)
