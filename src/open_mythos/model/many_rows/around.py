"""What stands around the layers of a stage, for a part of the rows: a loop's injection, adapter and halting, or a norm.

Main entries: `begin`, `finish`, `finish_back`, `begin_back`, which do nothing where nothing stands around the layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import typeof  # type: ignore[attr-defined]

from open_mythos.model.arithmetic.compiled import compiled, shared
from open_mythos.model.arithmetic.vectors import add_to, copied
from open_mythos.model.few_rows.pointwise import halting_probability
from open_mythos.model.many_rows.pointwise import normalise, row_back
from open_mythos.model.many_rows.products import across, by, by_turned
from open_mythos.model.many_rows.views import PASSES, active_at, numbers_at, rows_at, share_of
from open_mythos.model.rows import Array

AROUND_WEIGHTS = ("a", "b", "embedding", "down", "up", "scale", "halt", "bias", "norm_gain")
"""The injection's, the loop's, the adapter's, those of halting, and a norm's: what a stage has of them."""
AROUND_GIVEN = ("h", "e", *AROUND_WEIGHTS)
"""The state and the encoded input: only a loop has them, and only with them do rows that are not active stay apart."""
AROUND_KEPT = ("low", "norm_scales")
AROUND_SCRATCH = ("branches", "scaled_low", "dlow", "apart")
"""`branches` is what the layers added to the stream; `apart` the gradient that goes around them."""
AROUND_PASS = np.dtype(
    [
        *((name, np.int64) for name in (*AROUND_GIVEN, *AROUND_KEPT, *AROUND_SCRATCH)),
        *((name, np.int64) for name in ("out", "p", "dout", "dp", "dh", "de", "gains")),
        *((f"d{name}", np.int64) for name in AROUND_WEIGHTS),
        *((name, np.int64) for name in ("dim", "rank", "n_gains")),
        *((name, np.float32) for name in ("halt_eps", "norm_eps")),
    ],
    align=True,
)
"""Addresses and sizes; what there is not has the address 0. The result goes to `out`, which without an adapter and
without a norm is where the last layer's goes; `p` are halting probabilities. Of a weight's gradient every part has its
own, `n_gains` numbers further, zeros before."""
AROUNDS = typeof(np.zeros(1, AROUND_PASS))
"""What a step is given one of, to Numba."""


@compiled
def _own(around: Any, part: int, gradient: int, n: int) -> Array:
    """A part's own of a weight's gradient."""
    start = part * around.n_gains
    return numbers_at(gradient, start, start + n)


@shared(AROUNDS, PASSES, "int64")
def begin(arounds: Any, passes: Any, part: int) -> None:
    """What enters the first layer, `A*h + B*e` and the loop's embedding."""
    around, p = arounds[0], passes[0]
    if around.h:
        first, end = share_of(p.batch * p.seq, p, part)
        h, e = rows_at(around.h, first, end, around.dim), rows_at(around.e, first, end, around.dim)
        a, b = numbers_at(around.a, 0, around.dim), numbers_at(around.b, 0, around.dim)
        u = rows_at(p.x, first, end, around.dim)
        for i in range(end - first):
            own, given, to = h[i], e[i], u[i]
            for j in range(around.dim):
                to[j] = a[j] * own[j] + b[j] * given[j]
        if around.embedding:
            embedding = numbers_at(around.embedding, 0, around.dim)
            for i in range(end - first):
                add_to(embedding, u[i])


@shared(AROUNDS, PASSES, "int64")
def finish(arounds: Any, passes: Any, part: int) -> None:
    """From what leaves the last layer to the result."""
    around, p = arounds[0], passes[passes.shape[0] - 1]
    first, end = share_of(p.batch * p.seq, p, part)
    y, out = rows_at(p.y, first, end, around.dim), rows_at(around.out, first, end, around.dim)
    if around.norm_gain:
        scales = numbers_at(around.norm_scales, first, end)
        normalise(y, numbers_at(around.norm_gain, 0, around.dim), around.norm_eps, scales, out)
    if around.rank:
        _adapt(around, first, end, rows_at(passes[0].x, first, end, around.dim), y, out)
    if around.h and p.active:
        h, active = rows_at(around.h, first, end, around.dim), active_at(p, first, end)
        for i in range(end - first):
            if not active[i]:
                copied(h[i], out[i])
    if around.halt:
        weight, bias = rows_at(around.halt, 0, 1, around.dim), numbers_at(around.bias, 0, 1)
        halting_probability(out, weight, bias, around.halt_eps, numbers_at(around.p, first, end))


@compiled
def _adapt(around: Any, first: int, end: int, u: Array, y: Array, out: Array) -> None:
    """`out = y + up(scale * down(y - u))`."""
    low = rows_at(around.low, first, end, around.rank)
    branches = _branches(around, first, end, u, y)
    by_turned(branches, rows_at(around.down, 0, around.rank, around.dim), low, False)
    scaled_low = _scaled_low(around, first, end, low)
    for i in range(end - first):
        copied(y[i], out[i])
    by_turned(scaled_low, rows_at(around.up, 0, around.dim, around.rank), out, True)


@compiled
def _branches(around: Any, first: int, end: int, u: Array, y: Array) -> Array:
    branches = rows_at(around.branches, first, end, around.dim)
    for i in range(end - first):
        before, after, to = u[i], y[i], branches[i]
        for j in range(around.dim):
            to[j] = after[j] - before[j]
    return branches


@compiled
def _scaled_low(around: Any, first: int, end: int, low: Array) -> Array:
    scaled_low, scale = rows_at(around.scaled_low, first, end, around.rank), numbers_at(around.scale, 0, around.rank)
    for i in range(end - first):
        for r in range(around.rank):
            scaled_low[i, r] = scale[r] * low[i, r]
    return scaled_low


@shared(AROUNDS, PASSES, "int64")
def finish_back(arounds: Any, passes: Any, part: int) -> None:
    """From the gradients of the result and of the halting probabilities to that of what leaves the last layer."""
    around, p = arounds[0], passes[passes.shape[0] - 1]
    first, end = share_of(p.batch * p.seq, p, part)
    grad = rows_at(p.dy, first, end, around.dim)
    if around.dout != p.dy:
        _take(around, p, part, rows_at(around.dout, first, end, around.dim), grad)
    if around.dp:
        _halt_back(around, part, first, end, grad)
    if around.h and p.active:
        apart, active = rows_at(around.apart, first, end, around.dim), active_at(p, first, end)
        for i in range(end - first):
            if not active[i]:
                copied(grad[i], apart[i])
                grad[i] = 0
    if around.rank:
        _adapt_back(around, passes, part, grad)


@compiled
def _take(around: Any, p: Any, part: int, dout: Array, grad: Array) -> None:
    """The result's gradient, which is not to be changed, and before a norm the gradient of what enters that."""
    first, end = share_of(p.batch * p.seq, p, part)
    if around.norm_gain:
        y, scales = rows_at(p.y, first, end, around.dim), numbers_at(around.norm_scales, first, end)
        gain, dgain = numbers_at(around.norm_gain, 0, around.dim), _own(around, part, around.dnorm_gain, around.dim)
        for i in range(end - first):
            row_back(y[i], gain, scales[i], dout[i], grad[i], dgain)
    else:
        for i in range(end - first):
            copied(dout[i], grad[i])


@compiled
def _halt_back(around: Any, part: int, first: int, end: int, grad: Array) -> None:
    """Add to the gradient of states h what it gets from that of `p = sigmoid(w . h / (rms(h) + eps) + bias)`."""
    dim = around.dim
    h, weight = rows_at(around.out, first, end, dim), numbers_at(around.halt, 0, dim)
    p, dp = numbers_at(around.p, first, end), numbers_at(around.dp, first, end)
    dweight, dbias = _own(around, part, around.dhalt, dim), _own(around, part, around.dbias, 1)
    for i in range(end - first):
        row, to = h[i], grad[i]
        squares, product = np.float32(0), np.float32(0)
        for j in range(dim):
            squares += row[j] * row[j]
            product += row[j] * weight[j]
        rms = np.sqrt(squares / np.float32(dim))
        share = np.float32(1) / (rms + around.halt_eps)
        back = dp[i] * p[i] * (np.float32(1) - p[i])
        straight = back * share
        along = straight * product * share / (rms * np.float32(dim)) if rms > 0 else np.float32(0)
        for j in range(dim):
            to[j] += straight * weight[j] - along * row[j]
            dweight[j] += straight * row[j]
        dbias[0] += back


@compiled
def _adapt_back(around: Any, passes: Any, part: int, grad: Array) -> None:
    """Add to the gradient what it gets through the adapter; what enters the first layer gets the opposite, `apart`."""
    p, dim, rank = passes[passes.shape[0] - 1], around.dim, around.rank
    first, end = share_of(p.batch * p.seq, p, part)
    u, y = rows_at(passes[0].x, first, end, dim), rows_at(p.y, first, end, dim)
    low, dlow = rows_at(around.low, first, end, rank), rows_at(around.dlow, first, end, rank)
    scale, dscale = numbers_at(around.scale, 0, rank), _own(around, part, around.dscale, rank)
    branches, scaled_low = _branches(around, first, end, u, y), _scaled_low(around, first, end, low)
    ddown = _own(around, part, around.ddown, rank * dim).reshape(rank, dim)
    dup = _own(around, part, around.dup, rank * dim).reshape(dim, rank)
    across(grad, scaled_low, 0, dim, dup, False)
    by(grad, rows_at(around.up, 0, dim, rank), dlow, False)
    for i in range(end - first):
        for r in range(rank):
            dscale[r] += dlow[i, r] * low[i, r]
            dlow[i, r] *= scale[r]
    across(dlow, branches, 0, rank, ddown, False)
    by(dlow, rows_at(around.down, 0, rank, dim), branches, False)
    apart = rows_at(around.apart, first, end, dim)
    for i in range(end - first):
        if not p.active or active_at(p, first, end)[i]:
            back, to, away = branches[i], grad[i], apart[i]
            for j in range(dim):
                to[j] += back[j]
                away[j] = -back[j]


@shared(AROUNDS, PASSES, "int64")
def begin_back(arounds: Any, passes: Any, part: int) -> None:
    """From the gradient of what enters the first layer to those of the state, the encoded input and the weights."""
    around, p, dim = arounds[0], passes[0], arounds[0].dim
    if around.h:
        first, end = share_of(p.batch * p.seq, p, part)
        du = rows_at(p.dx, first, end, dim)
        if around.rank:
            _join(around, p, first, end, du)
        h, e = rows_at(around.h, first, end, dim), rows_at(around.e, first, end, dim)
        dh, de = rows_at(around.dh, first, end, dim), rows_at(around.de, first, end, dim)
        a, b = numbers_at(around.a, 0, dim), numbers_at(around.b, 0, dim)
        da, db = _own(around, part, around.da, dim), _own(around, part, around.db, dim)
        for i in range(end - first):
            grad, own, given, to, to_given = du[i], h[i], e[i], dh[i], de[i]
            for j in range(dim):
                to[j] = a[j] * grad[j]
                to_given[j] = b[j] * grad[j]
                da[j] += grad[j] * own[j]
                db[j] += grad[j] * given[j]
        if around.embedding:
            dembedding = _own(around, part, around.dembedding, dim)
            for i in range(end - first):
                add_to(du[i], dembedding)
        if p.active:
            apart, active = rows_at(around.apart, first, end, dim), active_at(p, first, end)
            for i in range(end - first):
                if not active[i]:
                    add_to(apart[i], dh[i])


@compiled
def _join(around: Any, p: Any, first: int, end: int, du: Array) -> None:
    """Add to the gradient what went around the layers, where a row is active: else it is the state's."""
    apart = rows_at(around.apart, first, end, around.dim)
    for i in range(end - first):
        if not p.active or active_at(p, first, end)[i]:
            add_to(apart[i], du[i])
