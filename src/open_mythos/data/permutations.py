"""Random orders of things.

Main entry: `permutations`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def permutations(size: int, n: int, generator: torch.Generator) -> Tensor:
    """`size` random orders of 0 to n - 1, (size, n)."""
    return torch.rand((size, n), generator=generator).argsort(1)
