"""Attention of one new token over the positions before it, for both kinds of attention.

Main entries: `OneTokenGQA`, `OneTokenMLA`. A single query sees every key in its window, so there is no mask.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from open_mythos.model.attention import GQAttention
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.vectors import Array, Buffer, Norm, Product, as_array, softmax


class OneTokenGQA:
    """What `attn` computes before its output projection; its buffers are written anew for every token.

    The scale of the scores is part of the queries' gain.
    """

    def __init__(self, attn: GQAttention) -> None:
        self._window = attn.window
        self._n_kv, width = attn.n_kv_heads, attn.head_dim
        self._project, self._heads = Product(attn.qkv.weight), Buffer(attn.n_heads * width)
        by_head = self._project.array.reshape(-1, width)
        self._qk, self._row = by_head[: attn.n_heads + self._n_kv], self._project.array[attn.n_heads * width :]
        self._queries = by_head[: attn.n_heads].reshape(self._n_kv, -1, width)
        self._mixed = self._heads.array.reshape(self._queries.shape)
        self._gain = np.ones_like(self._qk) if attn.qk_gain is None else as_array(attn.qk_gain).copy()
        self._gain[: attn.n_heads] *= width**-0.5
        self._normed = attn.qk_gain is not None
        self._eps = np.float32(attn.config.norm_eps)
        self._sink = None if attn.sink is None else as_array(attn.sink).reshape(self._n_kv, -1, 1)

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """All heads side by side, (n_heads * head_dim,), of the normalised stream x (dim,)."""
        self._project(x)
        self._place_queries_and_keys(context.rotation)
        seen = context.append(address, self._row, self._window)
        weights = softmax(self._queries @ seen["k"].transpose(0, 2, 1), self._sink)
        np.matmul(weights, seen["v"], out=self._mixed)
        return self._heads.tensor

    def _place_queries_and_keys(self, rotation: Array | None) -> None:
        """Norm, gain and rotation, in place."""
        qk, gain = self._qk, self._gain
        if self._normed:
            mean_square = np.vecdot(qk, qk) / np.float32(qk.shape[1])
            gain = gain / np.sqrt(mean_square + self._eps)[:, None]
        if rotation is None:
            np.multiply(qk, gain, out=qk)
        else:
            np.dot(qk * gain, rotation, out=qk)


class OneTokenMLA:
    """What `attn` computes before its output projection, in the latent space: keys and values are never rebuilt."""

    def __init__(self, attn: MLAttention) -> None:
        self._window, self._rank = attn.window, attn.config.kv_lora_rank
        n_heads, nope, rank, rope = attn.n_heads, attn.nope_dim, self._rank, attn.rope_dim
        self._down, self._q_up = Product(attn.down.weight), Product(attn.q_up.weight)
        self._q_norm, self._kv_norm = Norm(attn.q_norm), Norm(attn.kv_norm)
        self._c_q, self._c_kv, k_rope = np.split(self._down.array, [attn.config.q_lora_rank, -rope])
        self._q_nope, self._q_rope = np.split(self._q_up.array.reshape(n_heads, 1, -1), [nope], axis=2)
        self._k_rope = k_rope[None]
        w_k, w_v = np.split(as_array(attn.kv_up.weight).reshape(n_heads, -1, rank), [nope], axis=1)
        self._w_k, self._w_v = w_k, w_v.transpose(0, 2, 1)
        self._row, self._queries = np.empty(rank + rope, np.float32), np.empty((n_heads, 1, rank + rope), np.float32)
        self._heads = Buffer(n_heads * attn.v_dim)
        self._mixed = self._heads.array.reshape(n_heads, 1, -1)
        self._scale = np.float32((nope + rope) ** -0.5)
        self._sink = None if attn.sink is None else as_array(attn.sink)[:, None]

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """All heads side by side, (n_heads * v_head_dim,), of the normalised stream x (dim,)."""
        self._down(x)
        self._q_up(self._q_norm(self._c_q))
        self._place_queries_and_key(context.rotation)
        seen = context.append(address, self._row, self._window)["latent"]
        weights = softmax(np.dot(self._queries[:, 0], seen.T) * self._scale, self._sink)
        np.matmul(np.dot(weights, seen[:, : self._rank])[:, None], self._w_v, out=self._mixed)
        return self._heads.tensor

    def _place_queries_and_key(self, rotation: Array | None) -> None:
        """The queries moved to the latent space, and this position's row for the cache; rotary parts behind."""
        rank = self._rank
        np.matmul(self._q_nope, self._w_k, out=self._queries[:, :, :rank])
        self._kv_norm(self._c_kv)
        self._row[:rank] = self._kv_norm.array
        self._queries[:, :, rank:] = self._q_rope if rotation is None else self._q_rope @ rotation
        self._row[rank:] = self._k_rope if rotation is None else self._k_rope @ rotation
