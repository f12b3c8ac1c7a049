"""The documents in one file: a text, JSON lines, or Parquet.

Main entry: `read_documents`. Text is UTF-8 and taken as it stands: no newline is translated, no mark removed. A text
file is read whole, so it must fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEXT_COLUMN = "text"
_SUFFIXES = """
.txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .css .json .yaml .yml .toml .ini .cfg .csv .tsv
.py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .java .kt .scala .swift .cs .js .jsx .ts .tsx .rb .pl
.php .lua .r .jl .hs .ml .clj .ex .erl .el .lisp .sh .bash .zsh .sql .tf .cmake .proto
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
"""What counts as text or source code inside a folder; a file given by its own path may have any suffix."""
TABLE_SUFFIXES = frozenset({".jsonl", ".parquet"})


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a file that hold any character, in order.

    `.jsonl` and `.parquet` files have one document per row in their column `text`; any other file is one document.
    Raises `ValueError` naming the file, and the line or byte, where something cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from filter(None, _json_lines(path))
    elif suffix == ".parquet":
        yield from filter(None, _parquet_rows(path))
    else:
        with readable(path):
            data = path.read_bytes()
        if data:
            yield _decode(data, str(path), 0)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the system's refusal into a `ValueError` naming the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}"
        raise ValueError(f"{where} has {found}; it must be UTF-8 text") from error


def _json_lines(path: Path) -> Iterator[str]:
    offset = 0
    with readable(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            text = _decode(line, where, offset)
            offset += len(line)
            if text.strip():
                yield _text_of(_parse(text, where), where)


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a JSON {type(row).__name__}; it must be an object with {TEXT_COLUMN!r}")
    if TEXT_COLUMN not in row:
        raise ValueError(f"{where} has no {TEXT_COLUMN!r}; it has {sorted(row)}")
    return check_text(row[TEXT_COLUMN], where)


def check_text(text: Any, where: str) -> str:
    """The text of a row; raises `ValueError` where it is none, or holds half of a surrogate pair, which is none."""
    if not isinstance(text, str):
        raise ValueError(f"{where} has {text!r:.80} as {TEXT_COLUMN!r}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has {text[error.start]!r} at character {error.start}; it must be text that UTF-8 can hold"
        ) from error
    return text


def _parquet_rows(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install 'open-mythos[train]'") from error

    number = 0
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    with file:
        columns = file.schema_arrow.names
        if TEXT_COLUMN not in columns:
            raise ValueError(f"{path} has no column {TEXT_COLUMN!r}; it has {columns}")
        batches = file.iter_batches(columns=[TEXT_COLUMN])
        while True:
            try:
                texts = next(batches).column(0).to_pylist()
            except StopIteration:
                return
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} is damaged after row {number}: {error}") from error
            for text in texts:
                number += 1
                yield check_text(text, f"{path}, row {number}")
