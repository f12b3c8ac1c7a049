"""Root-mean-square normalisation, with a fused backward on CPU.

Main entry: `RMSNorm`. PyTorch 2.13 fuses `rms_norm` on GPUs only; on a CPU its backward is seven passes over memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.model.derivatives import elementary_only


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of `x` (..., dim); `weight` (dim,) scales the result, None leaves it at unit root mean square."""
    fuses = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if fuses and not elementary_only():
        if torch.is_grad_enabled():
            return _CpuRMSNorm.apply(x, weight, eps)
        return _scaled(x, _reciprocal_rms(x, eps), weight)
    return F.rms_norm(x, (x.shape[-1],), None if weight is None else weight.to(x.dtype), eps)


@cache
def _scalar(value: float) -> Tensor:
    return torch.tensor(value, device="cpu")


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_scalar(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


def _scaled(x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    y = x * rstd
    return y if weight is None else y.mul_(weight)


class _CpuRMSNorm(torch.autograd.Function):
    """The backward borrows LayerNorm's fused kernel.

    With its mean set to 0, that kernel returns `rstd * (g - mean(g) - xhat * mean(g * xhat))` for `g = grad * weight`;
    RMSNorm has no `mean(g)` term, so it is added back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        rstd = _reciprocal_rms(x, eps)
        ctx.save_for_backward(x, weight, rstd)
        return _scaled(x, rstd, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        dim, grad = x.shape[-1], grad.contiguous()
        wanted = [True, weight is not None, False]
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [dim], torch.zeros_like(rstd), rstd, weight, None, wanted
        )
        total = grad.sum(-1, keepdim=True) if weight is None else (grad @ weight).unsqueeze(-1)
        return grad_x.add_(rstd * total, alpha=1 / dim), grad_weight, None
