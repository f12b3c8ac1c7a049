"""Softmax attention with a causal or sliding-window mask, grouped heads and a learned sink.

Main entry: `attend`. It picks among three exact implementations by device and size; naming one in `kernel` forces it.
Shapes: B batch, Q queries, S keys, H query heads, K key heads, D key width, V value width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.model.derivatives import elementary_only
from open_mythos.model.mask import AttentionMask

Kernel = Literal["explicit", "flash_cpu", "sdpa"]

# Below this many queries the per-head loop of PyTorch's CPU flash kernel costs more than writing the scores out.
_FLASH_CPU_MIN_QUERIES = 48


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    sink: Tensor | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Attention of q (B, Q, H, D) over k (B, S, K, D) and v (B, S, K, V); returns (B, Q, H, V).

    `sink` (H,) holds one logit per query head: it enters the softmax's denominator and contributes no value, as in
    gpt-oss (the idea is that of Xiao et al. 2023, arXiv 2309.17453).
    """
    k, v = k[:, mask.first_key :], v[:, mask.first_key :]
    kernel = kernel or _pick_kernel(q)
    if kernel == "flash_cpu":
        return _flash_cpu(q, k, v, mask, scale, sink)
    if kernel == "explicit":
        return _explicit(q, k, v, mask, scale, sink)
    return _sdpa(q, k, v, mask, scale, sink)


def _pick_kernel(q: Tensor) -> Kernel:
    if elementary_only():
        return "explicit"
    if q.device.type != "cpu":
        return "sdpa"
    return "explicit" if q.shape[1] < _FLASH_CPU_MIN_QUERIES else "flash_cpu"


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, sink: Tensor | None) -> Tensor:
    """Scores written out, one matrix product per key head and sequence; a single query has no mask to add."""
    (B, Q, H, D), (K, V) = q.shape, v.shape[2:]
    G = H // K
    # Key heads come before sequences: keys and values that lie head by head are then not copied.
    queries = (q * scale).view(B, Q, K, G, D).permute(2, 0, 3, 1, 4).reshape(K * B, G * Q, D)
    keys, values = k.permute(2, 0, 3, 1), v.permute(2, 0, 1, 3)
    bias, own = mask.bias, sink
    if bias is not None and bias.dim() == 3:  # a mask of its own for every sequence
        bias = bias[:, None]
    elif sink is not None and bias is not None:  # one more key of zeros, whose bias is the sink's logit
        keys, values, own = F.pad(keys, (0, 1)), F.pad(values, (0, 0, 0, 1)), None
        bias = _bias_with_sink(mask, sink, q).view(K, 1, G, Q, -1)
    scores = torch.bmm(queries, keys.reshape(K * B, D, -1)).view(K, B, G, Q, -1)
    if bias is not None:
        scores = scores + bias
    if own is not None:
        scores = torch.cat([scores, own.to(q.dtype).view(K, 1, G, 1, 1).expand(K, B, G, Q, 1)], -1)
    weights = scores.softmax(-1)
    values = values.reshape(K * B, -1, V)
    out = torch.bmm(weights.view(K * B, G * Q, -1)[..., : values.shape[1]], values)
    return out.view(K, B, G, Q, V).permute(1, 3, 0, 2, 4).reshape(B, Q, H, V)


def _bias_with_sink(mask: AttentionMask, sink: Tensor, q: Tensor) -> Tensor:
    """The additive mask (..., H, Q, S + 1) with the sink's logits in its last column."""
    heads, queries, keys = q.shape[2], mask.n_queries, mask.n_keys - mask.first_key
    seen = q.new_zeros(1, 1, 1) if mask.bias is None else mask.bias.unsqueeze(-3)
    seen = seen.expand(*seen.shape[:-3], heads, queries, keys)
    logits = sink.to(q.dtype).view(heads, 1, 1).expand(*seen.shape[:-1], 1)
    return torch.cat([seen, logits], -1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, sink: Tensor | None) -> Tensor:
    """PyTorch's own dispatcher; the sink is one more key of zeros."""
    bias = mask.bias if mask.bias is None or mask.bias.dim() == 2 else mask.bias.unsqueeze(1)
    if sink is not None:
        k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
        bias = _bias_with_sink(mask, sink, q)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=bias,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, sink: Tensor | None) -> Tensor:
    """The CPU flash kernel behind SDPA, called directly because the sink needs its log-sum-exp."""
    width = v.shape[-1]
    widest = max(q.shape[-1], width)  # the kernel wants keys and values of one width
    q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    logits = q.new_full((q.shape[2],), float("-inf")) if sink is None else sink.to(q.dtype)
    out, _ = _CpuFlashWithSink.apply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), logits, mask, scale)
    return out.transpose(1, 2)[..., :width]


class _CpuFlashWithSink(torch.autograd.Function):
    """Flash attention (Dao et al. 2022, arXiv 2205.14135), rescaled by what the sink leaves of the softmax.

    Flash attention's backward recomputes the weights as `exp(score - lse)` and needs nothing else of the softmax.
    Handed the output and the log-sum-exp *with* the sink, it returns the exact gradients of q, k and v. The sink's
    value is zero, so its own gradient is `-weight_of_sink * sum(grad * out)`.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, mask: AttentionMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outs, lses = [], []
        for queries, keys, part in mask.parts:
            causal, bias = part.causal_or_bias
            there = (k[:, :, keys], v[:, :, keys])
            out, lse = flash(q[:, :, queries], *there, 0.0, causal, attn_mask=bias, scale=scale)
            outs.append(out.transpose(1, 2))
            lses.append(lse)
        out, lse = _joined(outs, 1).transpose(1, 2), _joined(lses, 2)
        full = torch.logaddexp(lse, sink.to(lse.dtype).view(-1, 1))
        out = out * (lse - full).exp().to(out.dtype).unsqueeze(-1)
        ctx.save_for_backward(q, k, v, sink, out, full)
        ctx.mask, ctx.scale = mask, scale
        ctx.mark_non_differentiable(full)
        return out, full

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, full = ctx.saved_tensors
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dqs, dks, dvs = [], [], []
        for queries, keys, part in ctx.mask.parts:
            causal, bias = part.causal_or_bias
            here, there = (out[:, :, queries], full[:, :, queries]), (k[:, :, keys], v[:, :, keys])
            dq, dk, dv = flash_backward(
                grad[:, :, queries], q[:, :, queries], *there, *here, 0.0, causal, attn_mask=bias, scale=ctx.scale
            )
            dqs.append(dq.transpose(1, 2))
            dks.append(dk)
            dvs.append(dv)
        read = [keys for _, keys, _ in ctx.mask.parts]
        dq, dk, dv = _joined(dqs, 1).transpose(1, 2), _overlaid(k, read, dks), _overlaid(v, read, dvs)
        sink_weight = (sink.to(full.dtype).view(-1, 1) - full).exp()
        dsink = -(sink_weight * (grad * out).sum(-1)).sum((0, 2)).to(sink.dtype)
        return dq, dk, dv, dsink, None, None


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _overlaid(like: Tensor, places: list[slice], tensors: list[Tensor]) -> Tensor:
    """The sum of tensors that belong at certain places of dimension 2."""
    if len(tensors) == 1:
        return tensors[0]
    total = torch.zeros_like(like)
    for place, tensor in zip(places, tensors, strict=True):
        total[:, :, place] += tensor
    return total
