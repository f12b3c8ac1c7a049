"""Mixture of experts: routed experts computed in groups, shared experts always on.

Main entry: `MoEFFN`, as in DeepSeekMoE (arXiv 2401.06066), balanced without an auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.derivatives import elementary_only
from open_mythos.model.feed_forward import SwiGLU
from open_mythos.model.router import Routing, balance_step, count_load, route


class Dispatch(NamedTuple):
    """How tokens were sorted by expert: the token of each row, its slot in (tokens, k), and where each group ends."""

    token: Tensor
    slot: Tensor
    group_ends: Tensor


class MoEFFN(nn.Module):
    """`router(x) + router_bias` ranks the experts; the `topk` best compute a token, beside the shared expert.

    The bias is a running statistic like BatchNorm's: the model updates it after every forward in training mode.
    """

    router_bias: Tensor

    def __init__(self, config: MythosConfig) -> None:
        super().__init__()
        self.n_experts, self.topk = config.n_experts, config.n_experts_per_tok
        self.score, self.scale, self.balance_rate = config.router_score, config.routed_scale, config.balance_rate
        self.router = nn.Linear(config.dim, self.n_experts, bias=False)
        self.register_buffer("router_bias", torch.zeros(self.n_experts, dtype=torch.float32))
        self.gate = nn.Parameter(torch.empty(self.n_experts, config.expert_dim, config.dim))
        self.up = nn.Parameter(torch.empty(self.n_experts, config.expert_dim, config.dim))
        self.down = nn.Parameter(torch.empty(self.n_experts, config.expert_dim, config.dim))
        self.shared = SwiGLU(config.dim, config.shared_dim) if config.shared_dim else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts leave the router bias in float32: a balancing step is smaller than bfloat16 can add to it."""
        bias = self.router_bias
        super()._apply(fn, recurse)
        if self.router_bias.dtype != bias.dtype:
            self.router_bias = bias.to(self.router_bias.device)
        return self

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """(..., dim) to (..., dim); `routing` is what `route` found for x, if the caller has asked already."""
        flat = x.reshape(-1, x.shape[-1])
        routing = routing or self.route(flat)
        if torch.compiler.is_compiling() and routing.experts.numel() < self.n_experts:
            out = self._each_its_own(flat, routing)
        else:
            out = self._all_experts(flat, routing) if self._all_is_better(flat) else self._grouped(flat, routing)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x)

    def route(self, x: Tensor) -> Routing:
        """Experts and weights of every token of x (..., dim), flattened to (tokens, experts per token)."""
        return route(self.router(x.reshape(-1, x.shape[-1])), self.router_bias, self.topk, self.score, self.scale)

    @torch.no_grad()
    def load(self, routing: Routing, active: Tensor | None = None) -> Tensor:
        """Slots that each expert gets from the `active` (...) tokens, by default all; (n_experts,)."""
        experts = routing.experts
        return count_load(experts, self.n_experts, None if active is None else active.reshape(-1, 1).expand_as(experts))

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Move the router bias one step against the imbalance of `load` (n_experts,)."""
        balance_step(self.router_bias, load, self.balance_rate)

    def _all_is_better(self, x: Tensor) -> bool:
        """With few experts one wide product beats sorting; it is also the form that any derivative goes through."""
        sizes, dtype = (x.shape[-1], self.down.shape[1]), _product_dtype(x)
        # grouped_mm's rules
        grouped = all(size * dtype.itemsize % 16 == 0 for size in sizes) and dtype != torch.float64
        if torch.compiler.is_compiling():
            grouped = grouped and dtype == torch.bfloat16  # its rule for being traced
        return self.n_experts <= 2 * self.topk or not grouped or elementary_only()

    def _each_its_own(self, x: Tensor, routing: Routing) -> Tensor:
        """Every token's experts, one weight at a time: compiled, these are read where they lie, and no others."""
        rows = x[:, None, None]
        hidden = F.silu((self.gate[routing.experts] * rows).sum(-1)) * (self.up[routing.experts] * rows).sum(-1)
        weighed = hidden * routing.weights.to(x.dtype).unsqueeze(-1)
        return (self.down[routing.experts] * weighed.unsqueeze(-1)).sum((1, 2))

    def _all_experts(self, x: Tensor, routing: Routing) -> Tensor:
        """Every expert on every token, weighted by 0 where not chosen."""
        weights = routing.weights.to(x.dtype)
        full = torch.zeros(x.shape[0], self.n_experts, dtype=x.dtype, device=x.device).scatter(
            1, routing.experts, weights
        )
        hidden = F.silu(F.linear(x, self.gate.flatten(0, 1))) * F.linear(x, self.up.flatten(0, 1))
        weighed = hidden.unflatten(-1, (self.n_experts, -1)) * full.unsqueeze(-1)
        return weighed.flatten(1) @ self.down.flatten(0, 1)

    def _grouped(self, x: Tensor, routing: Routing) -> Tensor:
        """Tokens sorted by expert, one grouped product per projection."""
        dispatch, dtype = self._dispatch(routing), _product_dtype(x)
        rows = x[dispatch.token].to(dtype)
        gate = F.grouped_mm(rows, self.gate.to(dtype).transpose(1, 2), offs=dispatch.group_ends)
        up = F.grouped_mm(rows, self.up.to(dtype).transpose(1, 2), offs=dispatch.group_ends)
        weights = routing.weights.flatten()[dispatch.slot].to(dtype)
        hidden = F.silu(gate) * up * weights.unsqueeze(-1)
        out = F.grouped_mm(hidden, self.down.to(dtype), offs=dispatch.group_ends)
        return torch.zeros_like(x).index_add(0, dispatch.token, out.to(x.dtype))

    def _dispatch(self, routing: Routing) -> Dispatch:
        flat = routing.experts.flatten()
        slot = flat.argsort(stable=True)
        group_ends = count_load(flat, self.n_experts).cumsum(0).to(torch.int32)
        return Dispatch(slot // self.topk, slot, group_ends)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The type of products with x: autocast's, which knows nothing of grouped ones, or else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
