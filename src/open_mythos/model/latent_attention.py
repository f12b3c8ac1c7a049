"""Multi-head latent attention: one small latent and one rotary key per token serve every head.

Main entry: `MLAttention`, as in DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437), rotary layout half-rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.attend import attend
from open_mythos.model.cache import STANDALONE, CacheAddress, Entries
from open_mythos.model.context import ForwardContext
from open_mythos.model.mask import AttentionMask
from open_mythos.model.norm import RMSNorm
from open_mythos.model.rope import apply_rotary


class MLAttention(nn.Module):
    """Caches `kv_lora_rank + qk_rope_head_dim` numbers per token.

    Keys and values can be rebuilt from the latent for every head, or the up-projections can be absorbed into queries
    and outputs so that attention runs in the latent space. Both give the same numbers; the cheaper one is taken.
    """

    def __init__(self, config: MythosConfig, window: int | None = None) -> None:
        super().__init__()
        self.config, self.window = config, window
        self.n_heads = config.n_heads
        self.nope_dim, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.down = nn.Linear(config.dim, config.q_lora_rank + config.kv_lora_rank + self.rope_dim, bias=False)
        self.q_norm = RMSNorm(config.q_lora_rank, config.norm_eps)
        self.q_up = nn.Linear(config.q_lora_rank, self.n_heads * (self.nope_dim + self.rope_dim), bias=False)
        self.kv_norm = RMSNorm(config.kv_lora_rank, config.norm_eps)
        self.kv_up = nn.Linear(config.kv_lora_rank, self.n_heads * (self.nope_dim + self.v_dim), bias=False)
        self.out = nn.Linear(self.n_heads * self.v_dim, config.dim, bias=False)
        self.sink = nn.Parameter(torch.zeros(self.n_heads)) if config.attention_sink else None

    def forward(
        self,
        x: Tensor,
        context: ForwardContext | None = None,
        address: CacheAddress = STANDALONE,
        active: Tensor | None = None,
    ) -> Tensor:
        """Attend from x (batch, seq, dim) to itself and to what the context's store holds; returns x's shape.

        Where `active` (batch, seq) is False the position has halted: the latent of its last active loop serves.
        """
        context = context or ForwardContext(self.config, x.shape[1], x.device, x.dtype)
        rank = self.config.kv_lora_rank
        c_q, c_kv, k_rope = self.down(x).split([self.config.q_lora_rank, rank, self.rope_dim], -1)
        q = self.q_up(self.q_norm(c_q)).unflatten(-1, (self.n_heads, -1))
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], -1)
        if context.rotary is not None:
            rotated = apply_rotary(torch.cat([q_rope, k_rope.unsqueeze(-2)], -2), context.rotary)
            q_rope, k_rope = rotated[..., :-1, :], rotated[..., -1, :]
        latent = torch.cat([self.kv_norm(c_kv), k_rope], -1)
        heads = context.attend(address, (q_nope, q_rope), {"latent": latent}, active, self.window, self._over)
        return self.out(heads.flatten(-2))

    def _over(self, queries: tuple[Tensor, ...], seen: Entries, mask: AttentionMask) -> Tensor:
        q_nope, q_rope = queries
        attend_here = self._attend_absorbed if self._absorbing_is_cheaper(mask) else self._attend_rebuilt
        return attend_here(q_nope, q_rope, seen["latent"], mask)

    def _absorbing_is_cheaper(self, mask: AttentionMask) -> bool:
        """Compare multiplications per head: latent-space attention is wider, rebuilding keys and values is per key."""
        rank, queries, keys = self.config.kv_lora_rank, mask.n_queries, mask.n_keys - mask.first_key
        per_head = self.nope_dim + self.v_dim
        absorbed = queries * keys * (2 * rank + self.rope_dim) + queries * rank * per_head
        rebuilt = queries * keys * (per_head + self.rope_dim) + keys * rank * per_head
        return absorbed < rebuilt

    def _attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: AttentionMask) -> Tensor:
        """One key head, the latent: `q (W_k c) = (q W_k) c` and `sum(p W_v c) = W_v sum(p c)`."""
        w_k, w_v = self.kv_up.weight.unflatten(0, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], 1)
        q = torch.cat([_per_head(q_nope, w_k), q_rope], -1)
        k = latent.unsqueeze(-2)
        mixed = self._attend(q, k, k[..., : self.config.kv_lora_rank], mask)
        return _per_head(mixed, w_v.transpose(1, 2))

    def _attend_rebuilt(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: AttentionMask) -> Tensor:
        """Keys and values of every head, from the latents."""
        c_kv, k_rope = latent.split([self.config.kv_lora_rank, self.rope_dim], -1)
        kv = self.kv_up(c_kv).unflatten(-1, (self.n_heads, -1))
        k_nope, v = kv.split([self.nope_dim, self.v_dim], -1)
        k_rope = k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)
        return self._attend(torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope], -1), v, mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        return attend(q, k, v, mask, scale=scale, sink=self.sink)


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (batch, seq, heads, in) times each head's own weight (heads, in, out)."""
    product = torch.bmm(x.flatten(0, 1).transpose(0, 1), weight)
    return product.transpose(0, 1).unflatten(0, x.shape[:2])
