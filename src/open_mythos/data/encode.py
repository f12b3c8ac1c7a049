"""Documents to packed tokens, as fast as the tokenizers library goes and in bounded memory.

Main entry: `encode_documents`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from open_mythos.data.tokenizer import TextTokenizer

# A call of the library takes this many characters: it holds about 100 bytes for each of their tokens, and spreads the
# pieces over the cores.
_PORTION = 1 << 20
_PIECE = 1 << 18


class Portion(NamedTuple):
    """Tokens (n,) int64, how many documents end in them, and the UTF-8 bytes that they stand for."""

    tokens: NDArray[np.int64]
    documents: int
    bytes: int


def encode_documents(documents: Iterable[str], tokenizer: TextTokenizer) -> Iterator[Portion]:
    """The tokens of the documents one after the other, each document followed by an end of text.

    A document of more than 262144 characters is encoded in pieces, each up to a line's end where it has one; only
    tokenizers whose tokens reach across a line's end can tell.
    """
    for portion in _portions(documents):
        encoded = tokenizer.encode_batch([text for text, _ in portion])
        ends = [last for _, last in portion]
        rows = ([*ids, tokenizer.end_of_text] if last else ids for ids, last in zip(encoded, ends, strict=True))
        tokens = np.concatenate([np.array(row, dtype=np.int64) for row in rows])
        yield Portion(tokens, sum(ends), sum(len(text.encode()) for text, _ in portion))


def _portions(documents: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of the documents, and whether each is the last of its own, about `_PORTION` characters at a time."""
    portion: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        for piece in _pieces(document):
            portion.append(piece)
            size += len(piece[0])
            if size >= _PORTION:
                yield portion
                portion, size = [], 0
    if portion:
        yield portion


def _pieces(document: str) -> Iterator[tuple[str, bool]]:
    start = 0
    while len(document) - start > _PIECE:
        end = document.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield document[start:end], False
        start = end
    yield document[start:], True
