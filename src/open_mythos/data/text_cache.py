"""The tokenised splits of a corpus in a folder, made once and reused for as long as the same is asked for.

Main entry: `prepare`. Files: `tokenizer.json`, the token stores `train` and `held_out`, and `request.json`, written
last. One process at a time: in a distributed run the others wait until the first has been through.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from open_mythos.data.documents import file_signature, is_there, open_documents
from open_mythos.data.hub import HUB_PREFIX, open_hub, texts
from open_mythos.data.split import split_documents
from open_mythos.data.token_store import TokenStore, build_store, write_json
from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.data.tokenizer_spec import make_tokenizer, tokenizer_files

REQUEST_FILE = "request.json"
_FORMAT = 1
_BPE_SAMPLE = 10_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the tokens on disk are a function of, together with the content of the files it names."""

    data: str
    """`stdlib`, an absolute path, or a dataset of the hub."""
    tokenizer: str
    holdout: float
    """Share of the documents; of a stream, how many rows at its beginning."""

    @property
    def streamed(self) -> bool:
        """Whether the training split is a stream, of which nothing is stored."""
        return self.data.startswith(HUB_PREFIX)


@dataclass(frozen=True)
class Prepared:
    """A tokenizer and what it made of the documents."""

    tokenizer: TextTokenizer
    held_out: TokenStore
    train: TokenStore | None
    """None for a stream."""


def prepare(
    request: Request, folder: Path, on_progress: Callable[[int], None] | None = None, *, pinned: bool = False
) -> Prepared:
    """The splits of a request: those in the folder if they are its own and its files have not changed, else new ones.

    Files that have vanished have not changed: the folder is then enough. With `pinned` it is enough in any case, so
    that a run keeps its text whatever becomes of the original. `on_progress` is called with the number of documents
    tokenised so far.
    """
    saved = _saved_record(folder)
    if pinned and saved:
        files = kept = saved["files"]
    else:
        files = _signature(request)
        kept = {name: saved["files"].get(name) if saved and now is None else now for name, now in files.items()}
    record = {"format": _FORMAT, **asdict(request), "files": kept}
    prepared = _reuse(request, folder, _fingerprint(record)) if record == saved else None
    if prepared is None:
        record["files"] = _signature(request) if pinned else files
        build = _build_streamed if request.streamed else _build
        prepared = build(request, folder, _fingerprint(record), on_progress or (lambda done: None))
        write_json(folder / REQUEST_FILE, record)
    return prepared


def _build(request: Request, folder: Path, data: str, on_progress: Callable[[int], None]) -> Prepared:
    split = split_documents(open_documents(request.data), request.holdout)
    tokenizer = _saved(make_tokenizer(request.tokenizer, split.train, lambda: split.documents), folder)
    train = build_store(folder, "train", split.train(), tokenizer, data, on_progress)
    done = split.n_train
    held_out = build_store(folder, "held_out", split.held_out(), tokenizer, data, lambda more: on_progress(done + more))
    return Prepared(tokenizer, held_out, train)


def _build_streamed(request: Request, folder: Path, data: str, on_progress: Callable[[int], None]) -> Prepared:
    """The held-out split of a stream; byte pairs are merged in the 10000 rows behind it."""
    if request.tokenizer == "chars":
        raise ValueError("tokenizer is 'chars', and a stream shows all its characters only at its end; take 'bytes'")
    stream, count = open_hub(request.data), int(request.holdout)
    held_out, sample = stream.take(count), stream.skip(count).take(_BPE_SAMPLE)
    make = make_tokenizer(request.tokenizer, lambda: texts(sample), lambda: texts(sample))
    tokenizer = _saved(make, folder)
    return Prepared(tokenizer, build_store(folder, "held_out", texts(held_out), tokenizer, data, on_progress), None)


def _saved(tokenizer: TextTokenizer, folder: Path) -> TextTokenizer:
    """The tokenizer as it comes back from its file, so that its fingerprint is what later calls will find.

    From here on the folder is no longer what it was; until here, nothing that fails has touched it.
    """
    (folder / REQUEST_FILE).unlink(missing_ok=True)
    tokenizer.save(folder)
    return TextTokenizer.load(folder)


def _reuse(request: Request, folder: Path, data: str) -> Prepared | None:
    try:
        tokenizer = TextTokenizer.load(folder)
    except ValueError:
        return None
    held_out = TokenStore.open(folder, "held_out", tokenizer=tokenizer.fingerprint, data=data)
    train = TokenStore.open(folder, "train", tokenizer=tokenizer.fingerprint, data=data)
    if held_out is None or (train is None and not request.streamed):
        return None
    return Prepared(tokenizer, held_out, train)


def _saved_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None


def _signature(request: Request) -> dict[str, Any]:
    """Path, size and time of the files that the request names; None where it names none, or they are not there."""
    local = not request.streamed and is_there(request.data)
    return {
        "data": file_signature(open_documents(request.data).files) if local else None,
        "tokenizer": file_signature(tokenizer_files(request.tokenizer)) or None,
    }


def _fingerprint(record: dict[str, Any]) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
