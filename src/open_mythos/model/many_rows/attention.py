"""Causal attention with a window and a sink over whole sequences, and the way back.

Main entries: `attend`, `attend_back`. As flash attention does (Dao et al. 2022, arXiv 2205.14135), a block of scores is
used at once and computed again on the way back: what is kept is one number for each query and head.

Scores are computed with keys as rows. Their columns are queries, for each of them the heads of the key head's group,
one behind the other: these see the same keys. A few columns are computed together, over the keys that one of them sees.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.arithmetic.product import flat, moved, product, turned
from open_mythos.model.arithmetic.registers import WIDE
from open_mythos.model.arithmetic.softmax import weigh, weigh_back
from open_mythos.model.rows import Array

_BLOCK = 64
"""Queries that are brought side by side together."""
_STRIP = 16
"""Columns of scores that are computed together: a register's numbers, or those of some."""


@compiled
def attend(
    q: Array, k: Array, v: Array, head: int, window: int, scale: np.float32, sink: Array, out: Array, lse: Array
) -> None:
    """What the queries of a sequence make of key head `head`: q (S, H, D), k (S, K, D), v (S, K, V) to out (S, H, V).

    `lse` is (H, S); no sink is (0,).
    """
    n, n_heads, dim = q.shape
    n_kv, width = v.shape[1], v.shape[2]
    group, of_k, of_v = n_heads // n_kv, n_kv * dim, n_kv * width
    most, reach = _most_columns(n, group), min(window, n) * group
    mixed, across, logs, scores = _memory(most, max(dim, width), n)
    keys, values = flat(k), flat(v)
    for first in range(0, n, _BLOCK):
        rows = min(_BLOCK, n - first)
        columns = rows * group
        _take(q, first, head * group, rows, group, scale, mixed, across, most)
        _take_logits(sink, head * group, rows, group, logs)
        for column in range(0, columns, _STRIP):
            start, seen, age = _sight(first, column, n, group, window)
            key, value = (start * n_kv + head) * dim, (start * n_kv + head) * width
            some = min(_STRIP, columns - column)
            product(keys, key, of_k, 1, across, column, most, scores, 0, _STRIP, seen, _STRIP, dim, 0)
            for c in range(0, _STRIP, WIDE):
                weigh(scores, c, _STRIP, seen, age + c, group, reach, logs, column + c)
            product(scores, 0, 1, _STRIP, values, value, of_v, mixed, column * width, width, some, width, seen, 0)
        _give(mixed, first, head * group, rows, group, np.float32(1), out)
        for h in range(group):
            for i in range(rows):
                lse[head * group + h, first + i] = logs[i * group + h]


@compiled
def attend_back(
    q: Array,
    k: Array,
    v: Array,
    head: int,
    window: int,
    scale: np.float32,
    sink: Array,
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
    group, of_k, of_v = n_heads // n_kv, n_kv * dim, n_kv * width
    most, reach = _most_columns(n, group), min(window, n) * group
    queries, queries_across, logs, weights = _memory(most, dim, n)
    grads, grads_across, logits, slopes = _memory(most, width, n)
    keys, values, dkeys, dvalues = flat(k), flat(v), flat(dk), flat(dv)
    # Sums of nothing yet: products over no columns.
    product(slopes, 0, 0, 0, queries, 0, 0, dkeys, head * dim, of_k, n, dim, 0, 0)
    product(weights, 0, 0, 0, grads, 0, 0, dvalues, head * width, of_v, n, width, 0, 0)
    for h in range(head * group, (head + 1) * group):
        dsink[h] = 0
    for first in range(0, n, _BLOCK):
        rows = min(_BLOCK, n - first)
        columns = rows * group
        _take(q, first, head * group, rows, group, scale, queries, queries_across, most)
        _take(grad, first, head * group, rows, group, np.float32(1), grads, grads_across, most)
        _take_logits(sink, head * group, rows, group, logits)
        for h in range(group):
            for i in range(rows):
                logs[i * group + h] = lse[head * group + h, first + i]
        for column in range(0, columns, _STRIP):
            start, seen, age = _sight(first, column, n, group, window)
            key, value = (start * n_kv + head) * dim, (start * n_kv + head) * width
            own, result, some = column * dim, column * width, min(_STRIP, columns - column)
            product(keys, key, of_k, 1, queries_across, column, most, weights, 0, _STRIP, seen, _STRIP, dim, 0)
            product(values, value, of_v, 1, grads_across, column, most, slopes, 0, _STRIP, seen, _STRIP, width, 0)
            for c in range(0, _STRIP, WIDE):
                at = column + c
                weigh_back(weights, c, slopes, c, _STRIP, seen, age + c, group, reach, logits, at, logs, at)
            product(slopes, 0, _STRIP, 1, queries, own, dim, dkeys, key, of_k, seen, dim, some, 1)
            product(weights, 0, _STRIP, 1, grads, result, width, dvalues, value, of_v, seen, width, some, 1)
            product(slopes, 0, 1, _STRIP, keys, key, of_k, queries, own, dim, some, dim, seen, 0)
        _give(queries, first, head * group, rows, group, scale, dq)
        for h in range(group):
            for i in range(rows):
                dsink[head * group + h] += logits[i * group + h]


@compiled
def _most_columns(n: int, group: int) -> int:
    """Columns of a block, in whole strips."""
    return (min(n, _BLOCK) * group + _STRIP - 1) // _STRIP * _STRIP


@compiled
def _memory(columns: int, width: int, n: int) -> tuple[Array, Array, Array, Array]:
    """For vectors of all columns and the same turned, for numbers of all columns, and for a strip's scores.

    It begins with a line of the caches, as all of its registers then do.
    """
    size = columns * width
    memory = np.empty(_STRIP + 2 * size + columns + n * _STRIP, np.float32)
    memory = memory[-memory.ctypes.data // memory.itemsize % _STRIP :]
    return memory[:size], memory[size : 2 * size], memory[2 * size : 2 * size + columns], memory[2 * size + columns :]


@compiled
def _take(
    x: Array, first: int, head: int, rows: int, group: int, scale: np.float32, own: Array, across: Array, most: int
) -> None:
    """Heads from `head` on of some rows of x (S, H, D), times `scale`, side by side; and turned, (D, most)."""
    _, n_heads, dim = x.shape
    moved(flat(x), (first * n_heads + head) * dim, n_heads * dim, own, 0, group * dim, rows, group * dim, scale)
    turned(own, 0, dim, most, dim, across, 0, most)


@compiled
def _give(own: Array, first: int, head: int, rows: int, group: int, scale: np.float32, x: Array) -> None:
    """The way back of `_take`."""
    _, n_heads, dim = x.shape
    moved(own, 0, group * dim, flat(x), (first * n_heads + head) * dim, n_heads * dim, rows, group * dim, scale)


@compiled
def _take_logits(sink: Array, head: int, rows: int, group: int, logits: Array) -> None:
    """The sink's logit of each column."""
    for h in range(group):
        logit = sink[head + h] if sink.shape[0] else np.float32(-np.inf)
        for i in range(rows):
            logits[i * group + h] = logit


@compiled
def _sight(first: int, column: int, n: int, group: int, window: int) -> tuple[int, int, int]:
    """What a strip's columns see: the first key, how many there are, and how far behind it the first column is."""
    start = max(0, first + column // group - window + 1)
    end = min(n, first + (column + _STRIP - 1) // group + 1)
    return start, end - start, (first - start) * group + column
