"""What property tests of the data draw from."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from open_mythos.data.token_store import StoreInfo, TokenStore

END = 0
some = settings(max_examples=40, deadline=None, derandomize=True, database=None)
"""The decorator of property tests: the same examples in every run."""

characters = st.one_of(
    st.sampled_from("ab \n\r\t<|>'\u00e9\u65e5\U0001f600\u0301\ufeff\ufffd\0"),
    st.integers(0, 0x10FFFF).filter(lambda code: not 0xD800 <= code <= 0xDFFF).map(chr),
)
"""Any character of Unicode. (`st.text()` would first tabulate all of Unicode, which takes ten seconds.)"""


def texts(min_size: int = 0, max_size: int = 40) -> st.SearchStrategy[str]:
    """Any text."""
    return st.lists(characters, min_size=min_size, max_size=max_size).map("".join)


def store_of(documents: list[list[int]]) -> TokenStore:
    """A store of documents that are ids from 1 on, each token one byte long."""
    tokens = np.array([token for document in documents for token in [*document, END]], dtype=np.uint16)
    info = StoreInfo(
        dtype="<u2",
        tokens=tokens.size,
        documents=len(documents),
        bytes=tokens.size - len(documents),
        vocab_size=int(tokens.max()) + 1,
        end_of_text=END,
        tokenizer="",
        data="",
        content="",
    )
    return TokenStore(info, tokens)


@st.composite
def numbered_documents(draw: st.DrawFn) -> list[list[int]]:
    """Documents in which every token has its own id, so that a target tells which token it is."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    starts = np.cumsum([1, *lengths])
    return [list(range(start, start + length)) for start, length in zip(starts[:-1].tolist(), lengths, strict=True)]
