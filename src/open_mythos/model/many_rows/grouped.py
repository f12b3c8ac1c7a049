"""Queries, keys and values of grouped-query attention for a part of the rows, and the way back.

Main entries: `project`, `project_back`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from open_mythos.model.arithmetic.addresses import matrix_at
from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.arithmetic.vectors import BACK, THERE, copied, rotated, scale_of, scale_row
from open_mythos.model.many_rows.pointwise import row_back
from open_mythos.model.many_rows.products import by, by_turned
from open_mythos.model.many_rows.views import gains_of, heads_at, rotation_of, rows_at, share_of
from open_mythos.model.rows import Array


@compiled
def project(layer: Any, p: Any, part: int, normed: Array) -> None:
    """From normed rows (n, dim) to this part's queries (n, H, D), keys and values (n, K, D).

    `raw` (n, (H + 2K) * D) is what comes out of the matrix, before the heads' norms.
    """
    first, end = share_of(p.batch * p.seq, p, part)
    qkv, qk_gain, eps = matrix_at(layer.qkv), matrix_at(layer.qk_gain), layer.attn_eps
    raw, q = rows_at(p.raw, first, end, qkv.shape[0]), heads_at(p.q, first, end, p.n_heads, p.key_width)
    k = heads_at(p.entry_0, first, end, p.n_kv, p.key_width)
    v = heads_at(p.entry_1, first, end, p.n_kv, p.value_width)
    by_turned(normed, qkv, raw, False)
    heads = raw.reshape(end - first, p.n_heads + 2 * p.n_kv, p.key_width)
    for i in range(end - first):
        rotation = rotation_of(p, first + i)
        for h in range(p.n_heads + p.n_kv):
            source, own = heads[i, h], qk_gain[h]
            target = q[i, h] if h < p.n_heads else k[i, h - p.n_heads]
            scale = scale_of(source, eps) if layer.has_normed_heads else np.float32(1)
            scale_row(source, scale, own, target)
            rotated(target, rotation, THERE)
        for h in range(p.n_kv):
            copied(heads[i, p.n_heads + p.n_kv + h], v[i, h])


@compiled
def project_back(layer: Any, p: Any, part: int, dnormed: Array) -> None:
    """Gradients of this part's heads, which are changed, to those of `raw` and, to `dnormed`, of the normed rows."""
    first, end = share_of(p.batch * p.seq, p, part)
    qkv, qk_gain, eps = matrix_at(layer.qkv), matrix_at(layer.qk_gain), layer.attn_eps
    raw, draw = rows_at(p.raw, first, end, qkv.shape[0]), rows_at(p.draw, first, end, qkv.shape[0])
    dq = heads_at(p.dq, first, end, p.n_heads, p.key_width)
    dk = heads_at(p.dkeys, first, end, p.n_kv, p.key_width)
    dv = heads_at(p.dvalues, first, end, p.n_kv, p.value_width)
    dqk_gain = gains_of(p, part, 2 * dnormed.shape[1], qk_gain.size).reshape(qk_gain.shape)
    shape = (end - first, p.n_heads + 2 * p.n_kv, p.key_width)
    heads, to = raw.reshape(shape), draw.reshape(shape)
    for i in range(end - first):
        rotation = rotation_of(p, first + i)
        for h in range(p.n_heads + p.n_kv):
            grad = dq[i, h] if h < p.n_heads else dk[i, h - p.n_heads]
            rotated(grad, rotation, BACK)
            if layer.has_normed_heads:
                row_back(heads[i, h], qk_gain[h], scale_of(heads[i, h], eps), grad, to[i, h], dqk_gain[h])
            else:
                copied(grad, to[i, h])
        for h in range(p.n_kv):
            copied(dv[i, h], to[i, p.n_heads + p.n_kv + h])
    by(draw, qkv, dnormed, False)
