"""The steps of a layer over many positions, forward and backward.

Main entries: `project`, `attend`, `feed`; `feed_back`, `attend_back`, `project_back`, `weights_back`. A step is told
which of some layers it is about, and which part it does, of the rows, of the key heads or of the matrices.
"""

from __future__ import annotations

from typing import Any

from open_mythos.model.arithmetic.addresses import integers_at, matrix_at, stack_at, vector_at
from open_mythos.model.arithmetic.compiled import compiled, shared
from open_mythos.model.arithmetic.vectors import add_to, copied
from open_mythos.model.few_rows.layers import LAYERS
from open_mythos.model.many_rows.attention import attend as attend_head
from open_mythos.model.many_rows.attention import attend_back as attend_head_back
from open_mythos.model.many_rows.feed_forward import feed as feed_rows
from open_mythos.model.many_rows.feed_forward import feed_back as feed_rows_back
from open_mythos.model.many_rows.grouped import project as project_grouped
from open_mythos.model.many_rows.grouped import project_back as project_grouped_back
from open_mythos.model.many_rows.latent import project as project_latent
from open_mythos.model.many_rows.latent import project_back as project_latent_back
from open_mythos.model.many_rows.latent import rebuild, rebuild_back
from open_mythos.model.many_rows.pointwise import add_residual, normalise, normalise_again, normalise_back, scaled
from open_mythos.model.many_rows.products import across, by, by_turned
from open_mythos.model.many_rows.views import (
    PASSES,
    active_at,
    gains_of,
    heads_at,
    keys_and_values,
    numbers_at,
    rows_at,
    share_of,
)
from open_mythos.model.rows import Array


@shared(LAYERS, PASSES, "int64", "int64")
def project(layers: Any, passes: Any, which: int, part: int) -> None:
    layer, p = layers[which], passes[which]
    first, end = share_of(p.batch * p.seq, p, part)
    gain = vector_at(layer.attn_gain)
    x, normed = rows_at(p.x, first, end, gain.shape[0]), rows_at(p.normed, first, end, gain.shape[0])
    normalise(x, gain, layer.attn_eps, numbers_at(p.attn_scales, first, end), normed)
    if layer.is_latent:
        project_latent(layer, p, part, normed)
        _keep_halted(p, first, end, p.before_0, rows_at(p.entry_0, first, end, layer.down[2] - layer.q_gain[3]))
        rebuild(layer, p, part)
    else:
        project_grouped(layer, p, part, normed)
        _keep_halted(p, first, end, p.before_0, rows_at(p.entry_0, first, end, p.n_kv * p.key_width))
        _keep_halted(p, first, end, p.before_1, rows_at(p.entry_1, first, end, p.n_kv * p.value_width))


@compiled
def _keep_halted(p: Any, first: int, end: int, before: int, entries: Array) -> None:
    """Where a row is not active, its entry of the loop before."""
    if before:
        active, old = active_at(p, first, end), rows_at(before, first, end, entries.shape[1])
        for i in range(end - first):
            if not active[i]:
                copied(old[i], entries[i])


@compiled
def _keep_halted_back(p: Any, first: int, end: int, given: int, before: int, grad: Array) -> None:
    """Add the `given` gradient of entries; where a row is not active, it is that of the loop before."""
    if given:
        more = rows_at(given, first, end, grad.shape[1])
        for i in range(end - first):
            add_to(more[i], grad[i])
    if before:
        active, old = active_at(p, first, end), rows_at(before, first, end, grad.shape[1])
        for i in range(end - first):
            old[i] = 0
            if not active[i]:
                copied(grad[i], old[i])
                grad[i] = 0


@compiled
def _of_item(layer: Any, p: Any, item: int) -> tuple[int, int, Array, Array, Array, Array, Array]:
    """A sequence and a key head: its first row, the head, and the sequence's q, k, v, result and log-sum-exps."""
    b, head = item // p.n_kv, item % p.n_kv
    first, end = b * p.seq, (b + 1) * p.seq
    keys, values = keys_and_values(layer, p)
    q, k = heads_at(p.q, first, end, p.n_heads, p.key_width), heads_at(keys, first, end, p.n_kv, p.key_width)
    v, mixed = (
        heads_at(values, first, end, p.n_kv, p.value_width),
        heads_at(p.mixed, first, end, p.n_heads, p.value_width),
    )
    return first, head, q, k, v, mixed, rows_at(p.lse, b * p.n_heads, (b + 1) * p.n_heads, p.seq)


@shared(LAYERS, PASSES, "int64", "int64")
def attend(layers: Any, passes: Any, which: int, part: int) -> None:
    layer, p = layers[which], passes[which]
    first_item, last_item = share_of(p.batch * p.n_kv, p, part)
    for item in range(first_item, last_item):
        _, head, q, k, v, mixed, lse = _of_item(layer, p, item)
        attend_head(q, k, v, head, p.window, layer.attn_scale, vector_at(layer.sink), mixed, lse)


@shared(LAYERS, PASSES, "int64", "int64")
def attend_back(layers: Any, passes: Any, which: int, part: int) -> None:
    layer, p = layers[which], passes[which]
    first_item, last_item = share_of(p.batch * p.n_kv, p, part)
    for item in range(first_item, last_item):
        first, head, q, k, v, _, lse = _of_item(layer, p, item)
        end, b = first + p.seq, item // p.n_kv
        attend_head_back(
            q,
            k,
            v,
            head,
            p.window,
            layer.attn_scale,
            vector_at(layer.sink),
            lse,
            heads_at(p.dmixed, first, end, p.n_heads, p.value_width),
            heads_at(p.dq, first, end, p.n_heads, p.key_width),
            heads_at(p.dkeys, first, end, p.n_kv, p.key_width),
            heads_at(p.dvalues, first, end, p.n_kv, p.value_width),
            numbers_at(p.dsink, b * p.n_heads, (b + 1) * p.n_heads),
        )


@shared(LAYERS, PASSES, "int64", "int64")
def project_back(layers: Any, passes: Any, which: int, part: int) -> None:
    layer, p = layers[which], passes[which]
    first, end = share_of(p.batch * p.seq, p, part)
    gain = vector_at(layer.attn_gain)
    dim = gain.shape[0]
    x, scales = rows_at(p.x, first, end, dim), numbers_at(p.attn_scales, first, end)
    dnormed = rows_at(p.dnormed, first, end, dim)
    normalise_again(x, gain, scales, rows_at(p.normed, first, end, dim))  # for the matrix's gradient
    if layer.is_latent:
        rebuild_back(layer, p, part)
        latent = rows_at(p.dlatent, first, end, layer.down[2] - layer.q_gain[3])
        _keep_halted_back(p, first, end, p.dentry_0, p.dbefore_0, latent)
        project_latent_back(layer, p, part, dnormed)
    else:
        keys = rows_at(p.dkeys, first, end, p.n_kv * p.key_width)
        values = rows_at(p.dvalues, first, end, p.n_kv * p.value_width)
        _keep_halted_back(p, first, end, p.dentry_0, p.dbefore_0, keys)
        _keep_halted_back(p, first, end, p.dentry_1, p.dbefore_1, values)
        project_grouped_back(layer, p, part, dnormed)
    straight, dx = rows_at(p.dmiddle, first, end, dim), rows_at(p.dx, first, end, dim)
    normalise_back(x, gain, scales, dnormed, straight, dx, gains_of(p, part, 0, dim))


@shared(LAYERS, PASSES, "int64", "int64")
def feed(layers: Any, passes: Any, which: int, part: int) -> None:
    layer, p = layers[which], passes[which]
    first, end = share_of(p.batch * p.seq, p, part)
    out = matrix_at(layer.out)
    dim = out.shape[0]
    x, y, middle = rows_at(p.x, first, end, dim), rows_at(p.y, first, end, dim), rows_at(p.middle, first, end, dim)
    by_turned(rows_at(p.mixed, first, end, out.shape[1]), out, middle, False)
    _drop(p.attn_factors, first, middle)
    add_residual(x, layer.branch_scale, middle)
    feed_rows(layer, p, part, middle, y)
    _drop(p.ffn_factors, first, y)
    add_residual(middle, layer.branch_scale, y)


@compiled
def _drop(factors: int, first: int, branch: Array) -> None:
    """`branch *= factors` from row `first` on, if there are any: dropout, of what a branch adds or of its gradient."""
    if factors:
        own = rows_at(factors, first, first + branch.shape[0], branch.shape[1])
        for i in range(branch.shape[0]):
            row, to = own[i], branch[i]
            for j in range(to.shape[0]):
                to[j] *= row[j]


@shared(LAYERS, PASSES, "int64", "int64")
def feed_back(layers: Any, passes: Any, which: int, part: int) -> None:
    layer, p = layers[which], passes[which]
    first, end = share_of(p.batch * p.seq, p, part)
    gain, out = vector_at(layer.ffn_gain), matrix_at(layer.out)
    dim = gain.shape[0]
    middle, dy = rows_at(p.middle, first, end, dim), rows_at(p.dy, first, end, dim)
    grad, dnormed = rows_at(p.scaled_dy, first, end, dim), rows_at(p.dnormed, first, end, dim)
    scaled(dy, layer.branch_scale, grad)
    _drop(p.ffn_factors, first, grad)
    feed_rows_back(layer, p, part, middle, grad, dnormed)
    dmiddle, small = rows_at(p.dmiddle, first, end, dim), rows_at(p.scaled_dmiddle, first, end, dim)
    scales = numbers_at(p.ffn_scales, first, end)
    normalise_back(middle, gain, scales, dnormed, dy, dmiddle, gains_of(p, part, dim, dim))
    scaled(dmiddle, layer.branch_scale, small)
    _drop(p.attn_factors, first, small)
    by(small, out, rows_at(p.dmixed, first, end, out.shape[1]), False)


@compiled
def _weight_back(p: Any, part: int, grads: int, inputs: int, out: Array) -> None:
    """This part of the rows of a matrix's gradient, given what goes in and the gradient of what comes out."""
    n, (width, dim) = p.batch * p.seq, out.shape
    first, end = share_of(width, p, part)
    across(rows_at(grads, 0, n, width), rows_at(inputs, 0, n, dim), first, end, out, False)


@shared(LAYERS, LAYERS, PASSES, "int64", "int64")
def weights_back(layers: Any, gradients: Any, passes: Any, which: int, part: int) -> None:
    """The gradients of this part of every matrix's rows."""
    layer, grads, p = layers[which], gradients[which], passes[which]
    n, parts, top_k = p.batch * p.seq, p.parts, layer.top_k
    if layer.is_latent:
        kv_up = stack_at(grads.kv_up)
        _weight_back(p, part, p.draw, p.normed, matrix_at(grads.down))
        _weight_back(p, part, p.dq, p.low, matrix_at(grads.q_up))
        _weight_back(p, part, p.dkv, p.latents, kv_up.reshape(kv_up.shape[0] * kv_up.shape[1], kv_up.shape[2]))
    else:
        _weight_back(p, part, p.draw, p.normed, matrix_at(grads.qkv))
    _weight_back(p, part, p.scaled_dmiddle, p.mixed, matrix_at(grads.out))
    gate = stack_at(grads.gate)[0]
    if gate.shape[0]:
        _weight_back(p, part, p.dgates, p.ffn_normed, gate)
        _weight_back(p, part, p.dups, p.ffn_normed, stack_at(grads.up)[0])
        _weight_back(p, part, p.scaled_dy, p.hidden, matrix_at(grads.ffn_down))
    router, gate, up, down = (
        matrix_at(grads.router),
        stack_at(grads.expert_gate),
        stack_at(grads.expert_up),
        stack_at(grads.expert_down),
    )
    n_experts, width, dim = gate.shape
    if n_experts:
        _weight_back(p, part, p.dlogits, p.ffn_normed, router)
    first, end = share_of(width, p, part)
    for e in range(n_experts):
        for other in range(parts):
            ends, before = integers_at(p.ends, other * n_experts, (other + 1) * n_experts), n * other // parts * top_k
            start, stop = before + (ends[e - 1] if e else 0), before + ends[e]
            rows, drows = rows_at(p.rows, start, stop, dim), rows_at(p.drows, start, stop, dim)
            across(rows_at(p.dexpert_gates, start, stop, width), rows, first, end, gate[e], other > 0)
            across(rows_at(p.dexpert_ups, start, stop, width), rows, first, end, up[e], other > 0)
            across(rows_at(p.expert_hidden, start, stop, width), drows, first, end, down[e], other > 0)
