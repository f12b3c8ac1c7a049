"""Queries, latents, keys and values of latent attention for a part of the rows, and the way back.

Main entries: `project`, `rebuild`, `rebuild_back`, `project_back`. Keys and values are rebuilt from the latents.
"""

from __future__ import annotations

from typing import Any

from open_mythos.model.arithmetic.addresses import matrix_at, stack_at, vector_at
from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.arithmetic.vectors import BACK, THERE, add_to, copied, rotated, scale_of, scale_row
from open_mythos.model.many_rows.pointwise import row_back
from open_mythos.model.many_rows.products import by, by_turned
from open_mythos.model.many_rows.views import gains_of, heads_at, rotation_of, rows_at, share_of
from open_mythos.model.rows import Array


@compiled
def project(layer: Any, p: Any, part: int, normed: Array) -> None:
    """From normed rows (n, dim) to this part's queries (n, H, nope + rope) and latents (n, rank + rope).

    By way of `raw` (n, q_rank + rank + rope), which is what comes out of the first matrix, and the normed queries.
    """
    first, end = share_of(p.batch * p.seq, p, part)
    down, q_up, kv_gain = matrix_at(layer.down), matrix_at(layer.q_up), vector_at(layer.kv_gain)
    rank, q_rank = kv_gain.shape[0], layer.q_gain[3]
    width = down.shape[0] - q_rank
    nope = p.key_width - (width - rank)
    raw, latents = rows_at(p.raw, first, end, down.shape[0]), rows_at(p.entry_0, first, end, width)
    low, q = rows_at(p.low, first, end, q_rank), heads_at(p.q, first, end, p.n_heads, p.key_width)
    by_turned(normed, down, raw, False)
    _normed_queries(layer, raw, low)
    by_turned(low, q_up, q.reshape(end - first, q_up.shape[0]), False)
    for i in range(end - first):
        rotation = rotation_of(p, first + i)
        for h in range(p.n_heads):
            rotated(q[i, h][nope:], rotation, THERE)
        row, to = raw[i], latents[i]
        own = row[q_rank : q_rank + rank]
        scale_row(own, scale_of(own, layer.attn_eps), kv_gain, to[:rank])
        copied(row[q_rank + rank :], to[rank:])
        rotated(to[rank:], rotation, THERE)


@compiled
def _normed_queries(layer: Any, raw: Array, out: Array) -> None:
    gain = vector_at(layer.q_gain)
    for i in range(out.shape[0]):
        row = raw[i][: gain.shape[0]]
        scale_row(row, scale_of(row, layer.attn_eps), gain, out[i])


@compiled
def rebuild(layer: Any, p: Any, part: int) -> None:
    """Keys (n, H, nope + rope) and values (n, H, V) of this part's latents (n, rank + rope)."""
    first, end = share_of(p.batch * p.seq, p, part)
    kv_up = stack_at(layer.kv_up)
    n_heads, both, rank = kv_up.shape
    nope = both - p.value_width
    latents = rows_at(p.entry_0, first, end, rank + p.key_width - nope)
    rows, kv = rows_at(p.latents, first, end, rank), rows_at(p.dkv, first, end, n_heads * both)
    k = heads_at(p.rebuilt_keys, first, end, n_heads, p.key_width)
    v = heads_at(p.rebuilt_values, first, end, n_heads, p.value_width)
    heads = kv.reshape(end - first, n_heads, both)
    for i in range(end - first):
        copied(latents[i][:rank], rows[i])
    by_turned(rows, kv_up.reshape(n_heads * both, rank), kv, False)
    for i in range(end - first):
        shared = latents[i][rank:]
        for h in range(n_heads):
            copied(heads[i, h][:nope], k[i, h][:nope])
            copied(shared, k[i, h][nope:])
            copied(heads[i, h][nope:], v[i, h])


@compiled
def rebuild_back(layer: Any, p: Any, part: int) -> None:
    """The gradient of this part's latents; also what `kv_up`'s follows from, the latents' first part and `dkv`."""
    first, end = share_of(p.batch * p.seq, p, part)
    kv_up = stack_at(layer.kv_up)
    n_heads, both, rank = kv_up.shape
    nope = both - p.value_width
    width = rank + p.key_width - nope
    latents, dlatents = rows_at(p.entry_0, first, end, width), rows_at(p.dlatent, first, end, width)
    rows, dkv = rows_at(p.latents, first, end, rank), rows_at(p.dkv, first, end, n_heads * both)
    dk = heads_at(p.dkeys, first, end, n_heads, p.key_width)
    dv = heads_at(p.dvalues, first, end, n_heads, p.value_width)
    low, heads = rows_at(p.dlatents, first, end, rank), dkv.reshape(end - first, n_heads, both)
    for i in range(end - first):
        copied(latents[i][:rank], rows[i])
        shared = dlatents[i][rank:]
        shared[:] = 0
        for h in range(n_heads):
            copied(dk[i, h][:nope], heads[i, h][:nope])
            add_to(dk[i, h][nope:], shared)
            copied(dv[i, h], heads[i, h][nope:])
    by(dkv, kv_up.reshape(n_heads * both, rank), low, False)
    for i in range(end - first):
        copied(low[i], dlatents[i][:rank])


@compiled
def project_back(layer: Any, p: Any, part: int, dnormed: Array) -> None:
    """Gradients of this part's queries and latents, which are changed, to those of `raw` and of the normed rows.

    The latter go to `dnormed`; the normed queries are computed again.
    """
    first, end = share_of(p.batch * p.seq, p, part)
    down, q_up = matrix_at(layer.down), matrix_at(layer.q_up)
    q_gain, kv_gain, eps = vector_at(layer.q_gain), vector_at(layer.kv_gain), layer.attn_eps
    rank, q_rank = kv_gain.shape[0], q_gain.shape[0]
    width, inner = down.shape[0] - q_rank, 2 * dnormed.shape[1]
    nope = p.key_width - (width - rank)
    raw, draw = rows_at(p.raw, first, end, down.shape[0]), rows_at(p.draw, first, end, down.shape[0])
    low, dlow = rows_at(p.low, first, end, q_rank), rows_at(p.dlow, first, end, q_rank)
    dq, dlatents = heads_at(p.dq, first, end, p.n_heads, p.key_width), rows_at(p.dlatent, first, end, width)
    dq_gain, dkv_gain = gains_of(p, part, inner, q_rank), gains_of(p, part, inner + q_rank, rank)
    _normed_queries(layer, raw, low)
    for i in range(end - first):
        rotation = rotation_of(p, first + i)
        for h in range(p.n_heads):
            rotated(dq[i, h][nope:], rotation, BACK)
    by(dq.reshape(end - first, q_up.shape[0]), q_up, dlow, False)
    for i in range(end - first):
        row, to, grad = raw[i], draw[i], dlatents[i]
        row_back(row[:q_rank], q_gain, scale_of(row[:q_rank], eps), dlow[i], to[:q_rank], dq_gain)
        own = row[q_rank : q_rank + rank]
        row_back(own, kv_gain, scale_of(own, eps), grad[:rank], to[q_rank : q_rank + rank], dkv_gain)
        rotated(grad[rank:], rotation_of(p, first + i), BACK)
        copied(grad[rank:], to[q_rank + rank :])
    by(draw, down, dnormed, False)
