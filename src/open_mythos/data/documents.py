"""Where documents come from: the standard library, a file, or a folder.

Main entry: `open_documents`. Documents are read lazily and anew by every iteration, so a corpus of many files or rows
need not fit in memory.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from open_mythos.data.text_files import TABLE_SUFFIXES, TEXT_SUFFIXES, read_documents, readable

STDLIB = "stdlib"
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"})
_ACCEPTED = (
    "'stdlib' (the source code of Python's standard library), a text file, a .jsonl or .parquet file with a column "
    "'text', a folder of such files, or 'hf:NAME' or 'hf:NAME:CONFIG' (a dataset of the Hugging Face hub)"
)


@dataclass(frozen=True)
class Documents:
    """The documents of some files, in the order of the files."""

    spec: str
    """Where they come from, in the user's word or as an absolute path."""
    files: tuple[Path, ...]

    def __iter__(self) -> Iterator[str]:
        """Every document with at least one character; `ValueError` if there is none, or a file cannot be read."""
        empty = True
        for path in self.files:
            for document in read_documents(path):
                empty = False
                yield document
        if empty:
            raise ValueError(f"data is {self.spec!r}, which is empty; it must hold at least one character")


def file_signature(files: Iterable[Path]) -> list[list[str | int]]:
    """Path, size and time of change (ns) of each file: what tells, without reading, that one has changed."""
    signature: list[list[str | int]] = []
    for path in files:
        with readable(path):
            stat = path.stat()
        signature.append([str(path), stat.st_size, stat.st_mtime_ns])
    return signature


def resolve_spec(spec: str) -> str:
    """The spec with a path made absolute, so that it means the same from everywhere."""
    if not spec:
        raise ValueError(f"data is {spec!r}; it must be {_ACCEPTED}")
    return STDLIB if spec == STDLIB else str(Path(spec).expanduser().resolve())


def is_there(spec: str) -> bool:
    """Whether a resolved spec names something that exists."""
    with readable(Path(spec)):
        return spec == STDLIB or Path(spec).exists()


def open_documents(spec: str) -> Documents:
    """The documents that a spec names; `ValueError` where there are none.

    - `stdlib`: the `.py` files of the running Python's standard library, without installed packages, tests, IDLE,
      lib2to3 and turtledemo; about 11 MB.
    - a `.jsonl` or `.parquet` file: one document per row, from its column `text`.
    - any other file: one document.
    - a folder: the files in it and below with the suffixes `TEXT_SUFFIXES`, `.jsonl` and `.parquet`, sorted by path;
      hidden files and folders are skipped, empty files and rows are no documents.
    """
    if spec == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return Documents(spec, _files(root, frozenset({".py"}), _NOT_STDLIB))
    path = Path(resolve_spec(spec))
    if not is_there(str(path)):
        raise ValueError(f"data is {spec!r}, which does not exist; it must be {_ACCEPTED}")
    if path.is_dir():
        return Documents(str(path), _files(path, TEXT_SUFFIXES | TABLE_SUFFIXES, frozenset()))
    if not path.is_file():
        raise ValueError(f"data is {spec!r}, which is neither file nor folder; it must be {_ACCEPTED}")
    return Documents(str(path), (path,))


def _files(root: Path, suffixes: frozenset[str], skipped: frozenset[str]) -> tuple[Path, ...]:
    """Files below a folder by suffix, sorted by path."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed: {error.strerror}") from error

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in suffixes]
    if not found:
        raise ValueError(f"data is {str(root)!r}, a folder without any file ending in {', '.join(sorted(suffixes))}")
    return tuple(sorted(found))
