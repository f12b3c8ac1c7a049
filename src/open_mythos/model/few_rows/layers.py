"""Layers as compiled code knows them: where their weights lie, and what else they are.

Main entries: `Layer`, `table`, `add_layers`. All layers of a stage are computed in one call, which is given addresses:
what Numba does for every array that it is given takes longer than reading an address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from numba import typeof  # type: ignore[attr-defined]
from torch import Tensor

from open_mythos.model.arithmetic.addresses import matrix_at, stack_at, vector_at
from open_mythos.model.arithmetic.compiled import INDEX, MATRIX, STACK_OF_INDICES, compiled, shared
from open_mythos.model.arithmetic.vectors import copied
from open_mythos.model.attention import GQAttention
from open_mythos.model.block import Block
from open_mythos.model.experts import MoEFFN
from open_mythos.model.feed_forward import SwiGLU
from open_mythos.model.few_rows.attention import add_gqa, add_mla, store_gqa, store_mla
from open_mythos.model.few_rows.feed_forward import add_experts, gather
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.rows import Array, Rows, described

_WEIGHTS = (
    *("attn_gain", "qkv", "qk_gain", "down", "q_gain", "q_up", "kv_gain", "kv_up", "sink", "out"),
    *("ffn_gain", "gate", "up", "ffn_down", "router", "router_bias", "expert_gate", "expert_up", "expert_down"),
)
_NUMBERS = ("attn_eps", "attn_scale", "ffn_eps", "expert_scale", "branch_scale")
_CHOICES = ("is_latent", "has_normed_heads", "is_softmax", "top_k")

LAYER = np.dtype(
    [
        *((name, np.int64, (4,)) for name in _WEIGHTS),  # `described`; zeros where there are none
        *((name, np.float32) for name in _NUMBERS),
        *((name, np.int64) for name in _CHOICES),
    ],
    align=True,
)

LAYERS = typeof(np.zeros(1, LAYER))
"""A `table`, to Numba."""

Known: TypeAlias = dict[str, Any]
"""Of a layer, by the names above."""


class Layer:
    """A block, whose weights are not copied; they may change in place."""

    def __init__(self, block: Block) -> None:
        self.window = block.attn.window
        # Without the parameters, which may be given other memory: what lies behind the addresses is kept by this.
        self._known = {name: x.detach() if isinstance(x, Tensor) else x for name, x in known_of(block).items()}
        self.row = tuple(_entry(self._known.get(name, 0)) for name in LAYER.names or ())
        """The block in a `table`."""


def table(layers: Sequence[Layer]) -> npt.NDArray[Any]:
    """What `add_layers` is given of them, for as long as they are kept."""
    return np.array([layer.row for layer in layers], LAYER)


def _entry(value: Tensor | float) -> tuple[int, ...] | float:
    return described(value) if isinstance(value, Tensor) else value


def known_of(block: Block) -> Known:
    attn, ffn = block.attn, block.ffn
    assert isinstance(attn, (GQAttention, MLAttention))
    assert isinstance(ffn, (MoEFFN, SwiGLU))
    norms = {"attn_gain": block.attn_norm.weight, "attn_eps": block.attn_norm.eps}
    norms |= {"ffn_gain": block.ffn_norm.weight, "ffn_eps": block.ffn_norm.eps}
    attention = _mla(attn) if isinstance(attn, MLAttention) else _gqa(attn)
    sink = {} if attn.sink is None else {"sink": attn.sink}
    feed_forward = _experts(ffn) if isinstance(ffn, MoEFFN) else _dense(ffn)
    return {**norms, **attention, **sink, "out": attn.out.weight, **feed_forward, "branch_scale": block.branch_scale}


def _gqa(attn: GQAttention) -> Known:
    ones = torch.ones(attn.n_heads + attn.n_kv_heads, attn.head_dim, dtype=torch.float32, device="cpu")
    gain = ones if attn.qk_gain is None else attn.qk_gain
    known = {"qkv": attn.qkv.weight, "qk_gain": gain, "has_normed_heads": attn.qk_gain is not None}
    return {**known, "attn_scale": attn.head_dim**-0.5}


def _mla(attn: MLAttention) -> Known:
    matrices = {name: getattr(attn, name).weight for name in ("down", "q_up")}
    gains = {"q_gain": attn.q_norm.weight, "kv_gain": attn.kv_norm.weight}
    by_head = attn.kv_up.weight.detach().unflatten(0, (attn.n_heads, -1))
    scale = (attn.nope_dim + attn.rope_dim) ** -0.5
    return {"is_latent": True, **matrices, **gains, "kv_up": by_head, "attn_scale": scale}


def _dense(ffn: SwiGLU) -> Known:
    return {"gate": ffn.gate.weight, "up": ffn.up.weight, "ffn_down": ffn.down.weight}


def _experts(ffn: MoEFFN) -> Known:
    shared = {} if ffn.shared is None else _dense(ffn.shared)
    routed = {"expert_gate": ffn.gate, "expert_up": ffn.up, "expert_down": ffn.down}
    router = {"router": ffn.router.weight, "router_bias": ffn.router_bias, "top_k": ffn.topk}
    return {
        **shared,
        **routed,
        **router,
        "is_softmax": ffn.score == "softmax",
        "expert_scale": ffn.scale,
    }


@shared(MATRIX, MATRIX, LAYERS, STACK_OF_INDICES, INDEX, INDEX, INDEX, "int64")
def add_layers(
    stream: Array, rotations: Array, layers: Any, entries: Rows, rows: Rows, counts: Rows, wanted: Rows, threads: int
) -> None:
    """Add to the stream (n, dim), layer by layer, what each of the layers makes of it; what is new is stored.

    `layers` is a `table`; `entries`, `rows` and `counts` are those of `Seen`. The last layer adds to the `wanted` rows
    only, which are in ascending order; none stands for all.
    """
    n_layers = layers.shape[0]
    few = 0 < wanted.shape[0] < stream.shape[0]
    for k in range(n_layers - 1 if few else n_layers):
        _add_attention(stream, rotations, layers[k], entries[k], rows, counts, threads)
        _add_feed_forward(stream, layers[k], threads)
    if few:
        _add_to_few(stream, rotations, layers[n_layers - 1], entries[n_layers - 1], rows, counts, wanted, threads)


@compiled
def _add_to_few(
    stream: Array, rotations: Array, layer: Any, entries: Rows, rows: Rows, counts: Rows, wanted: Rows, threads: int
) -> None:
    """Store all rows' keys and values, then compute the wanted ones alone; these are stored twice, which is cheap."""
    _store(stream, rotations, layer, entries, rows, counts, threads)
    own, own_rotations = np.empty((len(wanted), stream.shape[1]), np.float32), rotations
    gather(stream, wanted, own)
    if rotations.shape[0] > 1:
        own_rotations = np.empty((len(wanted), rotations.shape[1]), np.float32)
        gather(rotations, wanted % rotations.shape[0], own_rotations)
    _add_attention(own, own_rotations, layer, entries, rows[wanted], counts[wanted], threads)
    _add_feed_forward(own, layer, threads)
    for r in range(len(wanted)):
        copied(own[r], stream[wanted[r]])


@compiled
def _store(stream: Array, rotations: Array, layer: Any, entries: Rows, rows: Rows, counts: Rows, threads: int) -> None:
    gain, eps = vector_at(layer.attn_gain), layer.attn_eps
    if layer.is_latent:
        latent, down, kv_gain = stack_at(entries[0]), matrix_at(layer.down), vector_at(layer.kv_gain)
        store_mla(stream, rotations, latent, rows, counts, gain, eps, down, kv_gain, threads)
    else:
        keys, values, normed = stack_at(entries[0]), stack_at(entries[1]), layer.has_normed_heads != 0
        qkv, qk_gain = matrix_at(layer.qkv), matrix_at(layer.qk_gain)
        store_gqa(stream, rotations, keys, values, rows, counts, gain, eps, qkv, normed, qk_gain, threads)


@compiled
def _add_attention(
    stream: Array, rotations: Array, layer: Any, entries: Rows, rows: Rows, counts: Rows, threads: int
) -> None:
    gain, sink, out = vector_at(layer.attn_gain), vector_at(layer.sink), matrix_at(layer.out)
    if layer.is_latent:
        add_mla(
            stream,
            rotations,
            stack_at(entries[0]),
            rows,
            counts,
            gain,
            layer.attn_eps,
            matrix_at(layer.down),
            vector_at(layer.q_gain),
            matrix_at(layer.q_up),
            vector_at(layer.kv_gain),
            stack_at(layer.kv_up),
            layer.attn_scale,
            sink,
            out,
            layer.branch_scale,
            threads,
        )
    else:
        add_gqa(
            stream,
            rotations,
            stack_at(entries[0]),
            stack_at(entries[1]),
            rows,
            counts,
            gain,
            layer.attn_eps,
            matrix_at(layer.qkv),
            layer.has_normed_heads != 0,
            matrix_at(layer.qk_gain),
            layer.attn_scale,
            sink,
            out,
            layer.branch_scale,
            threads,
        )


@compiled
def _add_feed_forward(stream: Array, layer: Any, threads: int) -> None:
    add_experts(
        stream,
        vector_at(layer.ffn_gain),
        layer.ffn_eps,
        stack_at(layer.gate),
        stack_at(layer.up),
        matrix_at(layer.ffn_down),
        matrix_at(layer.router),
        vector_at(layer.router_bias),
        layer.top_k,
        layer.is_softmax != 0,
        layer.expert_scale,
        stack_at(layer.expert_gate),
        stack_at(layer.expert_up),
        stack_at(layer.expert_down),
        layer.branch_scale,
        threads,
    )
