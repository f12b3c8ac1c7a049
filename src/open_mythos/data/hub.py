"""Datasets of the Hugging Face hub, read over the network as they are needed.

Main entries: `open_hub`, `texts`. Needs the `datasets` package, which is imported here only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from open_mythos.data.text_files import TEXT_COLUMN, check_text

if TYPE_CHECKING:
    from datasets import IterableDataset

HUB_PREFIX = "hf:"


def open_hub(spec: str) -> IterableDataset:
    """The stream of the split `train` of `hf:NAME` or `hf:NAME:CONFIG`; `ValueError` if the hub does not give it."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"data {spec!r} needs datasets: pip install 'open-mythos[train]'") from error

    name, _, config = spec.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise ValueError(f"data is {spec!r}; it must be 'hf:NAME' or 'hf:NAME:CONFIG'")
    try:
        return load_dataset(name, config or None, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # the library's own errors are kinds of these
        raise ValueError(f"data is {spec!r}, which the Hugging Face hub does not give: {error}") from error


def texts(dataset: IterableDataset) -> Iterator[str]:
    """The non-empty documents of a stream; `ValueError` naming the row that has no text."""
    for number, row in enumerate(dataset, 1):
        where = f"row {number} from where the stream was entered"
        if TEXT_COLUMN not in row:
            raise ValueError(f"{where} has no column {TEXT_COLUMN!r}; it has {sorted(row)}")
        text = check_text(row[TEXT_COLUMN], where)
        if text:
            yield text
