"""Attention of one new token of each sequence over the positions before it, for both kinds of attention.

Main entries: `OneTokenGQA`, `OneTokenMLA`. A query sees every key in its window, so only sequences of other lengths
beside it call for a mask. Shapes: n sequences, K key heads, G query heads per key head, S keys.
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

    def __init__(self, attn: GQAttention, n: int) -> None:
        self._window = attn.window
        heads, kv_heads, width = attn.n_heads, attn.n_kv_heads, attn.head_dim
        self._project, self._heads = Product(attn.qkv.weight, n), Buffer(n, heads * width)
        by_head = self._project.array.reshape(n, -1, width)
        self._qk, self._row = by_head[:, : heads + kv_heads], self._project.array[:, heads * width :]
        by_key_head = (n, kv_heads, -1, width)
        self._queries = by_head[:, :heads].reshape(by_key_head).swapaxes(0, 1)
        self._mixed = self._heads.array.reshape(by_key_head).swapaxes(0, 1)
        self._gain = np.ones_like(self._qk[0]) if attn.qk_gain is None else as_array(attn.qk_gain).copy()
        self._gain[:heads] *= width**-0.5
        self._normed = attn.qk_gain is not None
        self._eps = np.float32(attn.config.norm_eps)
        self._sink = None if attn.sink is None else as_array(attn.sink).reshape(kv_heads, 1, -1, 1)

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """All heads side by side, (n, n_heads * head_dim), of the normalised stream x (n, dim)."""
        self._project(x)
        self._place_queries_and_keys(context.rotations)
        seen = context.append(address, self._row, self._window)
        scores = self._queries @ seen.entries["k"].swapaxes(-1, -2)
        if seen.bias is not None:
            scores += seen.bias
        np.matmul(softmax(scores, self._sink), seen.entries["v"], out=self._mixed)
        return self._heads.tensor

    def _place_queries_and_keys(self, rotations: Array | None) -> None:
        """Norm, gain and rotation, in place."""
        qk, gain = self._qk, self._gain
        if self._normed:
            mean_square = np.vecdot(qk, qk) / np.float32(qk.shape[-1])
            gain = gain / np.sqrt(mean_square + self._eps)[..., None]
        if rotations is None:
            np.multiply(qk, gain, out=qk)
        else:
            np.matmul(qk * gain, rotations, out=qk)


class OneTokenMLA:
    """What `attn` computes before its output projection, in the latent space: keys and values are never rebuilt."""

    def __init__(self, attn: MLAttention, n: int) -> None:
        self._window, self._rank = attn.window, attn.config.kv_lora_rank
        n_heads, nope, rank, rope = attn.n_heads, attn.nope_dim, self._rank, attn.rope_dim
        self._down, self._q_up = Product(attn.down.weight, n), Product(attn.q_up.weight, n)
        self._q_norm, self._kv_norm = Norm(attn.q_norm, n), Norm(attn.kv_norm, n)
        self._c_q, self._c_kv, k_rope = np.split(self._down.array, [attn.config.q_lora_rank, -rope], axis=1)
        self._q_nope, self._q_rope = np.split(self._q_up.array.reshape(n, n_heads, -1), [nope], axis=2)
        self._k_rope = k_rope[:, None]
        w_k, w_v = np.split(as_array(attn.kv_up.weight).reshape(n_heads, -1, rank), [nope], axis=1)
        self._w_k, self._w_v = w_k, w_v.transpose(0, 2, 1)
        self._row, self._queries = (
            np.empty((n, rank + rope), np.float32),
            np.empty((n, n_heads, rank + rope), np.float32),
        )
        self._heads = Buffer(n, n_heads * attn.v_dim)
        self._mixed = self._heads.array.reshape(n, n_heads, -1).swapaxes(0, 1)
        self._scale = np.float32((nope + rope) ** -0.5)
        self._sink = None if attn.sink is None else as_array(attn.sink)[:, None]

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """All heads side by side, (n, n_heads * v_head_dim), of the normalised stream x (n, dim)."""
        self._down(x)
        self._q_up(self._q_norm(self._c_q))
        self._place_queries_and_key(context.rotations)
        seen = context.append(address, self._row, self._window)
        latent = seen.entries["latent"]
        scores = self._queries @ latent.swapaxes(-1, -2)
        scores *= self._scale
        if seen.bias is not None:
            scores += seen.bias
        mixed = softmax(scores, self._sink) @ latent[..., : self._rank]
        np.matmul(mixed.swapaxes(0, 1), self._w_v, out=self._mixed)
        return self._heads.tensor

    def _place_queries_and_key(self, rotations: Array | None) -> None:
        """The queries moved to the latent space, and these positions' rows for the cache; rotary parts behind."""
        rank = self._rank
        by_head = self._queries.swapaxes(0, 1)
        np.matmul(self._q_nope.swapaxes(0, 1), self._w_k, out=by_head[..., :rank])
        self._kv_norm(self._c_kv)
        self._row[:, :rank] = self._kv_norm.array
        self._queries[..., rank:] = self._q_rope if rotations is None else self._q_rope @ rotations
        self._row[:, rank:] = (self._k_rope if rotations is None else self._k_rope @ rotations)[:, 0]
