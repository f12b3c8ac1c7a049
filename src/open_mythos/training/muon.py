"""Muon: each matrix's momentum is made orthogonal before it is a step (Jordan 2024, kellerjordan.github.io/posts/muon).

Main entry: `Muon`. Unlike PyTorch's, a sharded matrix takes the step that the whole one would: its momentum is gathered
first. And it multiplies in float32 where bfloat16 is slow, so that rounding does not tell numbers of ranks apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from open_mythos.training.hardware import has_fast_bfloat16

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that sends singular values near 1 fastest, as published."""
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, scaled to the size of AdamW's steps (Liu et al. 2025, arXiv 2502.16982)."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float) -> None:
        """`params` are matrices."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        assert closure is None, "the trainer computes the gradients itself"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = _sharded_like(parameter, orthogonal(_whole(gradient.lerp(buffer, group["momentum"]))))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1, by Newton and Schulz's iteration."""
    x = matrix.bfloat16() if has_fast_bfloat16(matrix.device) else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of what every rank has whole."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
