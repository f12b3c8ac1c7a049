"""Attention of a few positions, each over what it sees of a cache, with the norm before and all that its module does.

Main entries: `add_gqa`, `add_mla`; `store_gqa`, `store_mla` for positions whose own attention nobody asks for. Of n
positions, number i sees `counts[i]` rows, whose numbers are listed at the address `rows[i]`, its own the last of them.
Rotations are those of one sequence's positions, (n or fewer, dim), the same for all sequences; (1, 0) for none.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from open_mythos.model.arithmetic.addresses import integers_at
from open_mythos.model.arithmetic.compiled import INDEX, STACK, VECTOR, compiled, n_parts, parallel, shared
from open_mythos.model.arithmetic.exponential import exp
from open_mythos.model.arithmetic.product import flat, product, turned
from open_mythos.model.arithmetic.registers import WIDE
from open_mythos.model.arithmetic.seen import (
    MIXED,
    ROWS_1,
    ROWS_4,
    SPARE,
    mix_1,
    mix_4,
    narrow_1,
    narrow_4,
    score_1,
    score_4,
)
from open_mythos.model.arithmetic.vectors import THERE, copied, rotated, scale_of, scale_row
from open_mythos.model.few_rows.pointwise import rms_norm
from open_mythos.model.few_rows.products import multiply
from open_mythos.model.rows import Array, Rows

_TOGETHER = 4
"""Heads that share what they read of a key."""

_FEW = 4
"""More positions than this are multiplied by a head's matrices as whole matrices are."""

_POINTWISE = 4
"""Norm and rotation of a number take about as long as so many multiplications in a product."""


@compiled
def add_gqa(
    stream: Array,
    rotations: Array,
    keys: Array,
    values: Array,
    rows: Rows,
    counts: Rows,
    gain: Array,
    eps: np.float32,
    qkv: Array,
    normed_heads: bool,
    qk_gain: Array,
    scale: np.float32,
    sink: Array,
    out: Array,
    branch_scale: np.float32,
    threads: int,
) -> None:
    """Add to the stream (n, dim) what grouped-query attention makes of it; what is new is stored.

    Keys and values are (heads, stored, width), `qk_gain` (query and key heads, width), used if these are normed.
    """
    n, n_kv, width = stream.shape[0], keys.shape[0], keys.shape[2]
    n_heads = qk_gain.shape[0] - n_kv
    heads = _projected(stream, gain, eps, qkv, threads).reshape(n, n_heads + 2 * n_kv, width)
    _place_heads(heads, normed_heads, qk_gain, eps, rotations, rows, counts, keys, values, threads)
    mixed = np.empty((n, n_heads, width), np.float32)
    _attend(heads, keys, values, rows, counts, scale, sink, mixed, threads)
    multiply(mixed.reshape(n, n_heads * width), out, branch_scale, stream, 1, threads)


@compiled
def add_mla(
    stream: Array,
    rotations: Array,
    latent: Array,
    rows: Rows,
    counts: Rows,
    gain: Array,
    eps: np.float32,
    down: Array,
    q_gain: Array,
    q_up: Array,
    kv_gain: Array,
    kv_up: Array,
    scale: np.float32,
    sink: Array,
    out: Array,
    branch_scale: np.float32,
    threads: int,
) -> None:
    """Add to the stream (n, dim) what latent attention makes of it, in the latent space; what is new is stored.

    The latent is (1, stored, rank + rope): keys and values of the heads are never rebuilt. `kv_up` is (heads, first
    keys then values, rank).
    """
    n, n_heads, rank, width = stream.shape[0], kv_up.shape[0], kv_up.shape[2], latent.shape[2]
    low = _projected(stream, gain, eps, down, threads)
    q = _projected(low, q_gain, eps, q_up, threads).reshape(n, n_heads, q_up.shape[0] // n_heads)
    nope = q.shape[2] - (width - rank)
    absorbed = np.empty((n, n_heads, width), np.float32)
    _place_queries(q, rank, rotations, absorbed)
    _place_latent(low, kv_gain, eps, rotations, rows, counts, latent)
    mixed = np.empty((n, n_heads, kv_up.shape[1] - nope), np.float32)
    _attend_latent(q, absorbed, kv_up, latent, rows, counts, scale, sink, mixed, threads)
    multiply(mixed.reshape(n, out.shape[1]), out, branch_scale, stream, 1, threads)


@compiled
def store_gqa(
    stream: Array,
    rotations: Array,
    keys: Array,
    values: Array,
    rows: Rows,
    counts: Rows,
    gain: Array,
    eps: np.float32,
    qkv: Array,
    normed_heads: bool,
    qk_gain: Array,
    threads: int,
) -> None:
    """Store what `add_gqa` would of the stream."""
    n_kv, width = keys.shape[0], keys.shape[2]
    first, n = qk_gain.shape[0] - n_kv, stream.shape[0]
    heads = _projected(stream, gain, eps, qkv[first * width :], threads).reshape(n, 2 * n_kv, width)
    _place_heads(heads, normed_heads, qk_gain[first:], eps, rotations, rows, counts, keys, values, threads)


@compiled
def store_mla(
    stream: Array,
    rotations: Array,
    latent: Array,
    rows: Rows,
    counts: Rows,
    gain: Array,
    eps: np.float32,
    down: Array,
    kv_gain: Array,
    threads: int,
) -> None:
    """Store what `add_mla` would of the stream."""
    low = _projected(stream, gain, eps, down[down.shape[0] - latent.shape[2] :], threads)
    _place_latent(low, kv_gain, eps, rotations, rows, counts, latent)


@compiled
def _projected(x: Array, gain: Array, eps: np.float32, weight: Array, threads: int) -> Array:
    """The first channels of x (n, ...), normed with a gain (dim,), by a weight (width, dim): (n, width)."""
    normed = np.empty((x.shape[0], gain.shape[0]), np.float32)
    rms_norm(x, gain, eps, normed)
    out = np.empty((x.shape[0], weight.shape[0]), np.float32)
    multiply(normed, weight, np.float32(1), out, 0, threads)
    return out


@parallel
def _place_heads(
    heads: Array,
    normed: bool,
    gain: Array,
    eps: np.float32,
    rotations: Array,
    rows: Rows,
    counts: Rows,
    keys: Array,
    values: Array,
    threads: int,
) -> None:
    """RMS norm, gain (queries and keys, width) and rotation of the first of all heads (n, heads, width), in place.

    Keys and values, which are behind the queries, are then stored.
    """
    n = heads.shape[0]
    parts = n_parts(_POINTWISE * heads.size, threads)
    if parts == 1:  # other threads are started even for nothing
        _place_rows(heads, normed, gain, eps, rotations, rows, counts, keys, values, 0, n)
        return
    for part in prange(parts):
        first, end = n * part // parts, n * (part + 1) // parts
        _place_rows(heads, normed, gain, eps, rotations, rows, counts, keys, values, first, end)


@compiled
def _place_rows(
    heads: Array,
    normed: bool,
    gain: Array,
    eps: np.float32,
    rotations: Array,
    rows: Rows,
    counts: Rows,
    keys: Array,
    values: Array,
    first: int,
    end: int,
) -> None:
    _, n_heads, width = heads.shape
    n_kv = keys.shape[0]
    for i in range(first, end):
        rotation = rotations[i % rotations.shape[0]]
        for h in range(gain.shape[0]):
            head = heads[i, h]
            if normed:
                scale_row(head, scale_of(head, eps), gain[h], head)
            rotated(head, rotation, THERE)
        own = heads[i].reshape(n_heads * width)
        _store(own[(n_heads - 2 * n_kv) * width :], rows[i], counts[i], keys)
        _store(own[(n_heads - n_kv) * width :], rows[i], counts[i], values)


@compiled
def _place_latent(
    low: Array, gain: Array, eps: np.float32, rotations: Array, rows: Rows, counts: Rows, latent: Array
) -> None:
    """Store MLA's rows (n, rank + rope), the last channels of low (n, ...): normed with gain (rank,), and rotated."""
    n, rank, width = low.shape[0], gain.shape[0], latent.shape[2]
    first = low.shape[1] - width
    row = np.empty((n, width), np.float32)
    rms_norm(low[:, first:], gain, eps, row[:, :rank])
    for i in range(n):
        copied(low[i, first + rank :], row[i, rank:])
        rotated(row[i, rank:], rotations[i % rotations.shape[0]], THERE)
        _store(row[i], rows[i], counts[i], latent)


@compiled
def _place_queries(q: Array, rank: int, rotations: Array, out: Array) -> None:
    """The last channels of q (n, heads, ...), rotated, to out (n, heads, rank + rope), behind the first `rank`."""
    n, n_heads, width = out.shape
    nope = q.shape[2] - (width - rank)
    for i in range(n):
        for h in range(n_heads):
            copied(q[i, h, nope:], out[i, h, rank:])
            rotated(out[i, h, rank:], rotations[i % rotations.shape[0]], THERE)


@compiled
def _store(new: Array, rows: int, count: int, entries: Array) -> None:
    """Copy what is new of a position, its heads one behind the other, to its row of entries (heads, stored, width)."""
    n_heads, _, width = entries.shape
    own = integers_at(rows, count - 1, count)[0]
    for k in range(n_heads):
        copied(new[k * width : (k + 1) * width], entries[k, own])


@parallel
def _attend(
    queries: Array,
    keys: Array,
    values: Array,
    rows: Rows,
    counts: Rows,
    scale: np.float32,
    sink: Array,
    out: Array,
    threads: int,
) -> None:
    """Each of the heads over its own keys and values."""
    n_heads = out.shape[1]
    parts = min(n_heads, n_parts(2 * n_heads * out.shape[2] * counts.sum(), threads))
    if parts == 1:  # other threads are started even for nothing
        _attend_heads(queries, keys, values, rows, counts, scale, sink, 0, n_heads, out)
        return
    for part in prange(parts):
        first, end = n_heads * part // parts, n_heads * (part + 1) // parts
        _attend_heads(queries, keys, values, rows, counts, scale, sink, first, end, out)


@parallel
def _attend_latent(
    q: Array,
    absorbed: Array,
    kv_up: Array,
    latent: Array,
    rows: Rows,
    counts: Rows,
    scale: np.float32,
    sink: Array,
    out: Array,
    threads: int,
) -> None:
    """Each of the heads over the latents: keys are absorbed into queries before, values come out of mixtures after."""
    n, n_heads = out.shape[:2]
    parts = min(n_heads, n_parts(n * kv_up.size + 2 * n_heads * absorbed.shape[2] * counts.sum(), threads))
    mixed = np.empty((n, n_heads, kv_up.shape[2]), np.float32)
    for part in prange(parts):
        first, end = n_heads * part // parts, n_heads * (part + 1) // parts
        _absorb(q, kv_up, first, end, absorbed)
        _attend_heads(absorbed, latent, latent, rows, counts, scale, sink, first, end, mixed)
        _release(mixed, kv_up, first, end, out)


@compiled
def _absorb(q: Array, kv_up: Array, first: int, end: int, out: Array) -> None:
    """Each head's channels of q (n, heads, ...) that are not rotated, by its keys' rows of kv_up (heads, ..., rank).

    To the first `rank` channels of out (n, heads, ...).
    """
    n, n_heads, width = out.shape
    _, both, rank = kv_up.shape
    dim = q.shape[2]
    nope = dim - (width - rank)
    for h in range(first, end):
        if n > _FEW:
            numbers, weights, to = flat(q), flat(kv_up), flat(out)
            key, head = h * both * rank, h * width
            product(numbers, h * dim, n_heads * dim, 1, weights, key, rank, to, head, n_heads * width, n, rank, nope, 0)
            continue
        for i in range(n):
            own = out[i, h]
            for j in range(rank):
                own[j] = np.float32(0)
        for k in range(nope):
            weight = kv_up[h, k]
            for i in range(n):
                factor, own = q[i, h, k], out[i, h]
                for j in range(rank):
                    own[j] += factor * weight[j]


@compiled
def _release(mixed: Array, kv_up: Array, first: int, end: int, out: Array) -> None:
    """Each head of mixed (n, heads, rank) by its values' rows of kv_up (heads, ..., rank), to out (n, heads, width)."""
    n, n_heads, width = out.shape
    _, both, rank = kv_up.shape
    across = np.empty((rank if n > _FEW else 0, width), np.float32)
    for h in range(first, end):
        if n > _FEW:
            numbers, weights, to = flat(mixed), flat(across), flat(out)
            turned(flat(kv_up), (h * both + both - width) * rank, rank, width, rank, weights, 0, width)
            head, row = h * rank, n_heads * rank
            product(numbers, head, row, 1, weights, 0, width, to, h * width, n_heads * width, n, width, rank, 0)
            continue
        for j in range(width):
            weight = kv_up[h, both - width + j]
            for i in range(n):
                own, total = mixed[i, h], np.float32(0)
                for k in range(rank):
                    total += own[k] * weight[k]
                out[i, h, j] = total


@shared(STACK, STACK, STACK, INDEX, INDEX, "float32", VECTOR, "int64", "int64", STACK)
def _attend_heads(
    queries: Array,
    keys: Array,
    values: Array,
    rows: Rows,
    counts: Rows,
    scale: np.float32,
    sink: Array,
    first: int,
    end: int,
    out: Array,
) -> None:
    """Heads `first` to `end` of queries (n, heads or more, width) over keys (key heads, stored, width) and values.

    The first channels of the values, mixed, go to out (n, heads, value width).
    """
    group = out.shape[1] // keys.shape[0]
    scores = np.empty((_TOGETHER, counts.max() + SPARE), np.float32)
    for i in range(out.shape[0]):
        seen = integers_at(rows[i], 0, counts[i])
        head = first
        while head < end:
            k = head // group
            stop = min(head + _TOGETHER, (k + 1) * group, end)
            _score(queries[i], head, stop, keys[k], seen, scores)
            for h in range(head, stop):
                _weigh(scores[h - head, : seen.shape[0]], scale, sink[h] if sink.size else np.float32(-np.inf))
            _mix(scores, values[k], seen, head, stop, out[i])
            head = stop


@compiled
def _score(queries: Array, head: int, stop: int, keys: Array, seen: Rows, scores: Array) -> None:
    """Heads `head` to `stop` of a position's queries (heads, dim) by the keys seen, to the first rows of `scores`."""
    if stop - head == 1:
        for s in range(0, seen.shape[0], ROWS_1):
            score_1(queries, head, head, keys, seen, s, scores)
    else:
        for s in range(0, seen.shape[0], ROWS_4):
            score_4(queries, head, stop - 1, keys, seen, s, scores)


@compiled
def _weigh(scores: Array, scale: np.float32, sink: np.float32) -> None:
    """Exponentials of scaled scores over their sum, in place; the sum has `exp(sink)`, too."""
    most = sink
    for s in range(scores.shape[0]):
        most = max(most, scores[s] * scale)
    total = exp(sink - most)
    for s in range(scores.shape[0]):
        scores[s] = exp(scores[s] * scale - most)
        total += scores[s]
    part = np.float32(1) / total
    for s in range(scores.shape[0]):
        scores[s] *= part


@compiled
def _mix(weights: Array, values: Array, seen: Rows, head: int, stop: int, out: Array) -> None:
    """The values seen, mixed by the first rows of `weights`, to the heads `head` to `stop` of out (heads, width)."""
    done, width = 0, out.shape[1]
    while done + MIXED <= width:
        if stop - head == 1:
            mix_1(weights, values, seen, done, MIXED, out, head, head)
        else:
            mix_4(weights, values, seen, done, MIXED, out, head, stop - 1)
        done += MIXED
    while done < width:
        if stop - head == 1:
            narrow_1(weights, values, seen, done, width - done, out, head, head)
        else:
            narrow_4(weights, values, seen, done, width - done, out, head, stop - 1)
        done += WIDE
