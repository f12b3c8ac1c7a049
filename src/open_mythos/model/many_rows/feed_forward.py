"""The feed-forward of some rows: norm, router, experts; and the way back.

Main entries: `feed`, `feed_back`. A dense layer is a shared expert without others. Slots are sorted by expert within a
part of the rows: expert e has those up to `ends[e]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from open_mythos.model.arithmetic.addresses import integers_at, matrix_at, stack_at, vector_at
from open_mythos.model.arithmetic.compiled import compiled
from open_mythos.model.arithmetic.exponential import exp
from open_mythos.model.few_rows.feed_forward import dispatch, gather
from open_mythos.model.many_rows.pointwise import normalise, normalise_again
from open_mythos.model.many_rows.products import by, by_turned
from open_mythos.model.many_rows.views import active_at, numbers_at, rows_at, share_of
from open_mythos.model.rows import Array, Rows


@compiled
def feed(layer: Any, p: Any, part: int, x: Array, out: Array) -> None:
    """What the feed-forward makes of this part's rows x (n, dim), to `out`; what the way back needs is kept."""
    first, end = share_of(p.batch * p.seq, p, part)
    normed = rows_at(p.ffn_normed, first, end, x.shape[1])
    normalise(x, vector_at(layer.ffn_gain), layer.ffn_eps, numbers_at(p.ffn_scales, first, end), normed)
    gate = stack_at(layer.gate)[0]
    width = gate.shape[0]
    if width:
        gates, ups = rows_at(p.gates, first, end, width), rows_at(p.ups, first, end, width)
        hidden = rows_at(p.hidden, first, end, width)
        by_turned(normed, gate, gates, False)
        by_turned(normed, stack_at(layer.up)[0], ups, False)
        _swiglu(gates, ups, np.ones(end - first, np.float32), hidden)
        by_turned(hidden, matrix_at(layer.ffn_down), out, False)
    else:
        for i in range(end - first):
            out[i] = 0
    if layer.top_k:
        _add_experts(layer, p, part, normed, out)


@compiled
def _slots(layer: Any, p: Any, part: int) -> tuple[int, int, Rows, Rows]:
    """The first and last of this part's slots, where each expert's end, and whose they are, counted from the part's."""
    (first, end), n_experts = share_of(p.batch * p.seq, p, part), vector_at(layer.router_bias).shape[0]
    start, stop = first * layer.top_k, end * layer.top_k
    ends = integers_at(p.ends, part * n_experts, (part + 1) * n_experts)
    return start, stop, ends, integers_at(p.owners, start, stop)


@compiled
def _add_experts(layer: Any, p: Any, part: int, normed: Array, out: Array) -> None:
    first, end = share_of(p.batch * p.seq, p, part)
    start, stop, ends, owners = _slots(layer, p, part)
    gate, up, down = stack_at(layer.expert_gate), stack_at(layer.expert_up), stack_at(layer.expert_down)
    bias, dim, width = vector_at(layer.router_bias), normed.shape[1], gate.shape[1]
    logits, factors = rows_at(p.logits, first, end, bias.shape[0]), numbers_at(p.factors, start, stop)
    by_turned(normed, matrix_at(layer.router), logits, False)
    ends[:] = 0
    dispatch(logits, bias, layer.is_softmax != 0, layer.expert_scale, ends, owners, factors)
    _count(p, part, first, end, ends, owners)
    rows, hidden = rows_at(p.rows, start, stop, dim), rows_at(p.expert_hidden, start, stop, width)
    gates, ups = rows_at(p.expert_gates, start, stop, width), rows_at(p.expert_ups, start, stop, width)
    gather(normed, owners, rows)
    begin = 0
    for e in range(ends.shape[0]):
        if begin < ends[e]:
            by_turned(rows[begin : ends[e]], gate[e], gates[begin : ends[e]], False)
            by_turned(rows[begin : ends[e]], up[e], ups[begin : ends[e]], False)
        begin = ends[e]
    _swiglu(gates, ups, factors, hidden)
    begin = 0
    for e in range(ends.shape[0]):
        if begin < ends[e]:
            by(hidden[begin : ends[e]], down[e], rows[begin : ends[e]], False)
        begin = ends[e]
    _scatter_add(rows, owners, out)


@compiled
def _count(p: Any, part: int, first: int, end: int, ends: Rows, owners: Rows) -> None:
    """How many active slots each expert has in this part of the rows."""
    n_experts = ends.shape[0]
    loads, start = integers_at(p.loads, part * n_experts, (part + 1) * n_experts), 0
    for e in range(n_experts):
        loads[e] = ends[e] - start
        if p.active:
            active = active_at(p, first, end)
            for r in range(start, ends[e]):
                if not active[owners[r]]:
                    loads[e] -= 1
        start = ends[e]


@compiled
def feed_back(layer: Any, p: Any, part: int, x: Array, grad: Array, dnormed: Array) -> None:
    """The gradient of what the norm gives, `dnormed`, given that of `feed`'s `out`.

    What the matrices' gradients follow from is left in the pass: what goes into products, which is computed again, and
    the gradients of what comes out.
    """
    first, end = share_of(p.batch * p.seq, p, part)
    normed = rows_at(p.ffn_normed, first, end, x.shape[1])
    normalise_again(x, vector_at(layer.ffn_gain), numbers_at(p.ffn_scales, first, end), normed)
    gate = stack_at(layer.gate)[0]
    width = gate.shape[0]
    if width:
        gates, ups = rows_at(p.gates, first, end, width), rows_at(p.ups, first, end, width)
        dgates, dups = rows_at(p.dgates, first, end, width), rows_at(p.dups, first, end, width)
        hidden, dhidden = rows_at(p.hidden, first, end, width), rows_at(p.dhidden, first, end, width)
        ones, nobodys = np.ones(end - first, np.float32), np.empty(end - first, np.float32)
        by(grad, matrix_at(layer.ffn_down), dhidden, False)
        _swiglu_back(gates, ups, ones, dhidden, hidden, dgates, dups, nobodys)
        by(dgates, gate, dnormed, False)
        by(dups, stack_at(layer.up)[0], dnormed, True)
    else:
        for i in range(end - first):
            dnormed[i] = 0
    if layer.top_k:
        _add_experts_back(layer, p, part, normed, grad, dnormed)


@compiled
def _add_experts_back(layer: Any, p: Any, part: int, normed: Array, grad: Array, dnormed: Array) -> None:
    first, end = share_of(p.batch * p.seq, p, part)
    start, stop, ends, owners = _slots(layer, p, part)
    gate, up, down = stack_at(layer.expert_gate), stack_at(layer.expert_up), stack_at(layer.expert_down)
    n_experts, dim, width = ends.shape[0], normed.shape[1], gate.shape[1]
    logits, dlogits = rows_at(p.logits, first, end, n_experts), rows_at(p.dlogits, first, end, n_experts)
    factors, dfactors = numbers_at(p.factors, start, stop), np.empty(stop - start, np.float32)
    rows, drows = rows_at(p.rows, start, stop, dim), rows_at(p.drows, start, stop, dim)
    back = rows_at(p.row_grads, start, stop, dim)
    gates, ups = rows_at(p.expert_gates, start, stop, width), rows_at(p.expert_ups, start, stop, width)
    dgates, dups = rows_at(p.dexpert_gates, start, stop, width), rows_at(p.dexpert_ups, start, stop, width)
    hidden, dhidden = rows_at(p.expert_hidden, start, stop, width), rows_at(p.dexpert_hidden, start, stop, width)
    gather(normed, owners, rows)
    gather(grad, owners, drows)
    begin = 0
    for e in range(n_experts):
        if begin < ends[e]:
            by_turned(drows[begin : ends[e]], down[e], dhidden[begin : ends[e]], False)
        begin = ends[e]
    _swiglu_back(gates, ups, factors, dhidden, hidden, dgates, dups, dfactors)
    begin = 0
    for e in range(n_experts):
        if begin < ends[e]:
            by(dgates[begin : ends[e]], gate[e], back[begin : ends[e]], False)
            by(dups[begin : ends[e]], up[e], back[begin : ends[e]], True)
        begin = ends[e]
    _scatter_add(back, owners, dnormed)
    _route_back(logits, layer.is_softmax != 0, layer.expert_scale, ends, owners, factors, dfactors, dlogits)
    by(dlogits, matrix_at(layer.router), dnormed, True)


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
