"""An upper bound, from the weights alone, on what the recurrent block can add to its stream in one loop.

Main entry: `branch_bound`. It is half of the bound on the state; stability.py has the other half.

With `n` the unit-rms vector that a norm makes of any input, `|n|_2 <= sqrt(dim)`, and `g` the norm's gain:

- A linear readout `w . (g * n)` is at most `sqrt(dim) |w * g|_2` (Cauchy-Schwarz).
- Attention gives each head a combination of values `V (g * n_s)` of positions s, with weights that are positive and sum
  to at most 1 (a sink only takes away). So channel c is at most the sum over heads of `sqrt(dim) |O_c V diag(g)|_2`.
  MLA's values are linear in its own normed latent, so the same holds with the latent's width and gain.
- SwiGLU: `|silu(a) b| <= |a b|`, and for `a = p . n`, `b = q . n` the largest `|a b|` is `dim (|p| |q| + |p . q|) / 2`.
  Summed with `|D_cj|` that bounds channel c. So does `max_j |D_cj| |a|_2 |b|_2`, with `|a|_2 <= sqrt(dim) sigma(P)` and
  `|b|_2 <= sqrt(dim) sigma(Q)`, sigma the largest singular value. The smaller one counts.
- Routed experts have positive weights that sum to at most `routed_scale`, so the largest expert's bound times that.
- Each layer scales its branches by a constant. Layers add up, whatever the later ones read: each reads a normed vector.
- The depth adapter reads the sum F of the branches; its factors in loop t lie between `settled` and
  `settled + transient`, since `0 < decay^t <= 1`. So it adds at most `|U| max|scale| |D| max|F|`, with absolute values.

Everything is computed in float64; the forward pass's own rounding is not part of the bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from open_mythos.model.attention import GQAttention
from open_mythos.model.block import Block
from open_mythos.model.depth_adapter import DepthAdapter
from open_mythos.model.experts import MoEFFN
from open_mythos.model.feed_forward import SwiGLU
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.recurrent import RecurrentBlock


@torch.no_grad()
def branch_bound(recurrent: RecurrentBlock) -> Tensor:
    """max |F| per channel, (dim,) in float64: no input and no state makes the branches add more in evaluation mode."""
    total = torch.zeros(recurrent.config.dim, dtype=torch.float64, device=recurrent.injection.B.device)
    for block in recurrent.blocks:
        assert isinstance(block, Block)
        total = total + block.branch_scale * (_attention_bound(block) + _feed_forward_bound(block))
    return total if recurrent.adapter is None else total + _adapter_bound(recurrent.adapter, total)


def _attention_bound(block: Block) -> Tensor:
    """Largest output of a block's attention per channel, (dim,)."""
    attn = block.attn
    if isinstance(attn, MLAttention):
        values = attn.kv_up.weight.view(attn.n_heads, -1, attn.kv_up.in_features)[:, attn.nope_dim :]
        gain = attn.kv_norm.weight
    else:
        assert isinstance(attn, GQAttention)
        heads = attn.qkv.weight.view(-1, attn.head_dim, attn.qkv.in_features)[-attn.n_kv_heads :]
        values, gain = heads.repeat_interleave(attn.n_heads // attn.n_kv_heads, 0), block.attn_norm.weight
    readout = (
        attn.out.weight.double().view(attn.out.out_features, attn.n_heads, -1).transpose(0, 1)
    )  # (heads, dim, width)
    width = gain.shape[0] ** 0.5
    total = torch.zeros_like(readout[0, :, 0])
    for o, v in zip(readout, values.double() * gain.double(), strict=True):
        total += width * torch.linalg.vector_norm(o @ v, dim=1)
    return total


def _feed_forward_bound(block: Block) -> Tensor:
    """Largest output of a block's feed-forward per channel, (dim,)."""
    gain, ffn = block.ffn_norm.weight.double(), block.ffn
    if isinstance(ffn, SwiGLU):
        return _dense_bound(ffn, gain)
    assert isinstance(ffn, MoEFFN)
    largest = torch.zeros_like(gain)
    for gate, up, down in zip(ffn.gate, ffn.up, ffn.down, strict=True):
        largest = torch.maximum(largest, _swiglu_bound(gate, up, down.T, gain))
    routed = ffn.scale * largest
    return routed if ffn.shared is None else routed + _dense_bound(ffn.shared, gain)


def _dense_bound(ffn: SwiGLU, gain: Tensor) -> Tensor:
    return _swiglu_bound(ffn.gate.weight, ffn.up.weight, ffn.down.weight, gain)


def _swiglu_bound(gate: Tensor, up: Tensor, down: Tensor, gain: Tensor) -> Tensor:
    """Per channel (dim,) of gate and up (hidden, dim), down (dim, hidden) and the gain of the norm before them."""
    p, q, weight = gate.double() * gain, up.double() * gain, down.double().abs()
    dim = gain.shape[0]
    norms = torch.linalg.vector_norm(p, dim=1) * torch.linalg.vector_norm(q, dim=1)
    by_row = weight @ (dim * (norms + (p * q).sum(1).abs()) / 2)
    by_matrix = weight.amax(1) * dim * _largest_singular_value(p) * _largest_singular_value(q)
    return torch.minimum(by_row, by_matrix)


def _largest_singular_value(matrix: Tensor) -> Tensor:
    """From the smaller Gram matrix: exact, and ten times cheaper than a singular value decomposition."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    largest: Tensor = torch.linalg.eigvalsh(wide @ wide.T)[-1]
    return largest.clamp_min(0).sqrt()


def _adapter_bound(adapter: DepthAdapter, branches: Tensor) -> Tensor:
    """Largest output of the adapter per channel when its input is at most `branches` (dim,)."""
    settled, transient = adapter.settled.double(), adapter.transient.double()
    scale = torch.maximum(settled.abs(), (settled + transient).abs())
    up = adapter.up.weight.double().abs()
    return torch.mv(up, scale * torch.mv(adapter.down.weight.double().abs(), branches))
