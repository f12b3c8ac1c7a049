"""Tokenised documents on disk: one memory-mapped array of ids, with an end-of-text token after every document.

Main entries: `TokenStore`, `build_store`. Files: `NAME.bin` (little-endian uint16, or uint32 where the vocabulary needs
it) and `NAME.json`, written in this order, so that a store with its JSON is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_mythos.data.encode import encode_documents
from open_mythos.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class StoreInfo:
    """What the JSON says of the tokens beside it."""

    dtype: str
    tokens: int
    """End-of-text tokens included."""
    documents: int
    bytes: int
    """UTF-8 bytes of the documents."""
    vocab_size: int
    end_of_text: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    data: str
    """Fingerprint of the request for the documents."""
    content: str
    """Hash of the tokens."""

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes per counted target: every token but the first of each document, the ends of text included."""
        return self.bytes / (self.tokens - self.documents)


@dataclass(frozen=True)
class TokenStore:
    """The tokens (n,) of some documents, read from disk as they are needed."""

    info: StoreInfo
    tokens: NDArray[Any]

    @classmethod
    def open(cls, folder: Path, name: str, *, tokenizer: str, data: str) -> TokenStore | None:
        """The store of that name and those fingerprints; None where there is none, or not the whole of it."""
        try:
            info = StoreInfo(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
            path = folder / f"{name}.bin"
            whole = path.stat().st_size == info.tokens * np.dtype(info.dtype).itemsize
            if not whole or (info.tokenizer, info.data) != (tokenizer, data):
                return None
            return cls(info, np.memmap(path, dtype=info.dtype, mode="r", shape=(info.tokens,)))
        except (FileNotFoundError, ValueError, TypeError):  # no file, no JSON, or not the fields of ours
            return None


def build_store(
    folder: Path,
    name: str,
    documents: Iterable[str],
    tokenizer: TextTokenizer,
    data: str,
    on_progress: Callable[[int], None] | None = None,
) -> TokenStore:
    """The store of documents known by the fingerprint `data`: the one in the folder if it is theirs, else a new one.

    `documents` is not read if the store is there. `on_progress` is called with the number of documents done.
    """
    store = TokenStore.open(folder, name, tokenizer=tokenizer.fingerprint, data=data)
    if store is not None:
        return store
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)
    partial = folder / f".{name}.bin.partial"
    info = _write_tokens(partial, documents, tokenizer, data, on_progress or (lambda _: None))
    partial.replace(folder / f"{name}.bin")
    write_json(folder / f"{name}.json", asdict(info))
    store = TokenStore.open(folder, name, tokenizer=tokenizer.fingerprint, data=data)
    assert store is not None
    return store


def _write_tokens(
    path: Path, documents: Iterable[str], tokenizer: TextTokenizer, data: str, on_progress: Callable[[int], None]
) -> StoreInfo:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    n_documents = n_bytes = n_tokens = 0
    content = sha256()
    with path.open("wb") as file:
        for portion in encode_documents(documents, tokenizer):
            tokens = portion.tokens.astype(dtype).tobytes()
            file.write(tokens)
            content.update(tokens)
            n_tokens += portion.tokens.size
            n_documents += portion.documents
            n_bytes += portion.bytes
            on_progress(n_documents)
    if not n_documents:
        raise ValueError(f"the split for {path.parent} has no document; it must have one at least")
    return StoreInfo(
        dtype=dtype.str,
        tokens=n_tokens,
        documents=n_documents,
        bytes=n_bytes,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        tokenizer=tokenizer.fingerprint,
        data=data,
        content=content.hexdigest(),
    )


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file beside its place and move it there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
