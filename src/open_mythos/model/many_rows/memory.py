"""Memory that passes use again: to get it from the system for each took a fifth of a small model's training step.

Main entries: `Pool` for what a pass keeps for its way back, `Scratch` for what it needs while it runs.
"""

from __future__ import annotations

import threading
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from open_mythos.model.rows import Array

MOST_HELD = 2**24
"""Numbers of a layer's that are held for the next pass; more is given back."""


class Pool:
    """Lends pieces of memory, which come back once nobody has the tensor any more."""

    def __init__(self, most: int) -> None:
        """Pieces of more than so many numbers are never held."""
        self._most = most
        self.free: list[Array] = []

    def room(self, size: int) -> Tensor:
        """So many numbers. What is too small is given back, so that there are never more pieces than were in use."""
        if not 0 < size <= self._most:
            return torch.empty(size, dtype=torch.float32, device="cpu")
        memory = self.free.pop() if self.free else None
        if memory is None or memory.size < size:
            memory = np.empty(size, np.float32)
        lent = memory[:size]
        finalize(lent, self.free.append, memory).atexit = False
        return torch.from_numpy(lent)


class Scratch(threading.local):
    """One piece of memory for each thread."""

    buffer = torch.empty(0, dtype=torch.float32, device="cpu")

    def room(self, size: int) -> Tensor:
        """So many numbers, until the next call."""
        buffer = self.buffer
        if buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.float32, device="cpu")
            if size <= MOST_HELD:
                self.buffer = buffer
        return buffer
