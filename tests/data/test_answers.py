"""The answers of every task are those of a naive reading of its prompt, and follow from what precedes the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch

from open_mythos.data.addition import Addition
from open_mythos.data.batch import IGNORED
from open_mythos.data.dyck import Dyck
from open_mythos.data.p_hop import PHop
from open_mythos.data.parity import Parity
from open_mythos.data.reverse import Reverse
from open_mythos.data.sums import RunningSums
from open_mythos.data.tasks import TASKS, Task
from open_mythos.data.walk import Walk

Answer = Callable[[Sequence[int]], int | None]
"""What the last of some tokens asks for, from these tokens alone; None where it asks nothing."""


def sum_so_far(modulus: int) -> Answer:
    """The digits are one less than the tokens."""
    return lambda tokens: 1 + sum(token - 1 for token in tokens) % modulus


def digit_of_sum(tokens: Sequence[int]) -> int | None:
    """Python adds the numbers as far as they are known."""
    at_end = tokens[-1] == 3
    if not at_end and len(tokens) % 2:
        return None
    digits = [token - 1 for token in tokens if token != 3]
    a, b = (sum(digit << place for place, digit in enumerate(digits[start::2])) for start in (0, 1))
    place = len(digits) // 2 - (0 if at_end else 1)
    return 1 + ((a + b) >> place & 1)


def validity(tokens: Sequence[int]) -> int:
    """Pairs "()" are taken out until there are none."""
    left = "".join(" ()"[token] for token in tokens)
    while "()" in left:
        left = left.replace("()", "")
    return 3 if ")" in left else 2 if left else 1


def last_symbol_waiting(tokens: Sequence[int]) -> int | None:
    """Symbols pile up, and every blank takes the topmost away."""
    pile: list[int] = []
    taken = None
    for token in tokens:
        taken = None if token else pile.pop()
        if token:
            pile.append(token)
    return taken


def end_of_walk(nodes: int) -> Answer:
    """Follow the edges, "leaving a" being so many more than "at a", from a token that is not an edge's second."""

    def answer(tokens: Sequence[int]) -> int | None:
        leads = {one - nodes: other for one, other in pairwise(tokens) if one >= nodes}
        if tokens[-1] >= nodes or (len(tokens) > 1 and tokens[-2] >= nodes):
            return None
        at = tokens[-1]
        while leads.get(at, at) != at:
            at = leads[at]
        return at

    return answer


def end_of_hops(tokens: Sequence[int]) -> int | None:
    """At the end of a pair: find the last occurrence before and go to the token after it, until there is none."""
    if len(tokens) % 2:
        return None
    at = len(tokens) - 1
    while tokens[at] in tokens[:at]:
        at = max(place for place in range(at) if tokens[place] == tokens[at]) + 1
    return tokens[at]


def naive(name: str, length: int) -> tuple[Task, Answer]:
    """A task and its naive answer for problems of a length."""
    return {
        "addition": (Addition(), digit_of_sum),
        "dyck": (Dyck(), validity),
        "p_hop": (PHop(names=42), end_of_hops),
        "parity": (Parity(), sum_so_far(2)),
        "reverse": (Reverse(), last_symbol_waiting),
        "sums": (RunningSums(), sum_so_far(3)),
        "walk": (Walk(nodes=40), end_of_walk(40)),
    }[name]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 19])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_answers_follow_from_what_precedes_them(name: str, length: int) -> None:
    task, answer = naive(name, length)
    ids, targets, difficulty = task.batch(16, length, torch.Generator().manual_seed(length))
    assert ids.shape == targets.shape == (16, task.positions(length))
    assert difficulty is not None
    assert difficulty.tolist() == [max(1, task.loops(length))] * 16
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        found = [answer(row[: end + 1]) for end in range(len(row))]
        assert [IGNORED if one is None else one for one in found] == wanted
        assert any(one is not None for one in found)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tokens_and_answers_lie_in_the_vocabulary_and_vary(name: str) -> None:
    task = TASKS[name]()
    ids, targets, _ = task.batch(64, 7, torch.Generator().manual_seed(1))
    asked = targets[targets != IGNORED]
    assert ids.min() >= 0
    assert asked.min() >= 0
    assert max(int(ids.max()), int(asked.max())) < task.vocab_size
    assert asked.bincount().max() < 0.8 * asked.numel()


def test_examples_by_hand() -> None:
    """7 + 1 = 8 carries through all digits; 0 > 1, 2 > 2, 1 > 2 ends at 2."""
    sevens = [2, 2, 2, 1, 2, 1, 3]
    assert [digit_of_sum(sevens[:end]) for end in range(1, 8)] == [None, 1, None, 1, None, 1, 2]
    assert [validity(text) for text in ([1], [1, 2], [1, 2, 2], [1, 2, 2, 1])] == [2, 1, 3, 3]
    assert [end_of_walk(3)([3, 1, 5, 2, 4, 2, 0, 1, 2][:end]) for end in range(1, 10)] == [None] * 6 + [2, 2, 2]
    assert end_of_hops([7, 5, 9, 7, 8, 9]) == 5


def test_carries_run_far_in_many_sums() -> None:
    """A carry may run through 8 of 16 digits in about one of 50 uniform sums; here in a quarter, 8 deviations apart."""
    ids, *_ = Addition().batch(512, 16, torch.Generator().manual_seed(0))
    hands_on = ids[:, :-1:2] != ids[:, 1::2]
    runs = sum(any(all(row[start : start + 8]) for start in range(9)) for row in hands_on.tolist())
    assert runs > 512 / 4


def test_brackets_are_balanced_open_and_broken_at_any_length() -> None:
    for length in (6, 40):
        last = Dyck().batch(512, length, torch.Generator().manual_seed(0)).targets[:, -1]
        assert last.bincount(minlength=4)[1:].min() > 40


@pytest.mark.parametrize(("task", "most"), [(PHop(), 10), (Walk(), 10)])
def test_more_hops_than_there_are_names_for_are_refused(task: Task, most: int) -> None:
    task.batch(2, most, torch.Generator())
    with pytest.raises(ValueError, match=f"length is {most + 1}; it must be at most {most}, for two"):
        task.batch(2, most + 1, torch.Generator())


@pytest.mark.parametrize("task", [PHop(), Walk()])
@pytest.mark.parametrize("hops", [1, 4, 8])
def test_chains_have_as_many_hops_as_the_length_says(task: Task, hops: int) -> None:
    """Every answer is asked for after 0, 1, ..., and that many hops."""
    for row in task.batch(8, hops, torch.Generator().manual_seed(0)).targets.tolist():
        ends = [end for end in row if end != IGNORED]
        assert {ends.count(end) for end in ends} == {hops + 1}
        assert len(set(ends)) >= 2


def test_no_token_of_p_hop_is_there_three_times() -> None:
    """So the last occurrence before is the only one."""
    for row in PHop().batch(16, 3, torch.Generator().manual_seed(0)).ids.tolist():
        assert max(row.count(token) for token in row) == 2
        assert all(one != other for one, other in pairwise(row))


@pytest.mark.parametrize("waiting", [1, 3, 20])
def test_few_symbols_wait_to_be_said_backwards_and_none_is_left(waiting: int) -> None:
    ids = Reverse(waiting=waiting).batch(200, 12, torch.Generator().manual_seed(0)).ids
    piles = torch.where(ids > 0, 1, -1).cumsum(1)
    assert int(piles.min()) == 0
    assert int(piles.max()) == min(waiting, 12)
    assert not piles[:, -1].any()
