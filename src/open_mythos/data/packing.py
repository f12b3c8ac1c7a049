"""Documents packed into rows of one length, in an order that is a pure function of seed and step.

Main entries: `TextRows`, `as_batch`. The loss respects documents: what follows an end of text cannot be predicted and
is `IGNORED`. Attention does not: a row that holds parts of several documents is one sequence to the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from open_mythos.data.batch import IGNORED, Batch
from open_mythos.data.token_store import TokenStore


def as_batch(windows: Tensor, end_of_text: int) -> Batch:
    """Rows and the tokens that follow in windows (batch, seq + 1) of packed text, int64."""
    ids = windows[:, :-1].contiguous()
    return Batch(ids, windows[:, 1:].masked_fill(ids == end_of_text, IGNORED))


class TextRows:
    """Rows of `seq_len` tokens of a token store, as a `BatchSource` and, for evaluation, in order.

    The documents lie in a circle, an end of text between each two. An epoch cuts the circle into
    `tokens // seq_len` rows, starting at a token drawn from the first `seq_len`, and visits them in a random order; so
    every token is a target at most once per epoch, and fewer than `seq_len` tokens are left out.
    """

    def __init__(self, store: TokenStore, *, seq_len: int, batch_size: int, seed: int = 0, split: str = "training"):
        check_sizes(seq_len, batch_size, seed)
        self.store = store
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.split = split
        self.rows_per_epoch = store.info.tokens // seq_len
        self._orders: dict[int, NDArray[np.int64]] = {}
        if self.rows_per_epoch < 1:
            raise ValueError(
                f"seq_len is {seq_len}, and the {split} split has {store.info.tokens} tokens; it must have at least "
                "one row: take more text, another holdout, or a smaller seq_len"
            )

    @property
    def vocab_size(self) -> int:
        """The tokenizer's."""
        return self.store.info.vocab_size

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes per counted target of the whole split."""
        return self.store.info.bytes_per_token

    def batch(self, step: int) -> Batch:
        """The batch of a training step; takes time for its own rows, and once per epoch for the epoch's order."""
        positions = self._starts(step) + np.arange(self.seq_len + 1)
        return self._gather(positions % self.store.info.tokens)

    def position(self, step: int) -> str:
        """Epoch, and where the first row lies."""
        epoch, row = divmod(step * self.batch_size, self.rows_per_epoch)
        return (
            f"epoch {epoch} of the {self.split} split, rows from {row} of {self.rows_per_epoch} in that epoch's order, "
            f"the first of them at token {self._starts(step)[0, 0]} of {self.store.info.tokens}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Which tokens these are; a batch depends on nothing else but its step."""
        return {"content": self.store.info.content}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`ValueError` unless the state was saved with the same tokens."""
        if state != self.state_dict():
            raise ValueError(
                f"the {self.split} split has other tokens than when the checkpoint was written; "
                "to resume, the text and the tokenizer must be the same"
            )

    def in_order(self, max_rows: int | None = None) -> Iterator[Batch]:
        """The split, or its first rows, once and in order, `batch_size` rows at a time; the last batch may be smaller.

        Every token but the first of each document is counted exactly once; the last row is filled up with ends of
        text that are not.
        """
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; it must be None or at least 1")
        last = self.store.info.tokens - 1
        starts = np.arange(0, last, self.seq_len)[:max_rows, None]
        for first in range(0, len(starts), self.batch_size):
            positions = starts[first : first + self.batch_size] + np.arange(self.seq_len + 1)
            # The last token is an end of text: repeated, it is a filler that asks nothing.
            yield self._gather(np.minimum(positions, last))

    def _gather(self, positions: NDArray[np.int64]) -> Batch:
        windows = torch.from_numpy(self.store.tokens[positions].astype(np.int64))
        return as_batch(windows, self.store.info.end_of_text)

    def _starts(self, step: int) -> NDArray[np.int64]:
        """Where the rows of a step's batch start, (batch, 1)."""
        if step < 0:
            raise ValueError(f"step is {step}; it must be at least 0")
        first = step * self.batch_size
        places = (divmod(index, self.rows_per_epoch) for index in range(first, first + self.batch_size))
        return np.array([[self._order(epoch)[row]] for epoch, row in places])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Where the rows of an epoch start, in the order they are visited."""
        if epoch not in self._orders:
            random = np.random.default_rng((self.seed, epoch))
            offset = int(random.integers(self.seq_len))
            # One epoch is kept: batches go forward, and one that spans two epochs draws the old one only once.
            self._orders = {epoch: offset + self.seq_len * random.permutation(self.rows_per_epoch)}
        return self._orders[epoch]


def check_sizes(seq_len: int, batch_size: int, seed: int) -> None:
    """Raises `ValueError` naming the size that no source can have."""
    for name, value, least in (("seq_len", seq_len, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
