"""Attention of a few positions, each over what it sees of a cache, for both kinds of attention.

Main entries: `FewRowsGQA`, `FewRowsMLA`.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from open_mythos.model import kernels
from open_mythos.model.attention import GQAttention
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.rows import Array, Product, Scratch, as_array


class FewRowsGQA:
    """What `attn` computes before its output projection."""

    def __init__(self, attn: GQAttention, scratch: Scratch) -> None:
        self._window, self._sink = attn.window, _sink(attn.sink)
        self._n_heads, self._width = attn.n_heads, attn.head_dim
        self._project = Product(attn.qkv.weight, scratch, "projected")
        self._heads = scratch("heads", attn.n_heads * attn.head_dim)
        self._first_key = attn.n_heads * attn.head_dim
        self._first_value = self._first_key + attn.n_kv_heads * attn.head_dim
        self._normed, self._eps = attn.qk_gain is not None, np.float32(attn.config.norm_eps)
        ones = np.ones((attn.n_heads + attn.n_kv_heads, attn.head_dim), np.float32)
        self._gain = ones if attn.qk_gain is None else as_array(attn.qk_gain)
        self._scale = np.float32(attn.head_dim**-0.5)

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """All heads side by side, (n, n_heads * head_dim), of the normalised stream x (n, dim); vectors if n is 1."""
        projected = self._project(x).array
        n = len(projected)
        by_head, out = projected.reshape(n, -1, self._width), self._heads(n)
        kernels.place_heads(by_head, self._normed, self._gain, self._eps, context.rotations)
        (keys, values), rows, counts = context.seen(address, self._window)
        kernels.store(projected, self._first_key, rows, counts, keys)
        kernels.store(projected, self._first_value, rows, counts, values)
        mixed = out.array.reshape(n, self._n_heads, self._width)
        kernels.attend(by_head, keys, values, rows, counts, self._scale, self._sink, mixed)
        return out.tensor


class FewRowsMLA:
    """What `attn` computes before its output projection, in the latent space: keys and values are never rebuilt."""

    def __init__(self, attn: MLAttention, scratch: Scratch) -> None:
        self._window, self._sink, config = attn.window, _sink(attn.sink), attn.config
        self._n_heads, self._nope, self._rank = attn.n_heads, attn.nope_dim, config.kv_lora_rank
        self._down = Product(attn.down.weight, scratch, "down")
        self._q_up = Product(attn.q_up.weight, scratch, "q_up")
        self._kv_up = as_array(attn.kv_up.weight).reshape(attn.n_heads, -1, self._rank)  # of a head, first for keys
        self._q_gain, self._kv_gain = as_array(attn.q_norm.weight), as_array(attn.kv_norm.weight)
        self._c_q, self._row = scratch("c_q", config.q_lora_rank), scratch("row", self._rank + attn.rope_dim)
        self._queries = scratch("queries", attn.n_heads * (self._rank + attn.rope_dim))
        self._mixed = scratch("mixed", attn.n_heads * self._rank)
        self._heads = scratch("heads", attn.n_heads * attn.v_dim)
        self._eps, self._scale = np.float32(config.norm_eps), np.float32((attn.nope_dim + attn.rope_dim) ** -0.5)

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """All heads side by side, (n, n_heads * v_head_dim), of the normalised stream x (n, dim); vectors if n is 1."""
        down = self._down(x).array
        n, heads = len(down), self._n_heads
        c_q, row, out = self._c_q(n), self._row(n).array, self._heads(n)
        kernels.rms_norm(down, self._q_gain, self._eps, c_q.array)
        q = self._q_up(c_q.tensor).array.reshape(n, heads, -1)
        queries = self._queries(n).array.reshape(n, heads, -1)
        kernels.by_head(q, self._nope, self._kv_up, queries)
        kernels.place_latent(down, self._kv_gain, self._eps, q, context.rotations, row, queries)
        (latent,), rows, counts = context.seen(address, self._window)
        kernels.store(row, 0, rows, counts, latent)
        mixed = self._mixed(n).array.reshape(n, heads, self._rank)
        kernels.attend(queries, latent, latent, rows, counts, self._scale, self._sink, mixed)
        kernels.by_transposed_head(mixed, self._kv_up, out.array.reshape(n, heads, -1))
        return out.tensor


def _sink(sink: nn.Parameter | None) -> Array:
    """Of every head; of none where there is no sink."""
    return np.empty(0, np.float32) if sink is None else as_array(sink)
