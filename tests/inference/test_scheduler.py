"""Who begins, who waits, and which rows belong to whom: integers only."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.inference.cache import CacheLayout, PagedCache, RowTable
from open_mythos.inference.prefixes import Prefixes
from open_mythos.inference.scheduler import Job, Scheduler
from open_mythos.model.cache_sharing import EveryLoop, FirstLoops, Modulo
from tiny import tiny_config

JOBS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=20)


@settings(deadline=None)
@given(jobs=JOBS, budget=st.integers(1, 40), data=st.data())
def test_everybody_is_served_in_order_and_never_beyond_the_pages(
    jobs: list[tuple[int, int]], budget: int, data: st.DataObject
) -> None:
    scheduler, running, begun = Scheduler(budget, 20), dict[int, Job](), list[int]()
    for request, (positions, pages) in enumerate(jobs):
        scheduler.submit(Job(request, positions, pages))
    while scheduler.busy:
        in_flight = sum(job.positions for job in running.values())
        while (job := scheduler.first_in_line()) is not None:
            if not (scheduler.has_room(job, in_flight) and scheduler.has_pages(job, 0)):
                break
            assert scheduler.begin() == job
            running[job.request] = job
            begun.append(job.request)
            in_flight += job.positions
        assert running, "nobody can begin although nobody is running"
        assert scheduler.reserved == sum(job.pages for job in running.values()) <= 20
        assert in_flight <= budget or len(running) == 1
        ended = data.draw(st.sampled_from(sorted(running)))
        scheduler.end(ended)
        del running[ended]
    assert begun == sorted(begun) == list(range(len(jobs)))
    assert len(scheduler) == scheduler.reserved == 0


def test_a_request_that_waits_can_be_forgotten() -> None:
    scheduler = Scheduler(10, 10)
    for request in range(3):
        scheduler.submit(Job(request, 1, 1))
    scheduler.end(1)
    scheduler.begin()
    assert scheduler.first_in_line() == Job(2, 1, 1)
    scheduler.end(99)
    assert len(scheduler) == 2


@pytest.mark.parametrize(
    ("due", "others", "turn"), [(0, 0, False), (1, 1, False), (2, 1, True), (3, 2, False), (1, 0, True)]
)
def test_a_turn_comes_when_twice_as_many_wait_for_it_as_do_not(due: int, others: int, turn: bool) -> None:
    assert Scheduler(1, 1).takes_turn(due, others) is turn


def _cache(sharing=None, n_bytes: int = 2**18, **changes) -> PagedCache:
    like = torch.zeros(1)
    layout = CacheLayout(tiny_config(**changes), like.element_size(), sharing or EveryLoop())
    return PagedCache(layout, n_bytes, like)


@settings(deadline=None)
@given(
    sharing=st.sampled_from([EveryLoop(), FirstLoops(0), FirstLoops(2), Modulo(2), Modulo(3)]),
    exits=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    outer=st.integers(0, 3),
    recurrent=st.integers(1, 3),
    at_once=st.integers(1, 4),
)
def test_a_query_sees_the_last_entry_of_its_slot(
    sharing, exits: list[int], outer: int, recurrent: int, at_once: int
) -> None:
    """Against a record of who wrote where; no row belongs to two, nor to a loop that was placed and not run."""
    cache = _cache(sharing, prelude_layers=outer, coda_layers=0, recurrent_layers=recurrent)
    table, written = RowTable(cache, len(exits), 6), dict[int, tuple[int, int]]()
    positions = np.arange(len(exits))
    table.place(None, positions)
    loop = 0
    while loop < max(exits):
        active = np.flatnonzero(np.array(exits) > loop)
        lane = active if len(active) > 1 else int(active[0])
        placed = min(at_once, max(exits) - loop)
        end = min(loop + placed, *(ran for ran in exits if ran > loop), max(exits))
        table.place(loop, lane, placed)
        if end < loop + placed:
            table.leave_out(end, lane)
        for t, position in product(range(loop, end), active.tolist()):
            written[int(table.seen(t)[position])] = (position, t)
        loop = end
    for position, ran in enumerate(exits):
        for loop in range(6):
            same_slot = [t for t in range(ran) if sharing.slot(t) == sharing.slot(loop)]
            expected = (position, max(same_slot, default=ran - 1))
            assert written[int(table.seen(loop)[position])] == expected
    taken = [range(row, row + recurrent) for row in written]
    taken += [range(row, row + outer) for row in (table.outer if outer else [])]
    rows = [row for own in taken for row in own]
    assert len(rows) == len(set(rows))
    assert table.bytes_stored == len(rows) * cache.layout.row_bytes
    assert len(table.pages) <= cache.layout.pages_for(len(exits), max(exits))
    table.release()
    assert cache.pages.n_free == cache.pages.n_pages


def test_dropped_positions_make_room_for_others() -> None:
    cache = _cache()
    table = RowTable(cache, 8, 4)
    table.place(None, np.arange(8))
    for loop in range(3):
        table.place(loop, np.arange(8))
    before = table.bytes_stored, len(table.pages)
    table.drop(range(5, 8))
    assert table.bytes_stored < before[0]
    table.place(None, np.arange(5, 8))
    for loop in range(3):
        table.place(loop, np.arange(5, 8))
    assert (table.bytes_stored, len(table.pages)) == before


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=12))
def test_the_longest_known_beginning_is_found(prompts: list[list[int]]) -> None:
    """Against comparing with every prompt, in blocks of 16 and short of the last token."""
    cache = _cache()
    prefixes, known = Prefixes(cache), list[list[int]]()
    for prompt in prompts:
        table = RowTable(cache, len(prompt), 1)
        shared = [sum(1 for _ in _alike(prompt[:-1], other)) // 16 * 16 for other in known]
        adopted = prefixes.adopt(prompt, "settings", table)
        assert adopted == max(shared, default=0)
        assert prefixes.adopt(prompt, "other settings", RowTable(cache, len(prompt), 1)) == 0
        table.place(None, np.arange(adopted, len(prompt)))
        prefixes.add(prompt, "settings", table, 1)
        table.release()
        known.append(prompt)
    while prefixes.evict():
        pass
    assert prefixes.n_pages == 0
    assert cache.pages.n_free == cache.pages.n_pages


def _alike(one: list[int], other: list[int]):
    for a, b in zip(one, other, strict=False):
        if a != b:
            return
        yield a
