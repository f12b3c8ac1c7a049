"""The feed-forward of a few positions, experts included, with the norm before it.

Main entries: `add_experts`, `dispatch`, `gather`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from open_mythos.model.arithmetic.compiled import INDEX, MATRIX, compiled, n_parts, parallel, shared
from open_mythos.model.arithmetic.exponential import exp
from open_mythos.model.arithmetic.tiles import CHANNELS, COLUMNS, tile_along
from open_mythos.model.arithmetic.vectors import add_to, copied
from open_mythos.model.few_rows.pointwise import rms_norm
from open_mythos.model.few_rows.products import multiply, multiply_part, share
from open_mythos.model.rows import Array, Rows

_FEW = 4
"""More rows than this are multiplied four at a time by an expert's last matrix, if that has channels enough."""


@compiled
def add_experts(
    stream: Array,
    gain: Array,
    eps: np.float32,
    gate: Array,
    up: Array,
    down: Array,
    router: Array,
    bias: Array,
    top_k: int,
    softmax: bool,
    scale: np.float32,
    expert_gate: Array,
    expert_up: Array,
    expert_down: Array,
    branch_scale: np.float32,
    threads: int,
) -> None:
    """Add to the stream (n, dim) what each position's experts make of it, normalised, and the shared one.

    Matrices of experts are (experts, hidden, dim). The shared one is a SwiGLU whose gate and up are those of an only
    expert, of width 0 for none; a layer that has no others, and a bias (0,), is dense.
    """
    n, dim = stream.shape
    normed = np.empty_like(stream)
    rms_norm(stream, gain, eps, normed)
    if gate.size:
        _add_dense(normed, gate, up, down, branch_scale, stream, threads)
    if not bias.size:
        return
    logits = np.empty((n, bias.shape[0]), np.float32)
    multiply(normed, router, np.float32(1), logits, 0, threads)
    ends, owners = np.zeros(bias.shape[0], np.int64), np.empty(n * top_k, np.int64)
    factors = np.empty(n * top_k, np.float32)
    dispatch(logits, bias, softmax, scale * branch_scale, ends, owners, factors)
    rows, hidden = np.empty((n * top_k, dim), np.float32), np.empty((n * top_k, expert_gate.shape[1]), np.float32)
    gather(normed, owners, rows)
    _gate(rows, expert_gate, expert_up, ends, factors, hidden, threads)
    _add_down(hidden, expert_down, ends, owners, stream, threads)


@compiled
def _add_dense(
    normed: Array, gate: Array, up: Array, down: Array, scale: np.float32, stream: Array, threads: int
) -> None:
    n = normed.shape[0]
    hidden = np.empty((n, gate.shape[1]), np.float32)
    _gate(normed, gate, up, np.full(1, n), np.ones(n, np.float32), hidden, threads)
    multiply(hidden, down, scale, stream, 1, threads)


@parallel
def _gate(x: Array, gate: Array, up: Array, ends: Rows, factors: Array, hidden: Array, threads: int) -> None:
    """Write `factor * silu(gate) * up` of x to `hidden`; expert e has the rows up to `ends[e]`."""
    width = hidden.shape[1]
    parts = n_parts(2 * x.size * width, threads)
    ups = np.empty_like(hidden)
    for part in prange(parts):
        first, end = share(width, part, parts), share(width, part + 1, parts)
        for matrix in range(2):
            weights, out = (up, ups) if matrix else (gate, hidden)
            start = 0
            for e in range(ends.shape[0]):
                if start < ends[e]:
                    rows, to = x[start : ends[e]], out[start : ends[e]]
                    multiply_part(rows, weights[e], np.float32(1), first, end, to, 0)
                start = ends[e]
        for r in range(hidden.shape[0]):
            own, other = hidden[r, first:end], ups[r, first:end]
            for j in range(own.shape[0]):
                own[j] *= factors[r] * other[j] / (np.float32(1) + exp(-own[j]))


@parallel
def _add_down(hidden: Array, down: Array, ends: Rows, owners: Rows, stream: Array, threads: int) -> None:
    """Add to the stream what is hidden, by the experts' matrices down; row r goes to position `owners[r]`.

    Each part takes some channels of the stream where an expert has rows enough. Where it has few, each takes some of
    what is hidden: whole rows of the matrix, which lie side by side, and all channels, in sums of its own.
    """
    (rows, depth), width = hidden.shape, stream.shape[1]
    parts = n_parts(hidden.size * width, threads)
    few = _FEW if width >= parts * (COLUMNS + CHANNELS) else rows
    sums = np.empty((parts, _rows_of_few(ends, few), width), np.float32)
    for part in prange(parts):
        first, end = share(width, part, parts), share(width, part + 1, parts)
        low, high = share(depth, part, parts), share(depth, part + 1, parts)
        start, done = 0, 0
        for e in range(ends.shape[0]):
            n = ends[e] - start
            if n > few:
                _add_expert(hidden, down[e], owners, start, ends[e], first, end, stream)
            else:
                _along(hidden[start : ends[e]], down[e], low, high, sums[part, done : done + n])
                done += n
            start = ends[e]
    start, done = 0, 0
    for e in range(ends.shape[0]):
        if ends[e] - start <= few:
            for r in range(start, ends[e]):
                for part in range(parts):
                    add_to(sums[part, done], stream[owners[r]])
                done += 1
        start = ends[e]


@compiled
def _rows_of_few(ends: Rows, few: int) -> int:
    """How many rows belong to experts that have at most `few`."""
    start, total = 0, 0
    for e in range(ends.shape[0]):
        if ends[e] - start <= few:
            total += ends[e] - start
        start = ends[e]
    return total


@shared(MATRIX, MATRIX, INDEX, "int64", "int64", "int64", "int64", MATRIX)
def _add_expert(
    hidden: Array, down: Array, owners: Rows, start: int, stop: int, first: int, end: int, out: Array
) -> None:
    """Add rows `start` to `stop` of `hidden`, by the channels `first` to `end` of `down`, to the owners' rows of `out`.

    There are at least `COLUMNS` of these channels.
    """
    sums, done = np.empty(4 * COLUMNS, np.float32), first
    while done < end:
        column = min(done, end - COLUMNS)  # the last may compute some again
        for four in range(start, stop, 4):
            tile_along(hidden, four, stop - 1, down, column, sums)
            for r in range(four, min(four + 4, stop)):
                own, new = out[owners[r]], sums[(r - four) * COLUMNS : (r - four + 1) * COLUMNS]
                for j in range(done - column, COLUMNS):
                    own[column + j] += new[j]
        done = column + COLUMNS


@compiled
def _along(hidden: Array, down: Array, low: int, high: int, out: Array) -> None:
    """Write to `out` (n, dim) what is hidden from `low` to `high`, by as many rows of `down`.

    Four of these at a time, a quarter apart, as in `multiply`.
    """
    n, width = out.shape
    apart = (high - low) // 4
    for r in range(n):
        own = out[r]
        for j in range(width):
            own[j] = np.float32(0)
    for k in range(low, low + apart):
        w0, w1, w2, w3 = down[k], down[k + apart], down[k + 2 * apart], down[k + 3 * apart]
        for r in range(n):
            own, x = out[r], hidden[r]
            a, b, c, d = x[k], x[k + apart], x[k + 2 * apart], x[k + 3 * apart]
            for j in range(width):
                own[j] += a * w0[j] + b * w1[j] + c * w2[j] + d * w3[j]
    for k in range(low + 4 * apart, high):
        for r in range(n):
            for j in range(width):
                out[r, j] += hidden[r, k] * down[k, j]


@compiled
def gather(x: Array, owners: Rows, out: Array) -> None:
    """The rows of x (n, dim) that `owners` (slots,) names, to `out` (slots, dim)."""
    for r in range(owners.shape[0]):
        copied(x[owners[r]], out[r])


@compiled
def dispatch(
    logits: Array, bias: Array, softmax: bool, scale: np.float32, ends: Rows, owners: Rows, factors: Array
) -> None:
    """`router.route` for rows of logits (n, experts), sorted by expert: each slot's position and weight.

    Expert e has the slots up to `ends[e]`, zeros before. Of experts that rank exactly alike, it may take others.
    """
    n = logits.shape[0]
    top_k = owners.shape[0] // n
    experts, weights = np.empty((n, top_k), np.int64), np.empty((n, top_k), np.float32)
    for i in range(n):
        _choose(logits[i], bias, experts[i])
        _weigh(logits[i], experts[i], softmax, scale, weights[i])
        for s in range(top_k):
            ends[experts[i, s]] += 1
    total = 0
    for e in range(ends.shape[0]):
        total, ends[e] = total + ends[e], total
    for i in range(n):
        for s in range(top_k):
            place = ends[experts[i, s]]
            owners[place], factors[place] = i, weights[i, s]
            ends[experts[i, s]] += 1


@compiled
def _choose(logits: Array, bias: Array, experts: Rows) -> None:
    """Write to `experts` (top_k,) those with the highest of `logits + bias`, best first."""
    for s in range(experts.shape[0]):
        best, chosen = np.float32(0), -1
        for e in range(logits.shape[0]):
            rank = logits[e] + bias[e]
            taken = False
            for r in range(s):
                taken |= experts[r] == e
            if not taken and (chosen < 0 or rank > best):
                best, chosen = rank, e
        experts[s] = chosen


@compiled
def _weigh(logits: Array, experts: Rows, softmax: bool, scale: np.float32, weights: Array) -> None:
    """Write the `experts`' weights, which sum to `scale`, from their logits alone."""
    most = np.float64(-np.inf)
    for e in experts:
        most = max(most, np.float64(logits[e]))
    total = 1e-20
    for s in range(experts.shape[0]):
        logit = np.float64(logits[experts[s]])
        weight = np.exp(logit - most) if softmax else 1 / (1 + np.exp(-logit))
        weights[s] = weight
        total += weight
    for s in range(experts.shape[0]):
        weights[s] *= scale / total
