"""Which rows of the cache belong to whom: plain integers, no tensors.

Main entries: `PageAllocator`, `OutOfPagesError`.
"""

from __future__ import annotations

from collections.abc import Iterable


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Pages 0 to `n_pages - 1`, each free or held once or more often; a page is free again when all let go of it."""

    def __init__(self, n_pages: int) -> None:
        if n_pages < 1:
            raise ValueError(f"n_pages is {n_pages}; it must be at least 1")
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))
        self._holders = [0] * n_pages

    @property
    def n_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free page, held once."""
        if not self._free:
            raise OutOfPagesError(f"all {self.n_pages} pages are in use")
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages that are held already once more."""
        for page in pages:
            assert self._holders[page] > 0, "a free page cannot be shared"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Let go of pages."""
        for page in pages:
            assert self._holders[page] > 0, "a page was let go of twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
