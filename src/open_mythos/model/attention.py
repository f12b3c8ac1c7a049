"""Grouped-query attention with rotary positions, QK-norm and a learned sink.

Main entry: `GQAttention`, Llama's attention (Ainslie et al. 2023, arXiv 2305.13245) with Qwen3's per-head norms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.attend import attend
from open_mythos.model.cache import STANDALONE, CacheAddress, Entries
from open_mythos.model.context import ForwardContext
from open_mythos.model.mask import AttentionMask
from open_mythos.model.norm import rms_norm
from open_mythos.model.rope import apply_rotary


class GQAttention(nn.Module):
    """`n_heads` query heads that share `n_kv_heads` key and value heads."""

    def __init__(self, config: MythosConfig, window: int | None = None) -> None:
        super().__init__()
        self.config, self.window = config, window
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        normed_heads = self.n_heads + self.n_kv_heads
        self.qk_gain = nn.Parameter(torch.ones(normed_heads, self.head_dim)) if config.qk_norm else None
        self.sink = nn.Parameter(torch.zeros(self.n_heads)) if config.attention_sink else None

    def forward(
        self,
        x: Tensor,
        context: ForwardContext | None = None,
        address: CacheAddress = STANDALONE,
        active: Tensor | None = None,
    ) -> Tensor:
        """Attend from x (batch, seq, dim) to itself and to what the context's store holds; returns x's shape.

        Where `active` (batch, seq) is False the position has halted: the keys and values of its last active loop serve.
        """
        context = context or ForwardContext(self.config, x.shape[1], x.device, x.dtype)
        qk, v = self._project(x, context)
        q, k = qk.split([self.n_heads, self.n_kv_heads], -2)
        heads = context.attend(address, (q,), {"k": k, "v": v}, active, self.window, self._over)
        return self.out(heads.flatten(-2))

    def _over(self, queries: tuple[Tensor, ...], seen: Entries, mask: AttentionMask) -> Tensor:
        (q,) = queries
        return attend(q, seen["k"], seen["v"], mask, scale=self.head_dim**-0.5, sink=self.sink)

    def _project(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Queries and keys side by side, (batch, seq, n_heads + n_kv_heads, head_dim), and values."""
        projected = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = projected.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], -2)
        if self.qk_gain is not None:
            qk = rms_norm(qk, None, self.config.norm_eps) * self.qk_gain
        if context.rotary is not None:
            qk = apply_rotary(qk, context.rotary)
        return qk, v
