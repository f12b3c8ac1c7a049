"""A block for a few positions, of one sequence or of several.

Main entry: `FewRowsBlock`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_mythos.model.attention import GQAttention
from open_mythos.model.block import Block
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.experts import MoEFFN
from open_mythos.model.feed_forward import SwiGLU
from open_mythos.model.few_rows.attention import add_gqa, add_mla
from open_mythos.model.few_rows.compiled import Threads
from open_mythos.model.few_rows.feed_forward import add_dense, add_experts
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.norm import RMSNorm
from open_mythos.model.rows import Array, as_array

Kernel = Callable[..., None]
Weights = tuple[Any, ...]
"""Arguments that follow from a module alone. One by one: Numba takes microseconds for every tuple that it is given."""


class FewRowsBlock:
    """What `block` computes for positions that have not halted.

    It copies no weights. Float32 on a CPU only: everything else is better served by `Block`.
    """

    def __init__(self, block: Block, threads: Threads) -> None:
        attn, ffn, scale = block.attn, block.ffn, np.float32(block.branch_scale)
        assert isinstance(attn, (GQAttention, MLAttention))
        assert isinstance(ffn, (MoEFFN, SwiGLU))
        self._window, self._threads = attn.window, threads
        weights = _mla(attn) if isinstance(attn, MLAttention) else _gqa(attn)
        self._add_attention: Kernel = add_mla if isinstance(attn, MLAttention) else add_gqa
        self._attention = (*_norm(block.attn_norm), *weights, _sink(attn), as_array(attn.out.weight), scale)
        self._add_feed_forward: Kernel = add_experts if isinstance(ffn, MoEFFN) else add_dense
        self._feed_forward = (*_norm(block.ffn_norm), *_dense(ffn), *_experts(ffn), scale)

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """(batch, seq, dim) to the same shape."""
        out = x.clone(memory_format=torch.contiguous_format)
        self.add_to(out.view(-1, x.shape[-1]).numpy(), context, address)
        return out

    def add_to(self, stream: Array, context: ForwardContext, address: CacheAddress) -> None:
        """Add to the stream (positions, dim) what the block adds to it, in place."""
        entries, rows, counts = context.seen(address, self._window)
        n = self._threads.n
        with self._threads.lock:
            self._add_attention(stream, context.rotations, *entries, rows, counts, *self._attention, n)
            self._add_feed_forward(stream, *self._feed_forward, n)


def _norm(norm: RMSNorm) -> Weights:
    return as_array(norm.weight), np.float32(norm.eps)


def _gqa(attn: GQAttention) -> Weights:
    ones = np.ones((attn.n_heads + attn.n_kv_heads, attn.head_dim), np.float32)
    gain = ones if attn.qk_gain is None else as_array(attn.qk_gain)
    return as_array(attn.qkv.weight), attn.qk_gain is not None, gain, np.float32(attn.head_dim**-0.5)


def _mla(attn: MLAttention) -> Weights:
    matrices = (attn.down, attn.q_norm, attn.q_up, attn.kv_norm)
    kv_up, width = as_array(attn.kv_up.weight), attn.nope_dim + attn.rope_dim
    by_head = kv_up.reshape(attn.n_heads, -1, kv_up.shape[1])
    return *(as_array(matrix.weight) for matrix in matrices), by_head, np.float32(width**-0.5)


def _sink(attn: GQAttention | MLAttention) -> Array:
    return np.empty(0, np.float32) if attn.sink is None else as_array(attn.sink)


def _dense(ffn: MoEFFN | SwiGLU) -> Weights:
    dense = ffn.shared if isinstance(ffn, MoEFFN) else ffn
    if dense is None:
        assert isinstance(ffn, MoEFFN)
        dim = ffn.down.shape[2]
        return tuple(np.empty(shape, np.float32) for shape in ((1, 0, dim), (1, 0, dim), (dim, 0)))
    gate, up, down = (as_array(matrix.weight) for matrix in (dense.gate, dense.up, dense.down))
    return gate[None], up[None], down


def _experts(ffn: MoEFFN | SwiGLU) -> Weights:
    if not isinstance(ffn, MoEFFN):
        return ()
    chosen = as_array(ffn.router.weight), as_array(ffn.router_bias), ffn.topk, ffn.score == "softmax"
    return *chosen, np.float32(ffn.scale), as_array(ffn.gate), as_array(ffn.up), as_array(ffn.down)
