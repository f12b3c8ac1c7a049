"""Random numbers as a function of seed and step, so that a resumed run draws what an uninterrupted one does.

Main entries: `generator`, `number`.
"""

from __future__ import annotations

import numpy as np
import torch


def number(seed: int, step: int, purpose: str, rank: int = 0) -> int:
    """63 random bits for this purpose at this step."""
    words = np.random.SeedSequence([seed, step, rank, *purpose.encode()]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A fresh generator on the CPU; what is drawn from it depends on nothing but the arguments."""
    return torch.Generator().manual_seed(number(seed, step, purpose))
