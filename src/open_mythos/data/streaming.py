"""Batches from a stream of documents that is never stored.

Main entry: `StreamedRows`. Documents are tokenised and packed as they arrive, each step after the one before it, and
the state resumes the stream bit for bit.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from open_mythos.data.batch import Batch
from open_mythos.data.encode import encode_documents
from open_mythos.data.hub import texts
from open_mythos.data.packing import as_batch, check_sizes
from open_mythos.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from datasets import IterableDataset


class StreamedRows:
    """Rows of `seq_len` tokens from any `datasets.IterableDataset` with a column `text`, as a `BatchSource`.

    The stream is read in blocks of `shuffle_buffer` documents, each put in a random order by itself (1 keeps the
    stream's order); when it ends it starts again. The shuffle buffer of `datasets` would not do: it is lost when a
    state is saved. Ours is read again from the block's start, so a state holds no document.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        tokenizer: TextTokenizer,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        bytes_per_token: float | None = None,
    ) -> None:
        check_sizes(seq_len, batch_size, seed)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}; it must be at least 1")
        self.vocab_size = tokenizer.vocab_size
        self.bytes_per_token = bytes_per_token
        self.seq_len = seq_len
        self.batch_size = batch_size
        self._tokenizer = tokenizer
        self._settings: dict[str, Any] = {
            "seed": seed,
            "shuffle_buffer": shuffle_buffer,
            "tokenizer": tokenizer.fingerprint,
        }
        self._dataset = dataset
        self._beginning = dataset.state_dict()
        self._enter(self._beginning, epoch=0, block=0)
        self._step = 0
        self._tokens: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """Tokens read and not yet used; the first one is the first id of the next batch."""
        self._mark()

    def batch(self, step: int) -> Batch:
        """The batch of the next step; `ValueError` for any other, for a stream cannot go back."""
        if step != self._step:
            raise ValueError(f"step is {step}; a stream is read in order, and its next step is {self._step}")
        used = self.batch_size * self.seq_len
        while self._tokens.size < used + 1:
            self._mark()
            self._tokens = np.concatenate([self._tokens, self._read_block()])
        rows = np.arange(0, used, self.seq_len)[:, None] + np.arange(self.seq_len + 1)
        windows = torch.from_numpy(self._tokens[rows])
        self._tokens = self._tokens[used:]
        self._used += used
        self._step += 1
        return as_batch(windows, self._tokenizer.end_of_text)

    def position(self, step: int) -> str:
        """Epoch and block that the stream has come to."""
        return (
            f"step {step} of a stream that is at step {self._step}, in epoch {self._epoch}, "
            f"before block {self._block} of {self._settings['shuffle_buffer']} documents"
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the last block began, the tokens at hand then, and how many have been used since."""
        return {**self._settings, **self._marked, "used": self._used, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved; `ValueError` if seed, shuffle buffer or tokenizer are not what they were."""
        for name, value in self._settings.items():
            if state.get(name) != value:
                raise ValueError(f"{name} is {value!r}; to resume it must be what it was, {state.get(name)!r}")
        self._enter(state["stream"], epoch=state["epoch"], block=state["block"])
        self._tokens = np.array(state["tokens"], dtype=np.int64)
        self._mark()
        if state["used"]:  # a mark is made just before a block is read, and only then are tokens used
            self._tokens = np.concatenate([self._tokens, self._read_block()])
        self._used = state["used"]
        self._tokens = self._tokens[self._used :]
        self._step = state["step"]

    def _enter(self, stream: dict[str, Any], *, epoch: int, block: int) -> None:
        self._dataset.load_state_dict(stream)
        self._texts = texts(self._dataset)
        # Until it is iterated, a dataset keeps telling the state from before the one it was given.
        self._stream, self._epoch, self._block = stream, epoch, block

    def _mark(self) -> None:
        """Remember this place, from which the tokens read later can be had again."""
        place = {"stream": self._stream, "epoch": self._epoch, "block": self._block}
        self._marked = {**place, "tokens": self._tokens.tolist()}
        self._used = 0

    def _read_block(self) -> NDArray[np.int64]:
        """The tokens of the next block of documents, shuffled; of the first one again where the stream has ended."""
        documents = self._take()
        if not documents and self._block:
            self._enter(self._beginning, epoch=self._epoch + 1, block=0)
            documents = self._take()
        if not documents:
            raise ValueError("the stream has no document to train on; it must have rows with text in a column 'text'")
        order = np.random.default_rng((self._settings["seed"], self._epoch, self._block)).permutation(len(documents))
        self._block += 1
        portions = encode_documents([documents[index] for index in order], self._tokenizer)
        return np.concatenate([portion.tokens for portion in portions])

    def _take(self) -> list[str]:
        documents = list(islice(self._texts, self._settings["shuffle_buffer"]))
        self._stream = self._dataset.state_dict()
        return documents
