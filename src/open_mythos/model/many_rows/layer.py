"""A whole layer over many positions, forward and backward, on several threads.

Main entries: `forward`, `backward`, `PASS`. Every step goes to all threads, a part of the rows, of the key heads or of
the matrices to each; a part is all that its function is told beside the layer and the pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, prange, typeof  # type: ignore[attr-defined]

from open_mythos.model.few_rows.compiled import compiled, parallel, shared
from open_mythos.model.few_rows.layers import LAYER, matrix_at, pointer, stack_at, vector_at
from open_mythos.model.many_rows.attention import attend, attend_back
from open_mythos.model.many_rows.feed_forward import feed, feed_back
from open_mythos.model.many_rows.grouped import project as project_grouped
from open_mythos.model.many_rows.grouped import project_back as project_grouped_back
from open_mythos.model.many_rows.latent import project as project_latent
from open_mythos.model.many_rows.latent import project_back as project_latent_back
from open_mythos.model.many_rows.latent import rebuild, rebuild_back
from open_mythos.model.many_rows.pointwise import add_residual, add_to, copied, normalise_back, scaled
from open_mythos.model.many_rows.products import across, by, by_turned
from open_mythos.model.rows import Array, Rows

KEPT = (
    *("attn_scales", "raw", "q", "rebuilt_keys", "rebuilt_values", "mixed", "lse", "middle"),
    *("ffn_scales", "gates", "ups", "logits", "factors", "expert_gates", "expert_ups"),
)
"""What the way back needs."""
SCRATCH = (
    *("normed", "dnormed", "draw", "dq", "dkeys", "dvalues", "dmixed"),
    *("low", "dlow", "latents", "dlatents", "dkv", "dlatent"),
    *("scaled_dmiddle", "dmiddle", "ffn_normed", "scaled_dy", "hidden", "dgates", "dups", "dlogits"),
    *("dhidden", "rows", "drows", "row_grads", "expert_hidden", "dexpert_hidden", "dexpert_gates", "dexpert_ups"),
)
"""What is needed for a moment."""
COUNTED = ("ends", "owners", "loads")
"""Integers: where the slots of each part's experts end, whose they are, and how many of these are active."""
GIVEN = (
    *("x", "y", "entry_0", "entry_1", "before_0", "before_1", "active"),
    *("dx", "dy", "dentry_0", "dentry_1", "dbefore_0", "dbefore_1", "dsink", "gains"),
)
"""Entries are keys and values, or latents and nothing; those of the loop before serve where a row is not active. What
there is not has the address 0. Of gains, every part has a line, zeros before: both norms' of the layer, then those of
attention's own."""
SIZES = (
    "rotations",
    "batch",
    "seq",
    "window",
    "parts",
    "n_heads",
    "n_kv",
    "key_width",
    "value_width",
    "rotary_width",
    "n_gains",
)
PASS = np.dtype([(name, np.int64) for name in (*KEPT, *SCRATCH, *COUNTED, *GIVEN, *SIZES)])
"""Addresses and sizes of one pass."""
_LAYERS, _PASSES = typeof(np.zeros(1, LAYER)), typeof(np.zeros(1, PASS))


@compiled
def _numbers(address: int, first: int, end: int) -> Array:
    return carray(pointer(address + 4 * first), (end - first,), np.float32)


@compiled
def _rows(address: int, first: int, end: int, width: int) -> Array:
    """Rows `first` to `end` of a matrix that lies there."""
    return carray(pointer(address + 4 * first * width), (end - first, width), np.float32)


@compiled
def _heads(address: int, first: int, end: int, heads: int, width: int) -> Array:
    return carray(pointer(address + 4 * first * heads * width), (end - first, heads, width), np.float32)


@compiled
def _integers(address: int, first: int, end: int) -> Rows:
    return carray(pointer(address + 8 * first), (end - first,), np.int64)


@compiled
def _share(n: int, p: Any, part: int) -> tuple[int, int]:
    return n * part // p.parts, n * (part + 1) // p.parts


@compiled
def _keys_and_values(layer: Any, p: Any) -> tuple[int, int]:
    if layer.is_latent:
        return p.rebuilt_keys, p.rebuilt_values
    return p.entry_0, p.entry_1


@compiled
def _gains(p: Any, part: int, first: int, n: int) -> Array:
    start = part * p.n_gains + first
    return _numbers(p.gains, start, start + n)


@shared(_LAYERS, _PASSES, "int64")
def _project(layers: Any, passes: Any, part: int) -> None:
    layer, p = layers[0], passes[0]
    first, end = _share(p.batch * p.seq, p, part)
    gain, rotations = vector_at(layer.attn_gain), _rows(p.rotations, 0, p.seq, p.rotary_width)
    x, scales = _rows(p.x, first, end, gain.shape[0]), _numbers(p.attn_scales, first, end)
    normed = _rows(p.normed, first, end, gain.shape[0])
    q = _heads(p.q, first, end, p.n_heads, p.key_width)
    if layer.is_latent:
        down, q_gain, kv_gain = matrix_at(layer.down), vector_at(layer.q_gain), vector_at(layer.kv_gain)
        width = down.shape[0] - q_gain.shape[0]
        raw, latent = _rows(p.raw, first, end, down.shape[0]), _rows(p.entry_0, first, end, width)
        q_up, eps, low = matrix_at(layer.q_up), layer.attn_eps, _rows(p.low, first, end, q_gain.shape[0])
        project_latent(x, gain, eps, down, q_gain, q_up, kv_gain, rotations, first, scales, normed, raw, low, q, latent)
        _keep_halted(p, first, end, p.before_0, latent)
        k = _heads(p.rebuilt_keys, first, end, p.n_kv, p.key_width)
        kv_up, v = stack_at(layer.kv_up), _heads(p.rebuilt_values, first, end, p.n_kv, p.value_width)
        kv = _rows(p.dkv, first, end, kv_up.shape[0] * kv_up.shape[1])
        rebuild(latent, kv_up, _rows(p.latents, first, end, kv_gain.shape[0]), kv, k, v)
    else:
        qkv, qk_gain, normed_heads = matrix_at(layer.qkv), matrix_at(layer.qk_gain), layer.has_normed_heads != 0
        raw = _rows(p.raw, first, end, qkv.shape[0])
        k = _heads(p.entry_0, first, end, p.n_kv, p.key_width)
        v = _heads(p.entry_1, first, end, p.n_kv, p.value_width)
        eps = layer.attn_eps
        project_grouped(x, gain, eps, qkv, normed_heads, qk_gain, rotations, first, scales, normed, raw, q, k, v)
        _keep_halted(p, first, end, p.before_0, _rows(p.entry_0, first, end, p.n_kv * p.key_width))
        _keep_halted(p, first, end, p.before_1, _rows(p.entry_1, first, end, p.n_kv * p.value_width))


@compiled
def _active(p: Any, first: int, end: int) -> npt.NDArray[np.uint8]:
    return carray(pointer(p.active + first), (end - first,), np.uint8)


@compiled
def _keep_halted(p: Any, first: int, end: int, before: int, entries: Array) -> None:
    """Where a row is not active, its entry of the loop before."""
    if before:
        active, old = _active(p, first, end), _rows(before, first, end, entries.shape[1])
        for i in range(end - first):
            if not active[i]:
                copied(old[i], entries[i])


@compiled
def _keep_halted_back(p: Any, first: int, end: int, given: int, before: int, grad: Array) -> None:
    """Add the `given` gradient of entries; where a row is not active, it is that of the loop before."""
    if given:
        more = _rows(given, first, end, grad.shape[1])
        for i in range(end - first):
            add_to(more[i], grad[i])
    if before:
        active, old = _active(p, first, end), _rows(before, first, end, grad.shape[1])
        for i in range(end - first):
            old[i] = 0
            if not active[i]:
                copied(grad[i], old[i])
                grad[i] = 0


@shared(_LAYERS, _PASSES, "int64")
def _attend(layers: Any, passes: Any, part: int) -> None:
    layer, p = layers[0], passes[0]
    sink, (keys, values) = vector_at(layer.sink), _keys_and_values(layer, p)
    first_item, last_item = _share(p.batch * p.n_kv, p, part)
    for item in range(first_item, last_item):
        b, head = item // p.n_kv, item % p.n_kv
        first, end = b * p.seq, (b + 1) * p.seq
        q, mixed = (
            _heads(p.q, first, end, p.n_heads, p.key_width),
            _heads(p.mixed, first, end, p.n_heads, p.value_width),
        )
        k, v = _heads(keys, first, end, p.n_kv, p.key_width), _heads(values, first, end, p.n_kv, p.value_width)
        lse = _rows(p.lse, b * p.n_heads, (b + 1) * p.n_heads, p.seq)
        attend(q, k, v, head, p.window, layer.attn_scale, sink, mixed, lse)


@shared(_LAYERS, _PASSES, "int64")
def _attend_back(layers: Any, passes: Any, part: int) -> None:
    layer, p = layers[0], passes[0]
    sink, (keys, values) = vector_at(layer.sink), _keys_and_values(layer, p)
    first_item, last_item = _share(p.batch * p.n_kv, p, part)
    for item in range(first_item, last_item):
        b, head = item // p.n_kv, item % p.n_kv
        first, end = b * p.seq, (b + 1) * p.seq
        attend_back(
            _heads(p.q, first, end, p.n_heads, p.key_width),
            _heads(keys, first, end, p.n_kv, p.key_width),
            _heads(values, first, end, p.n_kv, p.value_width),
            head,
            p.window,
            layer.attn_scale,
            sink,
            _heads(p.mixed, first, end, p.n_heads, p.value_width),
            _rows(p.lse, b * p.n_heads, (b + 1) * p.n_heads, p.seq),
            _heads(p.dmixed, first, end, p.n_heads, p.value_width),
            _heads(p.dq, first, end, p.n_heads, p.key_width),
            _heads(p.dkeys, first, end, p.n_kv, p.key_width),
            _heads(p.dvalues, first, end, p.n_kv, p.value_width),
            _numbers(p.dsink, b * p.n_heads, (b + 1) * p.n_heads),
        )


@shared(_LAYERS, _PASSES, "int64")
def _project_back(layers: Any, passes: Any, part: int) -> None:
    layer, p = layers[0], passes[0]
    first, end = _share(p.batch * p.seq, p, part)
    gain, rotations = vector_at(layer.attn_gain), _rows(p.rotations, 0, p.seq, p.rotary_width)
    dim, eps = gain.shape[0], layer.attn_eps
    x, scales = _rows(p.x, first, end, dim), _numbers(p.attn_scales, first, end)
    normed, dnormed = _rows(p.normed, first, end, dim), _rows(p.dnormed, first, end, dim)
    dq = _heads(p.dq, first, end, p.n_heads, p.key_width)
    dk, dv = _heads(p.dkeys, first, end, p.n_kv, p.key_width), _heads(p.dvalues, first, end, p.n_kv, p.value_width)
    inner = 2 * dim
    if layer.is_latent:
        down, q_up, kv_up = matrix_at(layer.down), matrix_at(layer.q_up), stack_at(layer.kv_up)
        q_gain, kv_gain = vector_at(layer.q_gain), vector_at(layer.kv_gain)
        rank, q_rank = kv_gain.shape[0], q_gain.shape[0]
        latent, dlatent = (
            _rows(p.entry_0, first, end, down.shape[0] - q_rank),
            _rows(p.dlatent, first, end, down.shape[0] - q_rank),
        )
        dkv = _rows(p.dkv, first, end, kv_up.shape[0] * kv_up.shape[1])
        low = _rows(p.dlatents, first, end, rank)
        rebuild_back(latent, kv_up, dk, dv, _rows(p.latents, first, end, rank), dkv, low, dlatent)
        _keep_halted_back(p, first, end, p.dentry_0, p.dbefore_0, dlatent)
        project_latent_back(
            x,
            gain,
            eps,
            down,
            q_gain,
            q_up,
            kv_gain,
            rotations,
            first,
            scales,
            _rows(p.raw, first, end, down.shape[0]),
            dq,
            dlatent,
            normed,
            _rows(p.low, first, end, q_rank),
            _rows(p.dlow, first, end, q_rank),
            _rows(p.draw, first, end, down.shape[0]),
            dnormed,
            _gains(p, part, inner, q_rank),
            _gains(p, part, inner + q_rank, rank),
        )
    else:
        qkv, qk_gain = matrix_at(layer.qkv), matrix_at(layer.qk_gain)
        _keep_halted_back(p, first, end, p.dentry_0, p.dbefore_0, _rows(p.dkeys, first, end, p.n_kv * p.key_width))
        _keep_halted_back(p, first, end, p.dentry_1, p.dbefore_1, _rows(p.dvalues, first, end, p.n_kv * p.value_width))
        project_grouped_back(
            x,
            gain,
            eps,
            qkv,
            layer.has_normed_heads != 0,
            qk_gain,
            rotations,
            first,
            scales,
            _rows(p.raw, first, end, qkv.shape[0]),
            dq,
            dk,
            dv,
            normed,
            _rows(p.draw, first, end, qkv.shape[0]),
            dnormed,
            _gains(p, part, inner, qk_gain.size).reshape(qk_gain.shape),
        )
    straight, dx = _rows(p.dmiddle, first, end, dim), _rows(p.dx, first, end, dim)
    normalise_back(x, gain, scales, dnormed, straight, dx, _gains(p, part, 0, dim))


@shared(_LAYERS, _PASSES, "int64")
def _feed(layers: Any, passes: Any, part: int) -> None:
    layer, p = layers[0], passes[0]
    first, end = _share(p.batch * p.seq, p, part)
    gain, out = vector_at(layer.ffn_gain), matrix_at(layer.out)
    dim = gain.shape[0]
    x, y, middle = _rows(p.x, first, end, dim), _rows(p.y, first, end, dim), _rows(p.middle, first, end, dim)
    by_turned(_rows(p.mixed, first, end, out.shape[1]), out, middle, False)
    add_residual(x, layer.branch_scale, middle)
    gate, expert_gate, bias = stack_at(layer.gate)[0], stack_at(layer.expert_gate), vector_at(layer.router_bias)
    k, n_experts, width, hidden = layer.top_k, bias.shape[0], gate.shape[0], expert_gate.shape[1]
    feed(
        middle,
        gain,
        layer.ffn_eps,
        gate,
        stack_at(layer.up)[0],
        matrix_at(layer.ffn_down),
        matrix_at(layer.router),
        bias,
        layer.is_softmax != 0,
        layer.expert_scale,
        expert_gate,
        stack_at(layer.expert_up),
        stack_at(layer.expert_down),
        _numbers(p.ffn_scales, first, end),
        _rows(p.gates, first, end, width),
        _rows(p.ups, first, end, width),
        _rows(p.logits, first, end, n_experts),
        _integers(p.ends, part * n_experts, (part + 1) * n_experts),
        _integers(p.owners, first * k, end * k),
        _numbers(p.factors, first * k, end * k),
        _rows(p.expert_gates, first * k, end * k, hidden),
        _rows(p.expert_ups, first * k, end * k, hidden),
        _rows(p.ffn_normed, first, end, dim),
        _rows(p.hidden, first, end, width),
        _rows(p.rows, first * k, end * k, dim),
        _rows(p.expert_hidden, first * k, end * k, hidden),
        y,
    )
    add_residual(middle, layer.branch_scale, y)
    _count(p, first, end, part, n_experts, k)


@compiled
def _count(p: Any, first: int, end: int, part: int, n_experts: int, top_k: int) -> None:
    """How many active slots each expert has in this part of the rows."""
    ends, owners = (
        _integers(p.ends, part * n_experts, (part + 1) * n_experts),
        _integers(p.owners, first * top_k, end * top_k),
    )
    loads, start = _integers(p.loads, part * n_experts, (part + 1) * n_experts), 0
    for e in range(n_experts):
        loads[e] = ends[e] - start
        if p.active:
            active = _active(p, first, end)
            for r in range(start, ends[e]):
                if not active[owners[r]]:
                    loads[e] -= 1
        start = ends[e]


@shared(_LAYERS, _PASSES, "int64")
def _feed_back(layers: Any, passes: Any, part: int) -> None:
    layer, p = layers[0], passes[0]
    first, end = _share(p.batch * p.seq, p, part)
    gain, out = vector_at(layer.ffn_gain), matrix_at(layer.out)
    dim = gain.shape[0]
    middle, dy = _rows(p.middle, first, end, dim), _rows(p.dy, first, end, dim)
    gate, expert_gate, n_experts = (
        stack_at(layer.gate)[0],
        stack_at(layer.expert_gate),
        vector_at(layer.router_bias).shape[0],
    )
    k, width, hidden = layer.top_k, gate.shape[0], expert_gate.shape[1]
    grad, dnormed = _rows(p.scaled_dy, first, end, dim), _rows(p.dnormed, first, end, dim)
    scaled(dy, layer.branch_scale, grad)
    feed_back(
        middle,
        gain,
        gate,
        stack_at(layer.up)[0],
        matrix_at(layer.ffn_down),
        matrix_at(layer.router),
        layer.is_softmax != 0,
        layer.expert_scale,
        expert_gate,
        stack_at(layer.expert_up),
        stack_at(layer.expert_down),
        _numbers(p.ffn_scales, first, end),
        _rows(p.gates, first, end, width),
        _rows(p.ups, first, end, width),
        _rows(p.logits, first, end, n_experts),
        _integers(p.ends, part * n_experts, (part + 1) * n_experts),
        _integers(p.owners, first * k, end * k),
        _numbers(p.factors, first * k, end * k),
        _rows(p.expert_gates, first * k, end * k, hidden),
        _rows(p.expert_ups, first * k, end * k, hidden),
        grad,
        _rows(p.ffn_normed, first, end, dim),
        _rows(p.hidden, first, end, width),
        _rows(p.dgates, first, end, width),
        _rows(p.dups, first, end, width),
        _rows(p.dlogits, first, end, n_experts),
        _rows(p.rows, first * k, end * k, dim),
        _rows(p.drows, first * k, end * k, dim),
        _rows(p.expert_hidden, first * k, end * k, hidden),
        _rows(p.dhidden, first, end, width),
        _rows(p.dexpert_hidden, first * k, end * k, hidden),
        _rows(p.dexpert_gates, first * k, end * k, hidden),
        _rows(p.dexpert_ups, first * k, end * k, hidden),
        _rows(p.row_grads, first * k, end * k, dim),
        dnormed,
    )
    dmiddle, small = _rows(p.dmiddle, first, end, dim), _rows(p.scaled_dmiddle, first, end, dim)
    scales = _numbers(p.ffn_scales, first, end)
    normalise_back(middle, gain, scales, dnormed, dy, dmiddle, _gains(p, part, dim, dim))
    scaled(dmiddle, layer.branch_scale, small)
    by(small, out, _rows(p.dmixed, first, end, out.shape[1]), False)


@compiled
def _weight_back(p: Any, part: int, grads: int, inputs: int, out: Array) -> None:
    """This part of the rows of a matrix's gradient, given what goes in and the gradient of what comes out."""
    n, (width, dim) = p.batch * p.seq, out.shape
    first, end = _share(width, p, part)
    across(_rows(grads, 0, n, width), _rows(inputs, 0, n, dim), first, end, out, False)


@shared(_LAYERS, _LAYERS, _PASSES, "int64")
def _weights_back(layers: Any, gradients: Any, passes: Any, part: int) -> None:
    """The gradients of this part of every matrix's rows."""
    layer, grads, p = layers[0], gradients[0], passes[0]
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
    first, end = _share(width, p, part)
    for e in range(n_experts):
        for other in range(parts):
            ends, before = _integers(p.ends, other * n_experts, (other + 1) * n_experts), n * other // parts * top_k
            start, stop = before + (ends[e - 1] if e else 0), before + ends[e]
            rows, drows = _rows(p.rows, start, stop, dim), _rows(p.drows, start, stop, dim)
            across(_rows(p.dexpert_gates, start, stop, width), rows, first, end, gate[e], other > 0)
            across(_rows(p.dexpert_ups, start, stop, width), rows, first, end, up[e], other > 0)
            across(_rows(p.expert_hidden, start, stop, width), drows, first, end, down[e], other > 0)


@compiled
def _sum_up(p: Any) -> None:
    """Add up the gains' gradients of all parts and the sinks' of all sequences, to the first of each."""
    for part in range(1, p.parts):
        add_to(_gains(p, part, 0, p.n_gains), _gains(p, 0, 0, p.n_gains))
    for b in range(1, p.batch):
        add_to(_numbers(p.dsink, b * p.n_heads, (b + 1) * p.n_heads), _numbers(p.dsink, 0, p.n_heads))


@parallel
def forward(layers: Any, passes: Any) -> None:
    parts = passes[0].parts
    for part in prange(parts):
        _project(layers, passes, part)
    for part in prange(parts):
        _attend(layers, passes, part)
    for part in prange(parts):
        _feed(layers, passes, part)


@parallel
def backward(layers: Any, grads: Any, passes: Any) -> None:
    parts = passes[0].parts
    for part in prange(parts):
        _feed_back(layers, passes, part)
    for part in prange(parts):
        _attend_back(layers, passes, part)
    for part in prange(parts):
        _project_back(layers, passes, part)
    for part in prange(parts):
        _weights_back(layers, grads, passes, part)
    _sum_up(passes[0])
