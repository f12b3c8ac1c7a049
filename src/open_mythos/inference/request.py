"""One request on its way through the engine.

Main entries: `Request`, `Output`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from open_mythos.inference.cache import Rows, RowTable
from open_mythos.inference.decoded_text import DecodedText
from open_mythos.inference.exit import Memory
from open_mythos.inference.sampling import SamplingParams

FinishReason = Literal["length", "stop", "cancelled", "error"]


@dataclass
class Output:
    """What a request came to."""

    token_ids: list[int]
    """The new tokens."""
    exit_loops: list[int]
    """How many loops the position before each of them ran."""
    logprobs: list[float] | None
    finish_reason: FinishReason | None = None
    error: str | None = None
    text: str | None = None
    """The new tokens as text, without the stop token or string that ended it; None if the engine has no tokenizer."""


@dataclass
class Loops:
    """The positions that a request is computing now, and how far each is."""

    positions: Rows
    """(n,): all of them."""
    h: Tensor
    """(n, dim): the state."""
    e: Tensor
    """(n, dim): the encoded input."""
    mass: Tensor
    """(n,): halting probability spent."""
    output: Tensor
    """(n, dim): the mean of states so far, weighed by it."""
    active: NDArray[np.bool_]
    """(n,): which have not halted."""
    t: int = 0
    memory: Memory = field(default_factory=dict)
    """The exit rule's, of active positions."""


@dataclass
class Request:
    """What the engine knows of a request."""

    index: int
    prompt: list[int]
    params: SamplingParams
    n_loops: int
    table: RowTable
    reserved: int
    """Pages set aside for it at most."""
    output: Output
    random: torch.Generator
    loops: Loops | None = None
    """None while its next tokens have not been encoded."""
    text: DecodedText | None = None

    @property
    def pending(self) -> list[int]:
        """Tokens that have not been through the model."""
        return self.output.token_ids[-1:] or self.prompt

    @property
    def first_position(self) -> int:
        """Where the pending tokens begin."""
        return len(self.prompt) + len(self.output.token_ids) - 1 if self.output.token_ids else 0
