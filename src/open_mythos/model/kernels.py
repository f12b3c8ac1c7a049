"""What stands between the products of a pass over few positions: loops over rows, compiled by Numba when first called.

On a CPU, an operation of PyTorch or NumPy costs microseconds however small it is, and a step of a small model makes
hundreds. A kernel does the work of five to twenty in the time of one. Importing this module imports Numba, which takes
half a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

from open_mythos.model.rows import Array, Rows

_Function = TypeVar("_Function", bound=Callable[..., None])

# Arrays are copied number by number: assigning an array to a slice takes Numba ten seconds to compile.

# Sums may be taken in any order, as vector instructions need it; NaN and infinity keep their meaning.
_REORDERED = {"reassoc", "contract", "nsz", "arcp"}


def _compiled(function: _Function) -> _Function:
    options: dict[str, Any] = {"fastmath": _REORDERED, "error_model": "numpy"}
    try:
        return njit(function, cache=True, **options)  # type: ignore[no-any-return]
    except RuntimeError:  # there is no folder that a cache could be written to
        return njit(function, **options)  # type: ignore[no-any-return]


@_compiled
def rms_norm(x: Array, gain: Array, eps: np.float32, out: Array) -> None:
    """The first channels of x (n, ...) over their root mean square, times gain (dim,), to out (n, dim)."""
    n, dim = out.shape
    for i in range(n):
        total = np.float32(0)
        for j in range(dim):
            total += x[i, j] * x[i, j]
        scale = np.float32(1) / np.sqrt(total / np.float32(dim) + eps)
        for j in range(dim):
            out[i, j] = x[i, j] * scale * gain[j]


@_compiled
def rotate(x: Array, rotation: Array, out: Array) -> None:
    """Each of x (heads, dim), channels i and i + dim/2 paired, by the cosines and then sines `rotation` (dim,)."""
    heads, dim = x.shape
    half = dim // 2
    for h in range(heads):
        for i in range(half):
            a, b = x[h, i], x[h, i + half]
            out[h, i] = a * rotation[i] - b * rotation[i + half]
            out[h, i + half] = b * rotation[i] + a * rotation[i + half]


@_compiled
def place_heads(heads: Array, normed: bool, gain: Array, eps: np.float32, rotations: Array) -> None:
    """RMS norm, gain (queries and keys, dim) and rotation of the first of all heads (n, heads, dim), in place.

    Rotations are those of one sequence's positions, (n or fewer, dim), the same for all sequences; (1, 0) for none.
    """
    n = heads.shape[0]
    n_heads, dim = gain.shape
    if normed:
        for i in range(n):
            for h in range(n_heads):
                total = np.float32(0)
                for j in range(dim):
                    total += heads[i, h, j] * heads[i, h, j]
                scale = np.float32(1) / np.sqrt(total / np.float32(dim) + eps)
                for j in range(dim):
                    heads[i, h, j] *= scale * gain[h, j]
    if rotations.shape[1]:
        for i in range(n):
            rotate(heads[i, :n_heads], rotations[i % rotations.shape[0]], heads[i, :n_heads])


@_compiled
def place_latent(
    down: Array, gain: Array, eps: np.float32, q: Array, rotations: Array, row: Array, queries: Array
) -> None:
    """MLA's row for the cache (n, rank + rope), and what is behind the first `rank` channels of its queries.

    From the last channels of `down` (n, ...), before norm and rotation, and those of q (n, heads, ...), before
    rotation; gain is (rank,), queries are (n, heads, rank + rope).
    """
    n, width = row.shape
    heads, rank = queries.shape[1], gain.shape[0]
    first, nope = down.shape[1] - width, q.shape[2] - (width - rank)
    rms_norm(down[:, first:], gain, eps, row[:, :rank])
    for i in range(n):
        for j in range(width - rank):
            row[i, rank + j] = down[i, first + rank + j]
            for h in range(heads):
                queries[i, h, rank + j] = q[i, h, nope + j]
        if rotations.shape[1]:
            rotation = rotations[i % rotations.shape[0]]
            rotate(row[i : i + 1, rank:], rotation, row[i : i + 1, rank:])
            rotate(queries[i, :, rank:], rotation, queries[i, :, rank:])


@_compiled
def by_head(x: Array, inner: int, weights: Array, out: Array) -> None:
    """Each head's first channels in x (n, heads, ...), `inner` of them, by as many rows of weights (heads, ..., b).

    To the first b channels of out (n, heads, ...).
    """
    n, heads, _ = x.shape
    width = weights.shape[2]
    out[:, :, :width] = np.float32(0)
    for h in range(heads):
        for k in range(inner):
            weight = weights[h, k]
            for i in range(n):
                factor, own = x[i, h, k], out[i, h]
                for j in range(width):
                    own[j] += factor * weight[j]


@_compiled
def by_transposed_head(x: Array, weights: Array, out: Array) -> None:
    """Each head of x (n, heads, a) by the last b rows of weights (heads, ..., a), transposed, to out (n, heads, b)."""
    n, heads, width = out.shape
    inner = weights.shape[2]
    first = weights.shape[1] - width
    for h in range(heads):
        for k in range(width):
            weight = weights[h, first + k]
            for i in range(n):
                own = x[i, h]
                total = np.float32(0)
                for j in range(inner):
                    total += own[j] * weight[j]
                out[i, h, k] = total


@_compiled
def store(new: Array, first: int, rows: Rows, counts: Rows, entries: Array) -> None:
    """Copy what is new of n positions, from channel `first` of new (n, ...) on, to entries (K, stored, width).

    A position's own row is the last of those that its query sees; see `attend`.
    """
    n_heads, _, width = entries.shape
    for i in range(new.shape[0]):
        own = rows[i, counts[i] - 1]
        for k in range(n_heads):
            start = first + k * width
            for j in range(width):
                entries[k, own, j] = new[i, start + j]


@_compiled
def attend(
    queries: Array, keys: Array, values: Array, rows: Rows, counts: Rows, scale: np.float32, sink: Array, out: Array
) -> None:
    """Attention of queries (n, ..., D), first of all the heads', to keys (K, stored, D) and values (K, stored, ...).

    Position i sees the first `counts[i]` of `rows[i]`. `sink` (heads,), or (0,), takes part in the softmax. The first V
    channels of values, mixed, go to out (n, heads, V).
    """
    n, heads, width = out.shape
    n_kv, _, dim = keys.shape
    group = heads // n_kv
    scores = np.empty((group, rows.shape[1]), np.float32)
    for i in range(n):
        for k in range(n_kv):
            for s in range(counts[i]):
                key = keys[k, rows[i, s]]
                for g in range(group):
                    query = queries[i, k * group + g]
                    total = np.float32(0)
                    for j in range(dim):
                        total += query[j] * key[j]
                    scores[g, s] = total * scale
            for g in range(group):
                most = sink[k * group + g] if sink.size else scores[g, 0]
                for s in range(counts[i]):
                    most = max(most, scores[g, s])
                total = np.exp(sink[k * group + g] - most) if sink.size else np.float32(0)
                for s in range(counts[i]):
                    scores[g, s] = np.exp(scores[g, s] - most)
                    total += scores[g, s]
                mixed = out[i, k * group + g]
                mixed[:] = np.float32(0)
                for s in range(counts[i]):
                    weight = scores[g, s] / total
                    value = values[k, rows[i, s]]
                    for j in range(width):
                        mixed[j] += weight * value[j]


@_compiled
def route(logits: Array, bias: Array, softmax: bool, scale: float, experts: Rows, weights: Array) -> None:
    """`router.route` for rows of logits (n, experts): writes experts, best first, and weights, (n, top_k).

    Of experts that rank exactly alike, it may take others.
    """
    n, n_experts = logits.shape
    top_k = experts.shape[1]
    for i in range(n):
        for s in range(top_k):
            best, chosen = np.float32(0), -1
            for e in range(n_experts):
                rank = logits[i, e] + bias[e]
                taken = False
                for r in range(s):
                    taken |= experts[i, r] == e
                if not taken and (chosen < 0 or rank > best):
                    best, chosen = rank, e
            experts[i, s] = chosen
        most = np.float64(logits[i, experts[i, 0]])
        for s in range(top_k):
            most = max(most, np.float64(logits[i, experts[i, s]]))
        total = 1e-20
        for s in range(top_k):
            logit = np.float64(logits[i, experts[i, s]])
            weight = np.exp(logit - most) if softmax else 1 / (1 + np.exp(-logit))
            weights[i, s] = weight
            total += weight
        for s in range(top_k):
            weights[i, s] *= scale / total


@_compiled
def dispatch(x: Array, experts: Rows, ends: Rows, slots: Rows, rows: Array) -> None:
    """Copy the rows of x (n, dim) to `rows` (n * top_k, dim), sorted by expert.

    Expert e has the rows up to `ends[e]`; that of slot (i, s) of `experts` is `slots[i, s]`.
    """
    n, top_k = experts.shape
    ends[:] = 0
    for i in range(n):
        for s in range(top_k):
            ends[experts[i, s]] += 1
    total = 0
    for e in range(ends.shape[0]):
        total, ends[e] = total + ends[e], total
    for i in range(n):
        for s in range(top_k):
            place = ends[experts[i, s]]
            slots[i, s] = place
            for j in range(x.shape[1]):
                rows[place, j] = x[i, j]
            ends[experts[i, s]] += 1


@_compiled
def combine(stream: Array, rows: Array, slots: Rows, weights: Array) -> None:
    """Add to stream (n, dim) the rows of each of its slots (n, top_k), times the slot's weight."""
    n, top_k = slots.shape
    for i in range(n):
        for s in range(top_k):
            for j in range(stream.shape[1]):
                stream[i, j] += weights[i, s] * rows[slots[i, s], j]


@_compiled
def inject(h: Array, e: Array, a: Array, b: Array, out: Array) -> None:
    """`A*h + B*e` of rows h and e (n, dim), to `out`."""
    n, dim = h.shape
    for i in range(n):
        for j in range(dim):
            out[i, j] = a[j] * h[i, j] + b[j] * e[i, j]


@_compiled
def adapt(x: Array, u: Array, down: Array, scale: Array, up: Array) -> None:
    """Add to x (n, dim), in place, what the adapter makes of x - u; scale is (n, rank), or (1, rank) for all."""
    n, dim = x.shape
    rank = down.shape[0]
    low = np.empty(rank, np.float32)
    for i in range(n):
        factors = scale[i % scale.shape[0]]
        for r in range(rank):
            total = np.float32(0)
            for j in range(dim):
                total += down[r, j] * (x[i, j] - u[i, j])
            low[r] = total * factors[r]
        for j in range(dim):
            total = np.float32(0)
            for r in range(rank):
                total += up[j, r] * low[r]
            x[i, j] += total


@_compiled
def halting_probability(h: Array, weight: Array, bias: Array, eps: np.float32, out: Array) -> None:
    """`sigmoid(w . h / rms(h) + b)` of rows h (n, dim), to out (n,)."""
    n, dim = h.shape
    for i in range(n):
        squares, product = np.float32(0), np.float32(0)
        for j in range(dim):
            squares += h[i, j] * h[i, j]
            product += h[i, j] * weight[0, j]
        rms = np.sqrt(squares / np.float32(dim)) + eps
        out[i] = np.float32(1) / (np.float32(1) + np.exp(-(product / rms + bias[0])))
