"""Prompts that have been computed, so that others that begin alike need not be.

Main entry: `Prefixes`. It keeps rows, no tensors: the cache's pages are shared, not copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from open_mythos.inference.cache import PagedCache, RowTable

_BLOCK = 16
"""Prefixes are found by whole blocks of tokens."""


@dataclass(frozen=True)
class _Entry:
    tokens: tuple[int, ...]
    settings: Hashable
    table: RowTable
    keys: list[int]
    """Of every beginning of whole blocks."""


class Prefixes:
    """The prompts used last, found by their beginnings; the oldest make room when pages are wanted."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._by_key: dict[int, int] = {}
        self._added = self.n_pages = 0

    def add(self, tokens: Sequence[int], settings: Hashable, table: RowTable, n_loops: int) -> None:
        """Keep a prompt whose rows are complete; `settings` are what else its numbers depend on."""
        keys = _keys(tokens, settings)
        known, n_blocks = self._find(tokens, settings, keys)
        if n_blocks == len(keys):
            return
        if known is not None and n_blocks == len(self._entries[known].keys):
            self._remove(known)  # all of it is the beginning of this one
        own = RowTable(self._cache, len(tokens), n_loops)
        own.adopt(table, len(tokens))
        self._entries[self._added] = _Entry(tuple(tokens), settings, own, keys)
        self._by_key.update(dict.fromkeys(keys, self._added))
        self._added += 1
        self.n_pages += len(own.pages)

    def adopt(self, tokens: Sequence[int], settings: Hashable, table: RowTable) -> int:
        """Give `table` the rows of the longest known beginning of `tokens`, short of the last; returns its length."""
        known, n_blocks = self._find(tokens, settings, _keys(tokens[:-1], settings))
        if known is None:
            return 0
        self._entries.move_to_end(known)
        table.adopt(self._entries[known].table, n_blocks * _BLOCK)
        return n_blocks * _BLOCK

    def evict(self) -> bool:
        """Let go of the prompt used longest ago; False if there is none."""
        if not self._entries:
            return False
        self._remove(next(iter(self._entries)))
        return True

    def _remove(self, index: int) -> None:
        entry = self._entries.pop(index)
        self.n_pages -= len(entry.table.pages)
        entry.table.release()
        for key in entry.keys:
            if self._by_key.get(key) == index:
                del self._by_key[key]

    def _find(self, tokens: Sequence[int], settings: Hashable, keys: list[int]) -> tuple[int | None, int]:
        """Which entry begins with as many blocks of the tokens as possible, and how many those are."""
        for n_blocks in range(len(keys), 0, -1):
            index, n = self._by_key.get(keys[n_blocks - 1]), n_blocks * _BLOCK
            if index is None:
                continue
            entry = self._entries[index]
            if entry.settings == settings and entry.tokens[:n] == tuple(tokens[:n]):
                return index, n_blocks
        return None, 0


def _keys(tokens: Sequence[int], settings: Hashable) -> list[int]:
    """A hash of every beginning of whole blocks, each made of the one before and a block."""
    keys, key = list[int](), hash(settings)
    for end in range(_BLOCK, len(tokens) + 1, _BLOCK):
        key = hash((key, tuple(tokens[end - _BLOCK : end])))
        keys.append(key)
    return keys
