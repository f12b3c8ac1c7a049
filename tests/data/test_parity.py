"""The answers of running sums, parity among them, are right."""

import pytest
import torch

from open_mythos.data.parity import Parity
from open_mythos.data.sums import RunningSums


def naive_sums(digits: list[int], modulus: int) -> list[int]:
    """After every digit the sum so far, taken down by the modulus whenever it gets there, one by one."""
    found, total = [], 0
    for digit in digits:
        for _ in range(digit):
            total += 1
            if total == modulus:
                total = 0
        found.append(total)
    return found


@pytest.mark.parametrize("task", [Parity(), RunningSums(), RunningSums(modulus=7)])
@pytest.mark.parametrize("length", [1, 2, 7, 96])
def test_the_answers_are_those_of_a_naive_count(task: RunningSums, length: int) -> None:
    ids, targets, _ = task.batch(32, length, torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (32, length)
    for string, answers in zip(ids.tolist(), targets.tolist(), strict=True):
        assert [answer - 1 for answer in answers] == naive_sums([token - 1 for token in string], task.modulus)


def test_strings_by_hand() -> None:
    assert naive_sums([0, 1, 1, 1, 0], 2) == [0, 1, 0, 1, 1]
    assert naive_sums([2, 2, 0, 1, 1], 3) == [2, 1, 1, 2, 0]


def test_ids_and_answers_are_tokens_of_the_vocabulary_and_both_are_frequent() -> None:
    """Of 6400 fair bits, fewer than 2900 ones or zeros would be seven standard deviations away."""
    task = Parity(skewed=0.0)
    ids, targets, _ = task.batch(64, 100, torch.Generator().manual_seed(1))
    for tokens in (ids, targets):
        counts = tokens.flatten().bincount(minlength=task.vocab_size)
        assert counts[0] == 0
        assert counts[1:].min() > 2900
        assert len(counts) == task.vocab_size == 3


@pytest.mark.parametrize(("skewed", "low", "high"), [(0.0, 0.0, 0.005), (0.5, 0.06, 0.10), (1.0, 0.13, 0.18)])
def test_skewed_strings_have_long_runs(skewed: float, low: float, high: float) -> None:
    """12 bits are all the same in 2 of 2**12 fair strings; with a share of ones of their own, in 2 of 13."""
    ids = Parity(skewed=skewed).batch(4000, 12, torch.Generator().manual_seed(2)).ids
    assert low <= float((ids == ids[:, :1]).all(1).float().mean()) <= high


def test_a_generator_makes_strings_repeatable_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (Parity().batch(4, 24, torch.Generator().manual_seed(seed))[0] for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_loops_grow_with_the_length() -> None:
    assert [Parity().loops(length) for length in (1, 4, 5, 8, 16, 17)] == [1, 1, 2, 2, 4, 5]
    assert Parity(digits_per_loop=1).loops(7) == 7
