"""Queries, latents, keys and values of latent attention for some rows, and the way back.

Main entries: `project`, `rebuild`, `rebuild_back`, `project_back`. Keys and values are rebuilt from the latents.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.few_rows.compiled import compiled
from open_mythos.model.many_rows.pointwise import (
    BACK,
    THERE,
    add_to,
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
    down: Array,
    q_gain: Array,
    q_up: Array,
    kv_gain: Array,
    rotations: Array,
    first: int,
    scales: Array,
    normed: Array,
    raw: Array,
    low: Array,
    q: Array,
    latent: Array,
) -> None:
    """From rows x (n, dim) to q (n, H, nope + rope) and the latent (n, rank + rope).

    By way of `raw` (n, q_rank + rank + rope), which is what comes out of the first matrix, and the normed queries,
    `low`. The first row is number `first` of all.
    """
    n, rank, q_rank = x.shape[0], kv_gain.shape[0], q_gain.shape[0]
    rope = latent.shape[1] - rank
    nope = q.shape[2] - rope
    normalise(x, gain, eps, scales, normed)
    by_turned(normed, down, raw, False)
    _normed_queries(raw, q_gain, eps, low)
    by_turned(low, q_up, q.reshape(n, q_up.shape[0]), False)
    for i in range(n):
        rotation = rotations[(first + i) % rotations.shape[0]]
        for h in range(q.shape[1]):
            rotated(q[i, h][nope:], rotation, THERE)
        row, to = raw[i], latent[i]
        own = row[q_rank : q_rank + rank]
        scale_row(own, scale_of(own, eps), kv_gain, to[:rank])
        copied(row[q_rank + rank :], to[rank:])
        rotated(to[rank:], rotation, THERE)


@compiled
def _normed_queries(raw: Array, q_gain: Array, eps: np.float32, out: Array) -> None:
    for i in range(out.shape[0]):
        row = raw[i][: q_gain.shape[0]]
        scale_row(row, scale_of(row, eps), q_gain, out[i])


@compiled
def rebuild(latent: Array, kv_up: Array, rows: Array, kv: Array, k: Array, v: Array) -> None:
    """Keys (n, H, nope + rope) and values (n, H, V) of latents (n, rank + rope); `kv_up` is (H, nope + V, rank).

    By way of `rows` (n, rank) and `kv` (n, H * (nope + V)).
    """
    n, (n_heads, both, rank) = latent.shape[0], kv_up.shape
    nope = both - v.shape[2]
    heads = kv.reshape(n, n_heads, both)
    for i in range(n):
        copied(latent[i][:rank], rows[i])
    by_turned(rows, kv_up.reshape(n_heads * both, rank), kv, False)
    for i in range(n):
        shared = latent[i][rank:]
        for h in range(n_heads):
            copied(heads[i, h][:nope], k[i, h][:nope])
            copied(shared, k[i, h][nope:])
            copied(heads[i, h][nope:], v[i, h])


@compiled
def rebuild_back(
    latent: Array, kv_up: Array, dk: Array, dv: Array, rows: Array, dkv: Array, low: Array, dlatent: Array
) -> None:
    """The gradient of the latents (n, rank + rope); also what `kv_up`'s follows from, `rows` and `dkv`."""
    n, (n_heads, both, rank) = latent.shape[0], kv_up.shape
    nope = both - dv.shape[2]
    heads = dkv.reshape(n, n_heads, both)
    for i in range(n):
        copied(latent[i][:rank], rows[i])
        shared = dlatent[i][rank:]
        shared[:] = 0
        for h in range(n_heads):
            copied(dk[i, h][:nope], heads[i, h][:nope])
            add_to(dk[i, h][nope:], shared)
            copied(dv[i, h], heads[i, h][nope:])
    by(dkv, kv_up.reshape(n_heads * both, rank), low, False)
    for i in range(n):
        copied(low[i], dlatent[i][:rank])


@compiled
def project_back(
    x: Array,
    gain: Array,
    eps: np.float32,
    down: Array,
    q_gain: Array,
    q_up: Array,
    kv_gain: Array,
    rotations: Array,
    first: int,
    scales: Array,
    raw: Array,
    dq: Array,
    dlatent: Array,
    normed: Array,
    low: Array,
    dlow: Array,
    draw: Array,
    dnormed: Array,
    dq_gain: Array,
    dkv_gain: Array,
) -> None:
    """Gradients of queries and latents, which are changed, to those of `raw` and of the norm's result.

    That result is computed again, and so are the normed queries, `low`.
    """
    n, rank, q_rank = x.shape[0], kv_gain.shape[0], q_gain.shape[0]
    nope = dq.shape[2] - (dlatent.shape[1] - rank)
    normalise_again(x, gain, scales, normed)
    _normed_queries(raw, q_gain, eps, low)
    for i in range(n):
        rotation = rotations[(first + i) % rotations.shape[0]]
        for h in range(dq.shape[1]):
            rotated(dq[i, h][nope:], rotation, BACK)
    by(dq.reshape(n, q_up.shape[0]), q_up, dlow, False)
    for i in range(n):
        row, to, grad = raw[i], draw[i], dlatent[i]
        row_back(row[:q_rank], q_gain, scale_of(row[:q_rank], eps), dlow[i], to[:q_rank], dq_gain)
        own = row[q_rank : q_rank + rank]
        row_back(own, kv_gain, scale_of(own, eps), grad[:rank], to[q_rank : q_rank + rank], dkv_gain)
        rotated(grad[rank:], rotations[(first + i) % rotations.shape[0]], BACK)
        copied(grad[rank:], to[q_rank + rank :])
    by(draw, down, dnormed, False)
