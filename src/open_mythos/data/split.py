"""The held-out split, made by document and never by row.

Main entry: `split_documents`. What a document says decides where it goes: two copies of one text never end up on both
sides, and neither the order nor the names of the files matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

DEFAULT_HOLDOUT = 0.1


@dataclass(frozen=True)
class Split:
    """Two disjoint parts of some documents; each call of `train` or `held_out` reads the documents anew."""

    documents: Iterable[str]
    holdout: float
    threshold: int | None
    """The largest content hash that is held out; None for a single document, which is cut in two."""
    n_train: int
    n_held_out: int

    def train(self) -> Iterator[str]:
        """The documents to train on, in their order."""
        if self.threshold is None:
            return iter([_cut(self.documents, self.holdout)[0]])
        return (text for text in self.documents if content_hash(text) > self.threshold)

    def held_out(self) -> Iterator[str]:
        """The documents to evaluate on, in their order."""
        if self.threshold is None:
            return iter([_cut(self.documents, self.holdout)[1]])
        return (text for text in self.documents if content_hash(text) <= self.threshold)


def split_documents(documents: Iterable[str], holdout: float = DEFAULT_HOLDOUT) -> Split:
    """Hold out the documents whose content hashes are smallest: the share nearest to `holdout`, one at least.

    Copies of one text have one hash and stay together. A single document is cut into two documents at
    `1 - holdout` of its characters, and the last part is held out. `documents` is iterated once here and once by every
    reader, so it must not be an iterator. Raises `ValueError` where no two parts can be made.
    """
    check_holdout(holdout)
    hashes = np.fromiter(map(content_hash, documents), dtype=np.uint64)
    if hashes.size == 1:
        _cut(documents, holdout)
        return Split(documents, holdout, None, 1, 1)
    distinct, copies = np.unique(hashes, return_counts=True)
    if distinct.size < 2:
        what = f"{hashes.size} copies of one text" if hashes.size else "no document"
        raise ValueError(f"data holds {what}; a held-out split needs two different documents or a single one to cut")
    held_out = np.cumsum(copies[:-1])
    nearest = int(np.abs(held_out - holdout * hashes.size).argmin())
    count = int(held_out[nearest])
    return Split(documents, holdout, int(distinct[nearest]), hashes.size - count, count)


def check_holdout(holdout: float) -> None:
    """Raises `ValueError` unless a share can be held out."""
    if not 0 < holdout < 1:
        raise ValueError(f"holdout is {holdout}; it must be a number between 0 and 1, both excluded")


def content_hash(text: str) -> int:
    """64 bits that depend on the text alone, the same in every process and on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _cut(documents: Iterable[str], holdout: float) -> tuple[str, str]:
    (text,) = documents
    at = min(max(int(len(text) * (1 - holdout)), 1), len(text) - 1)
    if at < 1:
        raise ValueError(f"data is a single document of {len(text)} character; it must have two, to hold one out")
    return text[:at], text[at:]
