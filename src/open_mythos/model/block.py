"""One pre-norm transformer layer: attention, then a feed-forward, each added to the stream.

Main entry: `Block`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.attention import GQAttention
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.experts import MoEFFN
from open_mythos.model.feed_forward import SwiGLU
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.norm import RMSNorm


class Block(nn.Module):
    """`x + c*attn(norm(x))`, then `x + c*ffn(norm(x))`; the feed-forward is a mixture of experts where `moe` says so.

    The constant c is the config's `update_scale`. The norms' gains start at c and the matrices c times smaller, which
    leaves the function of a new model as it is and makes an Adam step move the effective matrices c times further.
    """

    def __init__(self, config: MythosConfig, *, window: int | None, moe: bool) -> None:
        super().__init__()
        self.branch_scale = config.matrix_update_scale
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = (MLAttention if config.attn_type == "mla" else GQAttention)(config, window)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = MoEFFN(config) if moe else SwiGLU(config.dim, config.ffn_hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, context: ForwardContext, address: CacheAddress, active: Tensor | None = None
    ) -> Tensor:
        """(batch, seq, dim) to the same shape; `active` (batch, seq) marks positions that have not halted."""
        if active is None and self in context.stand_ins:
            return context.stand_ins[self](x, context, address)
        whole = context.whole_layer(self, x)
        if whole is not None:
            return whole(x, context, address, active)
        attended = self.dropout(self.attn(self.attn_norm(x), context, address, active))
        x = torch.add(x, attended, alpha=self.branch_scale)
        fed = self._feed(self.ffn_norm(x), context, address, active)
        return torch.add(x, self.dropout(fed), alpha=self.branch_scale)

    def _feed(self, x: Tensor, context: ForwardContext, address: CacheAddress, active: Tensor | None) -> Tensor:
        if context.expert_load is None or not isinstance(self.ffn, MoEFFN):
            return self.ffn(x)
        routing = self.ffn.route(x)
        context.expert_load[address] = self.ffn.load(routing, active)
        return self.ffn(x, routing)
