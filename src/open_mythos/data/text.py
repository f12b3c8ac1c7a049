"""From the words of a command line to training batches, held-out rows and a tokenizer.

Main entry: `open_text`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from open_mythos.data.batch import BatchSource
from open_mythos.data.documents import STDLIB, resolve_spec
from open_mythos.data.hub import HUB_PREFIX, open_hub
from open_mythos.data.packing import TextRows, check_sizes
from open_mythos.data.split import DEFAULT_HOLDOUT, check_holdout
from open_mythos.data.streaming import StreamedRows
from open_mythos.data.text_cache import Prepared, Request, prepare
from open_mythos.data.token_store import StoreInfo
from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.data.tokenizer_spec import resolve_tokenizer


@dataclass(frozen=True)
class SplitCounts:
    """How much text a split has; `tokens` counts the end of each document too."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class TextSummary:
    """What was opened, for display and for telling whether a later run has the same data."""

    data: str
    tokenizer: str
    vocab_size: int
    train: SplitCounts | None
    """None for a stream, whose end nobody knows."""
    held_out: SplitCounts
    fingerprint: str
    """Equal where the tokenizer and the tokens of both splits are (of a stream, its name and the held-out ones)."""


@dataclass(frozen=True)
class TextData:
    """Text ready for training and evaluation."""

    train: BatchSource
    held_out: TextRows
    tokenizer: TextTokenizer
    summary: TextSummary


def open_text(
    data: str = STDLIB,
    *,
    cache: str | Path,
    seq_len: int,
    batch_size: int,
    tokenizer: str = "bytes",
    holdout: float = DEFAULT_HOLDOUT,
    seed: int = 0,
    held_out_rows: int = 1000,
    shuffle_buffer: int = 1000,
    on_progress: Callable[[int], None] | None = None,
    pinned: bool = False,
) -> TextData:
    """Text by name, tokenised once into the folder `cache` and reused from there while the request is the same.

    `data` is what `open_documents` takes, or `hf:NAME` or `hf:NAME:CONFIG`; `tokenizer` what `make_tokenizer` takes.
    Local documents are split as in `split_documents`, and everything wrong with them is raised here, as `ValueError`.
    A dataset of the hub is streamed: its first `held_out_rows` rows are held out, the others are read in training, in
    shuffled blocks of `shuffle_buffer`; `holdout` has no part in it. `seq_len`, `batch_size` and `seed` are no part of
    the request. With `pinned`, what is in the cache counts, even if the original has changed since. `on_progress` is
    called with the number of documents tokenised.
    """
    check_sizes(seq_len, batch_size, seed)
    request = _request(data, tokenizer, holdout, held_out_rows, Path(cache))
    prepared = prepare(request, Path(cache), on_progress, pinned=pinned)
    held_out = TextRows(prepared.held_out, seq_len=seq_len, batch_size=batch_size, seed=seed, split="held-out")
    train: BatchSource
    if prepared.train is not None:
        train = TextRows(prepared.train, seq_len=seq_len, batch_size=batch_size, seed=seed)
    else:
        train = StreamedRows(
            open_hub(data).skip(held_out_rows),
            prepared.tokenizer,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            shuffle_buffer=shuffle_buffer,
            bytes_per_token=held_out.bytes_per_token,
        )
    return TextData(train, held_out, prepared.tokenizer, _summary(request, prepared))


def _request(data: str, tokenizer: str, holdout: float, held_out_rows: int, cache: Path) -> Request:
    check_holdout(holdout)
    if held_out_rows < 1:
        raise ValueError(f"held_out_rows is {held_out_rows}; it must be at least 1")
    if data.startswith(HUB_PREFIX):
        return Request(data=data, tokenizer=resolve_tokenizer(tokenizer), holdout=held_out_rows)
    request = Request(data=resolve_spec(data), tokenizer=resolve_tokenizer(tokenizer), holdout=holdout)
    if cache.resolve().is_relative_to(request.data):
        raise ValueError(
            f"cache is {str(cache)!r}, inside the data ({request.data!r}), and would become part of it; "
            "it must be another folder"
        )
    return request


def _summary(request: Request, prepared: Prepared) -> TextSummary:
    train = request.data if prepared.train is None else prepared.train.info.content
    contents = (prepared.tokenizer.fingerprint, prepared.held_out.info.content, train)
    return TextSummary(
        data=request.data,
        tokenizer=request.tokenizer,
        vocab_size=prepared.tokenizer.vocab_size,
        train=None if prepared.train is None else _counts(prepared.train.info),
        held_out=_counts(prepared.held_out.info),
        fingerprint=sha256(repr(contents).encode()).hexdigest(),
    )


def _counts(info: StoreInfo) -> SplitCounts:
    return SplitCounts(info.documents, info.tokens, info.bytes)
