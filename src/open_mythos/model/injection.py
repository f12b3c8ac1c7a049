"""How the state and the encoded input enter a loop: `A*h + B*e` with 0 < A < 1, whatever the parameters become.

Main entry: `LTIInjection`, after Parcae (arXiv 2604.12946): a diagonal linear system, discretised with step `dt`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from open_mythos.model.context import ForwardContext, Injected

# Bounds on the decay rate dt * a. exp(-9) is normal in float16, exp(-0.01) is below 1 in bfloat16.
_RATE_MIN, _RATE_MAX = 0.01, 9.0

# A of a new model, before the smooth bound: Parcae's. At 0.7 answers decayed with depth, at 0.2 learning was slow.
_FIRST_A = math.sqrt(0.2)


class LTIInjection(nn.Module):
    """Per channel `A = exp(-dt * a)`; `a` and `dt` are positive, and their product is kept within [0.01, 9].

    The bound is smooth (a tanh in the logarithm), so A never sticks at an end where no gradient would bring it back
    in one step; NaN parameters count as 0. Hence A lies in [0.00012, 0.9901] in float32, float16 and bfloat16 alike.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.zeros(dim))
        self.log_dt = nn.Parameter(torch.full((dim,), math.log(-math.log(_FIRST_A))))
        self.B = nn.Parameter(torch.ones(dim))

    def get_A(self) -> Tensor:
        """The diagonal of A, (dim,), each entry strictly between 0 and 1."""
        low, high = math.log(_RATE_MIN), math.log(_RATE_MAX)
        middle, reach = (low + high) / 2, (high - low) / 2
        log_rate = torch.nan_to_num(self.log_a.float() + self.log_dt.float(), nan=0.0)
        bounded = middle + reach * torch.tanh((log_rate - middle) / reach)
        return torch.exp(-torch.exp(bounded)).to(self.log_a.dtype)

    def forward(self, h: Tensor, e: Tensor, context: ForwardContext | None = None) -> Tensor:
        """`A*h + B*e` for the state h and the encoded input e, both (batch, seq, dim).

        A and `B*e` are the same in every loop; a context computes them once.
        """
        if context is None:
            return torch.addcmul(self.B * e, self.get_A(), h)
        injected = self.prepare(e, context)
        return torch.addcmul(injected.be(), injected.a, h)

    def prepare(self, e: Tensor, context: ForwardContext) -> Injected:
        """A, computed now unless the context has it, and `B*e` for when it is asked for."""
        if context.injected is None or context.injected.e is not e:
            context.injected = Injected(e, context.constant(self, self.get_A), self.B)
        return context.injected
