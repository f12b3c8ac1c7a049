"""What may be sampled, and how often."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.inference.pages import OutOfPagesError, PageAllocator
from open_mythos.inference.sampling import Asked, Choice, SamplingParams, choose_all, distribution, penalised

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
NOBODY = torch.tensor([], dtype=torch.int64)


def _choose(params: SamplingParams, random: torch.Generator) -> Choice:
    return choose_all(LOGITS.unsqueeze(0), [Asked(params, [], random, 0)])[0]


def test_filters_leave_the_likeliest() -> None:
    full = (LOGITS / 0.5).softmax(-1)
    torch.testing.assert_close(distribution(LOGITS, SamplingParams(temperature=0.5)), full)
    assert distribution(LOGITS, SamplingParams(top_k=2)).count_nonzero() == 2
    assert distribution(LOGITS, SamplingParams(top_p=0.01)).tolist() == [1, 0, 0, 0, 0]
    plain = LOGITS.softmax(-1)
    just_two = float(plain[:2].sum())
    assert distribution(LOGITS, SamplingParams(top_p=just_two - 1e-4)).count_nonzero() == 2
    assert distribution(LOGITS, SamplingParams(top_p=just_two + 1e-4)).count_nonzero() == 3
    assert distribution(LOGITS, SamplingParams(min_p=0.2)).count_nonzero() == 2
    for params in (SamplingParams(top_k=3), SamplingParams(top_p=0.9), SamplingParams(min_p=0.1)):
        assert float(distribution(LOGITS, params).sum()) == pytest.approx(1)


def test_samples_follow_the_distribution() -> None:
    """5000 draws; chi-square with 3 degrees of freedom stays below 21.1 in 9,999 of 10,000 runs."""
    params, random = SamplingParams(top_k=4, temperature=1.3), torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(5000):
        counts[_choose(params, random).token] += 1
    expected = distribution(LOGITS, params) * 5000
    assert counts[4] == 0
    assert float(((counts - expected)[:4] ** 2 / expected[:4]).sum()) < 21.1


def test_the_penalty_makes_what_was_there_less_likely() -> None:
    found = penalised(LOGITS, torch.tensor([0, 3, 3]), 2.0)
    assert found.tolist() == [1.0, 1.0, 0.0, -2.0, -2.0]
    assert penalised(LOGITS, NOBODY, 2.0).tolist() == LOGITS.tolist()


def test_log_probabilities_are_the_models_own() -> None:
    choice = _choose(SamplingParams(temperature=0.0, logprobs=True), torch.Generator())
    assert choice.token == 0
    assert choice.logprob == pytest.approx(float(LOGITS.log_softmax(-1)[0]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("n_loops", 0),
        ("n_loops", "deep"),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("stop_tokens", (-1,)),
        ("seed", -1),
    ],
)
def test_wrong_wishes_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is"):
        SamplingParams(**{field: value})


@settings(max_examples=50, deadline=None, derandomize=True)
@given(moves=st.lists(st.integers(0, 3), max_size=60))
def test_pages_are_never_held_by_two_who_did_not_share(moves: list[int]) -> None:
    pages, held = PageAllocator(5), []
    for move in moves:
        if move == 0 and len(set(held)) == 5:
            with pytest.raises(OutOfPagesError, match="all 5 pages"):
                pages.take()
        elif move == 0:
            page = pages.take()
            assert page not in held
            held.append(page)
        elif held and move == 1:
            pages.share([held[0]])
            held.append(held[0])
        elif held:
            pages.release([held.pop()])
        assert pages.n_free == 5 - len(set(held))
