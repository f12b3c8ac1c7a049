"""What the engine does next: plain integers, no tensors.

Main entry: `Scheduler`.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Job(NamedTuple):
    """What a request needs."""

    request: int
    positions: int
    """Of its prompt."""
    pages: int
    """At most, until it ends."""


class Scheduler:
    """Begins requests in the order of arrival, and chooses between another loop and the next tokens."""

    def __init__(self, max_batch_tokens: int, n_pages: int) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}; it must be at least 1")
        self.max_batch_tokens, self.n_pages = max_batch_tokens, n_pages
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}

    @property
    def reserved(self) -> int:
        """Pages set aside for requests that have begun."""
        return sum(job.pages for job in self._running.values())

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + len(self._running)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return len(self) > 0

    def submit(self, job: Job) -> None:
        """Wait in line."""
        self._waiting.append(job)

    def first_in_line(self) -> Job | None:
        """Who begins next."""
        return self._waiting[0] if self._waiting else None

    def has_room(self, job: Job, in_flight: int) -> bool:
        """Whether its prompt fits beside the positions being computed; one that is too long waits to be alone."""
        return in_flight + job.positions <= self.max_batch_tokens or not self._running

    def has_pages(self, job: Job, kept: int) -> bool:
        """Whether there are certainly enough pages for it, `kept` of them being held by nobody who is running."""
        return self.reserved + kept + job.pages <= self.n_pages

    def begin(self) -> Job:
        """Take the first in line."""
        job = self._waiting.popleft()
        self._running[job.request] = job
        return job

    def end(self, request: int) -> None:
        """Forget a request, whether it has begun or not."""
        if self._running.pop(request, None) is None:
            self._waiting = deque(job for job in self._waiting if job.request != request)

    def takes_turn(self, due: int, others: int) -> bool:
        """Whether the `due` requests get their next tokens now, or the `others`, still looping, another loop first.

        Waiting until the due are twice as many keeps requests of equal depth together, which then share prelude and
        coda.
        """
        return due > 0 and due >= 2 * others
