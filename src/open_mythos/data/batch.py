"""What training asks of data: batches addressed by step.

Main entries: `Batch`, `BatchSource`. A source with random access is a pure function of its seed and the step, so it
has nothing to save; a stream saves where it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

IGNORED = -100
"""The target where nothing is asked; the default `ignore_index` of PyTorch's cross-entropy."""


class Batch(NamedTuple):
    """Sequences and what is asked of them."""

    ids: Tensor
    """(batch, seq) int64."""
    targets: Tensor
    """(batch, seq) int64, `IGNORED` where nothing is asked."""
    difficulty: Tensor | None = None
    """(batch,) int64: the loops that each sequence needs; None where nobody knows."""


class BatchSource(Protocol):
    """Batches of a training run; `batch(step)` is the whole batch of that step, of all processes together."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id or target."""
        ...

    @property
    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes per counted target, for bits per byte; None where the data is no text."""
        ...

    def batch(self, step: int) -> Batch:
        """The batch of a training step, counted from 0."""
        ...

    def position(self, step: int) -> str:
        """Where in the data that batch lies, in words, for error messages."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `batch` of later steps needs besides the step, as plain JSON data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        ...
