"""One request on its way through the engine.

Main entries: `Request`, `Output`, `Turn`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from open_mythos.inference.cache import RowTable
from open_mythos.inference.decoded_text import DecodedText
from open_mythos.inference.sampling import SamplingParams
from open_mythos.inference.speculation import Draft

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
class Request:
    """What the engine knows of a request."""

    index: int
    prompt: list[int]
    params: SamplingParams
    n_loops: int
    table: RowTable
    output: Output
    random: torch.Generator
    tokens: list[int]
    """The prompt, the new tokens, and the drafts after them."""
    encoded: int = 0
    """How many of them the model has encoded."""
    done: int = 0
    """How many positions are final."""
    drafts: list[Draft] = field(default_factory=list)
    text: DecodedText | None = None

    @cached_property
    def is_plain(self) -> bool:
        """Whether all that it asks of logits is which token is the likeliest."""
        return self.params.takes_likeliest and not self.params.logprobs

    @property
    def pending(self) -> list[int]:
        """Tokens that have not been encoded."""
        return self.tokens[self.encoded :]

    @property
    def n_pending(self) -> int:
        return len(self.tokens) - self.encoded

    @property
    def loops_before(self) -> int:
        """How many loops the last encoded position has run; 0 if there is none."""
        return int(self.table.exits[self.encoded - 1]) if self.encoded else 0

    def add_text(self, token: int) -> bool:
        """Whether the text with this token has a stop string."""
        if self.text is None or self.output.text is None:
            return False
        self.output.text += self.text.push(token)
        return self.text.stopped

    @property
    def turn(self) -> int:
        """How many positions become final together, next: what is left of the prompt, or one."""
        return max(1, len(self.prompt) - self.done)


class Turn(NamedTuple):
    """Positions of a request, in these lines of the flight, whose coda is due."""

    request: Request
    lines: range
