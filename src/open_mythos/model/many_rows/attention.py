"""Causal attention with a window and a sink over whole sequences, and the way back.

Main entries: `attend`, `attend_back`. As flash attention does (Dao et al. 2022, arXiv 2205.14135), a block of scores is
used at once and computed again on the way back: what is kept is one number for each query and head.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.arithmetic.exponential import exp
from open_mythos.model.arithmetic.product import flat, product, turned
from open_mythos.model.rows import Array

_BLOCK = 64
"""Queries whose scores are computed together."""


@compiled
def _weigh(
    scores: Array, first: int, start: int, window: int, scale: np.float32, logit: np.float32, lse: Array
) -> None:
    """Exponentials of scaled scores over their sum, in place, 0 for what is not seen; the sums' logarithms to `lse`.

    The queries are those from `first` on, the keys those from `start` on; the sum has `exp(logit)`, too.
    """
    for r in range(scores.shape[0]):
        row = scores[r]
        low, high = max(first + r - window + 1, start) - start, first + r + 1 - start
        seen = row[low:high]
        most = logit
        for j in range(seen.shape[0]):
            most = max(most, scale * seen[j])
        total = exp(logit - most)
        for j in range(seen.shape[0]):
            seen[j] = exp(scale * seen[j] - most)
            total += seen[j]
        lse[r] = most + np.log(total)
        part = np.float32(1) / total
        for j in range(seen.shape[0]):
            seen[j] *= part
        row[:low] = 0
        row[high:] = 0


@compiled
def attend(
    q: Array, k: Array, v: Array, head: int, window: int, scale: np.float32, sink: Array, out: Array, lse: Array
) -> None:
    """What the queries of a sequence make of key head `head`: q (S, H, D), k (S, K, D), v (S, K, V) to out (S, H, V).

    `lse` is (H, S); no sink is (0,).
    """
    n, n_heads, dim = q.shape
    n_kv, width = v.shape[1], v.shape[2]
    group, of_q, of_v, of_out = n_heads // n_kv, n_heads * dim, n_kv * width, n_heads * width
    keys = np.empty((dim, n), np.float32)
    turned(flat(k), head * dim, n_kv * dim, n, dim, flat(keys), 0, n)
    for h in range(head * group, (head + 1) * group):
        logit = sink[h] if sink.shape[0] else np.float32(-np.inf)
        for first in range(0, n, _BLOCK):
            end = min(first + _BLOCK, n)
            start = max(0, first - window + 1)
            rows, columns = end - first, end - start
            scores = np.empty((rows, columns), np.float32)
            query, to = (first * n_heads + h) * dim, (first * n_heads + h) * width
            value, own = (start * n_kv + head) * width, flat(scores)
            product(flat(q), query, of_q, 1, flat(keys), start, n, own, 0, columns, rows, columns, dim, 0)
            _weigh(scores, first, start, window, scale, logit, lse[h, first:end])
            product(own, 0, columns, 1, flat(v), value, of_v, flat(out), to, of_out, rows, width, columns, 0)


@compiled
def _weigh_back(
    scores: Array, grads: Array, first: int, start: int, window: int, scale: np.float32, lse: Array, dots: Array
) -> None:
    """Weights again in place of the scores, and their scores' gradients in place of the weights' own."""
    for r in range(scores.shape[0]):
        row, grad = scores[r], grads[r]
        low, high = max(first + r - window + 1, start) - start, first + r + 1 - start
        seen, back = row[low:high], grad[low:high]
        log, dot = lse[r], dots[r]
        for j in range(seen.shape[0]):
            seen[j] = exp(scale * seen[j] - log)
            back[j] = scale * seen[j] * (back[j] - dot)
        row[:low] = 0
        row[high:] = 0
        grad[:low] = 0
        grad[high:] = 0


@compiled
def attend_back(
    q: Array,
    k: Array,
    v: Array,
    head: int,
    window: int,
    scale: np.float32,
    sink: Array,
    out: Array,
    lse: Array,
    grad: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    dsink: Array,
) -> None:
    """The gradients of `attend`'s arguments, given that of `out`; `dsink` is (H,)."""
    n, n_heads, dim = q.shape
    n_kv, width = v.shape[1], v.shape[2]
    group, of_q, of_k, of_v, of_out = n_heads // n_kv, n_heads * dim, n_kv * dim, n_kv * width, n_heads * width
    keys, values = np.empty((dim, n), np.float32), np.empty((width, n), np.float32)
    turned(flat(k), head * dim, n_kv * dim, n, dim, flat(keys), 0, n)
    turned(flat(v), head * width, n_kv * width, n, width, flat(values), 0, n)
    for i in range(n):
        dk[i, head] = 0
        dv[i, head] = 0
    dots = np.empty(n, np.float32)
    for h in range(head * group, (head + 1) * group):
        for i in range(n):
            own, back = out[i, h], grad[i, h]
            total = np.float32(0)
            for j in range(width):
                total += own[j] * back[j]
            dots[i] = total
        if sink.shape[0]:
            total = np.float32(0)
            for i in range(n):
                total -= exp(sink[h] - lse[h, i]) * dots[i]
            dsink[h] = total
        for first in range(0, n, _BLOCK):
            end = min(first + _BLOCK, n)
            start = max(0, first - window + 1)
            rows, columns = end - first, end - start
            scores, grads = np.empty((rows, columns), np.float32), np.empty((rows, columns), np.float32)
            weights, slopes = flat(scores), flat(grads)
            query, result = (first * n_heads + h) * dim, (first * n_heads + h) * width
            key, value = (start * n_kv + head) * dim, (start * n_kv + head) * width
            product(flat(q), query, of_q, 1, flat(keys), start, n, weights, 0, columns, rows, columns, dim, 0)
            product(flat(grad), result, of_out, 1, flat(values), start, n, slopes, 0, columns, rows, columns, width, 0)
            _weigh_back(scores, grads, first, start, window, scale, lse[h, first:end], dots[first:end])
            product(slopes, 0, columns, 1, flat(k), key, of_k, flat(dq), query, of_q, rows, dim, columns, 0)
            product(slopes, 0, 1, columns, flat(q), query, of_q, flat(dk), key, of_k, columns, dim, rows, 1)
            product(weights, 0, 1, columns, flat(grad), result, of_out, flat(dv), value, of_v, columns, width, rows, 1)
