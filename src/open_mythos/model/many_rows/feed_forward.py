"""The feed-forward of some rows: norm, router, experts; and the way back.

Main entries: `feed`, `feed_back`.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.few_rows.compiled import compiled
from open_mythos.model.few_rows.feed_forward import dispatch
from open_mythos.model.many_rows.pointwise import exp, normalise, normalise_again
from open_mythos.model.many_rows.products import by, by_turned
from open_mythos.model.rows import Array, Rows


@compiled
def feed(
    x: Array,
    gain: Array,
    eps: np.float32,
    gate: Array,
    up: Array,
    down: Array,
    router: Array,
    bias: Array,
    softmax: bool,
    scale: np.float32,
    expert_gate: Array,
    expert_up: Array,
    expert_down: Array,
    scales: Array,
    gates: Array,
    ups: Array,
    logits: Array,
    ends: Rows,
    owners: Rows,
    factors: Array,
    expert_gates: Array,
    expert_ups: Array,
    normed: Array,
    hidden: Array,
    rows: Array,
    expert_hidden: Array,
    out: Array,
) -> None:
    """Rows x (n, dim) to what the feed-forward makes of them, `out`, by way of all that `feed_back` needs and names.

    Slots are sorted by expert: expert e has those up to `ends[e]`.
    """
    n, dim = x.shape
    normalise(x, gain, eps, scales, normed)
    if hidden.shape[1]:
        by_turned(normed, gate, gates, False)
        by_turned(normed, up, ups, False)
        _swiglu(gates, ups, np.ones(n, np.float32), hidden)
        by_turned(hidden, down, out, False)
    else:
        for i in range(n):
            for j in range(dim):
                out[i, j] = 0
    if bias.size:
        by_turned(normed, router, logits, False)
        ends[:] = 0
        dispatch(logits, bias, softmax, scale, ends, owners, factors)
        _gather(normed, owners, rows)
        start = 0
        for e in range(bias.shape[0]):
            stop = ends[e]
            if start < stop:
                by_turned(rows[start:stop], expert_gate[e], expert_gates[start:stop], False)
                by_turned(rows[start:stop], expert_up[e], expert_ups[start:stop], False)
            start = stop
        _swiglu(expert_gates, expert_ups, factors, expert_hidden)
        start = 0
        for e in range(bias.shape[0]):
            stop = ends[e]
            if start < stop:
                by(expert_hidden[start:stop], expert_down[e], rows[start:stop], False)
            start = stop
        _scatter_add(rows, owners, out)


@compiled
def feed_back(
    x: Array,
    gain: Array,
    gate: Array,
    up: Array,
    down: Array,
    router: Array,
    softmax: bool,
    scale: np.float32,
    expert_gate: Array,
    expert_up: Array,
    expert_down: Array,
    scales: Array,
    gates: Array,
    ups: Array,
    logits: Array,
    ends: Rows,
    owners: Rows,
    factors: Array,
    expert_gates: Array,
    expert_ups: Array,
    grad: Array,
    normed: Array,
    hidden: Array,
    dgates: Array,
    dups: Array,
    dlogits: Array,
    rows: Array,
    drows: Array,
    expert_hidden: Array,
    dhidden: Array,
    dexpert_hidden: Array,
    dexpert_gates: Array,
    dexpert_ups: Array,
    row_grads: Array,
    dnormed: Array,
) -> None:
    """The gradients of what the products give, and of the norm's result, given that of `feed`'s `out`.

    What goes into the products is computed again: `normed`, `hidden`, and slot by slot `rows` and `expert_hidden`, with
    `drows` the gradient of what the slot has given.
    """
    n, dim = x.shape
    normalise_again(x, gain, scales, normed)
    if hidden.shape[1]:
        by(grad, down, dhidden, False)
        _swiglu_back(gates, ups, np.ones(n, np.float32), dhidden, hidden, dgates, dups, np.empty(n, np.float32))
        by(dgates, gate, dnormed, False)
        by(dups, up, dnormed, True)
    else:
        for i in range(n):
            for j in range(dim):
                dnormed[i, j] = 0
    n_slots, n_experts = owners.shape[0], ends.shape[0]
    if n_experts:
        _gather(normed, owners, rows)
        _gather(grad, owners, drows)
        dfactors = np.empty(n_slots, np.float32)
        start = 0
        for e in range(n_experts):
            stop = ends[e]
            if start < stop:
                by_turned(drows[start:stop], expert_down[e], dexpert_hidden[start:stop], False)
            start = stop
        _swiglu_back(
            expert_gates, expert_ups, factors, dexpert_hidden, expert_hidden, dexpert_gates, dexpert_ups, dfactors
        )
        start = 0
        for e in range(n_experts):
            stop = ends[e]
            if start < stop:
                by(dexpert_gates[start:stop], expert_gate[e], row_grads[start:stop], False)
                by(dexpert_ups[start:stop], expert_up[e], row_grads[start:stop], True)
            start = stop
        _scatter_add(row_grads, owners, dnormed)
        _route_back(logits, softmax, scale, ends, owners, factors, dfactors, dlogits)
        by(dlogits, router, dnormed, True)


@compiled
def _swiglu(gate: Array, up: Array, factors: Array, out: Array) -> None:
    """`factor * silu(gate) * up`, row by row."""
    n, width = gate.shape
    one = np.float32(1)
    for i in range(n):
        g, u, to, factor = gate[i], up[i], out[i], factors[i]
        for j in range(width):
            to[j] = factor * g[j] * u[j] / (one + exp(-g[j]))


@compiled
def _swiglu_back(
    gate: Array, up: Array, factors: Array, grad: Array, hidden: Array, dgate: Array, dup: Array, dfactors: Array
) -> None:
    """The gradients of gate, up and factors, given that of `hidden`, which is computed again."""
    n, width = gate.shape
    one = np.float32(1)
    for i in range(n):
        g, u, own, to, factor, dg, du = gate[i], up[i], grad[i], hidden[i], factors[i], dgate[i], dup[i]
        total = np.float32(0)
        for j in range(width):
            share = one / (one + exp(-g[j]))
            silu = g[j] * share
            total += own[j] * silu * u[j]
            to[j] = factor * silu * u[j]
            back = factor * own[j]
            dg[j] = back * u[j] * (share + silu * (one - share))
            du[j] = back * silu
        dfactors[i] = total


@compiled
def _gather(x: Array, owners: Rows, out: Array) -> None:
    dim = x.shape[1]
    for r in range(owners.shape[0]):
        row, to = x[owners[r]], out[r]
        for j in range(dim):
            to[j] = row[j]


@compiled
def _scatter_add(rows: Array, owners: Rows, out: Array) -> None:
    dim = rows.shape[1]
    for r in range(owners.shape[0]):
        row, to = rows[r], out[owners[r]]
        for j in range(dim):
            to[j] += row[j]


@compiled
def _route_back(
    logits: Array,
    softmax: bool,
    scale: np.float32,
    ends: Rows,
    owners: Rows,
    factors: Array,
    dfactors: Array,
    out: Array,
) -> None:
    """The gradient of the router's logits (n, experts), given that of the factors of all slots.

    A factor is its score's share of the chosen ones' sum, times `scale`; the score an exponential or a sigmoid.
    """
    n, n_experts = logits.shape
    means = np.zeros(n, np.float32)
    share = np.float32(1) / scale if scale != 0 else np.float32(0)
    for r in range(owners.shape[0]):
        means[owners[r]] += dfactors[r] * factors[r] * share
    for i in range(n):
        for e in range(n_experts):
            out[i, e] = 0
    start, one = 0, np.float32(1)
    for e in range(n_experts):
        for r in range(start, ends[e]):
            i = owners[r]
            slope = one if softmax else one / (one + exp(logits[i, e]))
            out[i, e] = factors[r] * (dfactors[r] - means[i]) * slope
        start = ends[e]
