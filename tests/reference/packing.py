"""Packing of documents into rows, one token at a time."""

from __future__ import annotations

IGNORED = -100


def _stream(documents: list[list[int]], end_of_text: int) -> list[tuple[int, bool]]:
    """Every token, and whether something of its own document comes before it."""
    return [(token, place > 0) for document in documents for place, token in enumerate([*document, end_of_text])]


def epoch_rows(
    documents: list[list[int]], end_of_text: int, seq_len: int, offset: int
) -> list[tuple[list[int], list[int]]]:
    """Ids and targets of the rows of an epoch that starts at token `offset` and goes round, in the text's order."""
    stream = _stream(documents, end_of_text)
    rows = []
    for row in range(len(stream) // seq_len):
        ids, targets = [], []
        for place in range(seq_len):
            at = offset + row * seq_len + place
            ids.append(stream[at % len(stream)][0])
            token, predictable = stream[(at + 1) % len(stream)]
            targets.append(token if predictable else IGNORED)
        rows.append((ids, targets))
    return rows


def ordered_rows(documents: list[list[int]], end_of_text: int, seq_len: int) -> list[tuple[list[int], list[int]]]:
    """Ids and targets of all rows from the first token on, the last one filled up with ends of text."""
    stream = _stream(documents, end_of_text)
    rows = []
    for start in range(0, len(stream) - 1, seq_len):
        ids, targets = [], []
        for at in range(start, start + seq_len):
            ids.append(stream[at][0] if at < len(stream) else end_of_text)
            token, predictable = stream[at + 1] if at + 1 < len(stream) else (end_of_text, False)
            targets.append(token if predictable else IGNORED)
        rows.append((ids, targets))
    return rows
