"""The whole model, one sequence at a time, in float64, with nothing shared, skipped, fused or cached.

Main entry: `forward`. Weights are read from an `OpenMythos`; none of its `forward` methods is called.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from open_mythos.model.attention import GQAttention
from open_mythos.model.block import Block
from open_mythos.model.experts import MoEFFN
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.mythos import OpenMythos
from reference.attention import attention
from reference.elementary import rms_norm, rotate_all, swiglu
from reference.experts import mixture
from reference.halting import has_halted, has_moved, loop_weights


class Reference(NamedTuple):
    """Logits (batch, seq, vocab_size), exit loops (batch, seq) and the mean ponder cost."""

    logits: Tensor
    exit_loops: Tensor
    ponder_cost: float


def forward(model: OpenMythos, ids: Tensor, n_loops: list[int]) -> Reference:
    """What `model(ids, n_loops, full_output=True)` should give in evaluation mode."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        results = [_sequence(model, row, budget) for row, budget in zip(ids, n_loops, strict=True)]
    logits, exits, ponder = zip(*results, strict=True)
    return Reference(torch.stack(logits), torch.tensor(exits), sum(map(sum, ponder)) / ids.numel())


def _sequence(model: OpenMythos, ids: Tensor, budget: int) -> tuple[Tensor, list[int], list[float]]:
    c = model.config
    x = torch.stack([model.embed.weight[token] for token in ids]) * c.dim**0.5
    for block in model.prelude:
        x = _block(block, x, c.outer_window, {}, [True] * len(ids))
    e = rms_norm(x, model.prelude_norm.weight, c.norm_eps)
    x, exits, ponder = _loops(model, e, budget)
    for block in model.coda:
        x = _block(block, x, c.outer_window, {}, [True] * len(ids))
    head = model.embed.weight if model.head is None else model.head.weight
    return rms_norm(x, model.norm.weight, c.norm_eps) @ head.T, exits, ponder


def _loops(model: OpenMythos, e: Tensor, budget: int) -> tuple[Tensor, list[int], list[float]]:
    """The state for the coda, and loops run and ponder cost of every position."""
    c, recurrent = model.config, model.recurrent
    positions = range(len(e))
    h = list(e if c.state_init == "input" else torch.zeros_like(e))
    states: list[list[Tensor]] = [[] for _ in positions]
    probabilities: list[list[float]] = [[] for _ in positions]
    kept: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in recurrent.blocks]
    threshold = c.act_threshold if c.halting == "act" else float("inf")
    active = [True] * len(e)
    for t in range(budget):
        new = _one_loop(model, torch.stack(h), e, t, kept, active)
        moved = [active[i] and has_moved(h[i], new[i], c.settle_tolerance) for i in positions]
        for i in positions:
            if active[i]:
                h[i] = new[i]
                states[i].append(h[i])
                probabilities[i].append(_halting_probability(model, h[i]))
                active[i] = not has_halted(probabilities[i], budget, threshold)
                if c.halting == "settled" and t > 0 and not any(moved[: i + 1]):
                    active[i] = False
    if c.halting != "act":
        return torch.stack(h), [len(states[i]) for i in positions], [0.0] * len(e)
    weights = [loop_weights(probabilities[i], budget, threshold) for i in positions]
    out = [sum(w * s for w, s in zip(weights[i], states[i], strict=True)) for i in positions]
    return torch.stack(out), [len(w) for w in weights], [len(w) + w[-1] for w in weights]


def _one_loop(model: OpenMythos, h: Tensor, e: Tensor, t: int, kept: list, active: list[bool]) -> Tensor:
    """`u + F(u)` with `u = A*h + B*e` for all positions; those not active are to be ignored by the caller."""
    recurrent = model.recurrent
    u = recurrent.injection.get_A() * h + recurrent.injection.B * e
    if recurrent.loop_embedding is not None:
        weight = recurrent.loop_embedding.weight
        u = u + sum((1 - 2.0 ** -(k + 1)) ** t * weight[k] for k in range(len(weight)))
    x = u
    for block, own in zip(recurrent.blocks, kept, strict=True):
        x = _block(block, x, model.config.window, own, active)
    if recurrent.adapter is not None:
        a = recurrent.adapter
        scale = a.settled + a.transient / (1 + torch.exp(-a.decay_logit)) ** t
        x = x + (x - u) @ a.down.weight.T * scale @ a.up.weight.T
    return x


def _halting_probability(model: OpenMythos, h: Tensor) -> float:
    act = model.recurrent.act
    if act is None:
        return 0.0
    normed = h / ((h * h).mean().sqrt() + act.eps)
    return float(torch.sigmoid(act.halt.weight[0] @ normed + act.halt.bias[0]))


def _block(block: Block, x: Tensor, window: int | None, kept: dict, active: list[bool]) -> Tensor:
    """Pre-norm attention and feed-forward; `kept` holds each position's keys and values of its last active loop."""
    c, eps = block.attn.config, block.attn_norm.eps
    normed = rms_norm(x, block.attn_norm.weight, eps)
    project = _latent_heads if isinstance(block.attn, MLAttention) else _grouped_heads
    q, k, v = project(block.attn, normed)
    for i, is_active in enumerate(active):
        if is_active:
            kept[i] = (k[i], v[i])
    keys, values = (torch.stack([kept[i][part] for i in range(len(x))]) for part in (0, 1))
    heads = attention(q, keys, values, scale=q.shape[-1] ** -0.5, window=window, sink=block.attn.sink)
    x = x + c.update_scale * heads.flatten(1) @ block.attn.out.weight.T
    normed = rms_norm(x, block.ffn_norm.weight, eps)
    if isinstance(block.ffn, MoEFFN):
        return x + c.update_scale * mixture(block.ffn, normed)
    return x + c.update_scale * swiglu(normed, block.ffn.gate.weight, block.ffn.up.weight, block.ffn.down.weight)


def _grouped_heads(attn: GQAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (seq, heads, head_dim)."""
    c = attn.config
    widths = [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]
    q, k, v = (x @ w.T for w in attn.qkv.weight.split(widths))
    q, k, v = (part.unflatten(-1, (-1, c.head_dim)) for part in (q, k, v))
    if attn.qk_gain is not None:
        q = rms_norm(q, attn.qk_gain[: c.n_heads], c.norm_eps)
        k = rms_norm(k, attn.qk_gain[c.n_heads :], c.norm_eps)
    if c.use_rope:
        q, k = rotate_all(q, c.rope_theta), rotate_all(k, c.rope_theta)
    return q, k, v


def _latent_heads(attn: MLAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of every head, rebuilt from the latent, each (seq, heads, width)."""
    c = attn.config
    c_q, c_kv, k_rope = (x @ attn.down.weight.T).split([c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim], -1)
    q = rms_norm(c_q, attn.q_norm.weight, c.norm_eps) @ attn.q_up.weight.T
    q_nope, q_rope = q.unflatten(-1, (c.n_heads, -1)).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    kv = rms_norm(c_kv, attn.kv_norm.weight, c.norm_eps) @ attn.kv_up.weight.T
    k_nope, v = kv.unflatten(-1, (c.n_heads, -1)).split([c.qk_nope_head_dim, c.v_head_dim], -1)
    k_rope = k_rope.unsqueeze(1)
    if c.use_rope:
        q_rope, k_rope = rotate_all(q_rope, c.rope_theta), rotate_all(k_rope, c.rope_theta)
    k_rope = k_rope.expand(-1, c.n_heads, -1)
    return torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope], -1), v
