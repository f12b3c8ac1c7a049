"""Depth plans draw what they say, from their generator alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.training.depth import (
    PLANS,
    Asked,
    Difficulty,
    Fixed,
    LogNormalPoisson,
    Poisson,
    Progressive,
    Ramp,
    Uniform,
    plan_from_dict,
    plan_to_dict,
)

EVERY = [
    Fixed(loops=5, grad_loops=2),
    Uniform(least=2, most=9),
    Poisson(mean=4),
    LogNormalPoisson(mean=4, sigma=0.7),
    Difficulty(factor=1.5, extra=2),
    Progressive(most=7, share=0.5),
    Ramp(plan=Poisson(mean=8, grad_loops=3), share=0.5),
]


def _draw(plan, batch=2000, progress=0.9, seed=0, difficulty=3):
    asked = Asked(batch, progress, torch.full((batch,), difficulty))
    return plan.draw(asked, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("plan", EVERY, ids=lambda plan: plan.name)
def test_draws_are_positive_integers_and_repeatable(plan) -> None:
    before = torch.get_rng_state()
    first, again, other = _draw(plan), _draw(plan), _draw(plan, seed=1)
    assert first.n_loops.shape == (2000,)
    assert first.n_loops.dtype == torch.int32
    assert first.n_loops.device.type == "cpu"
    assert bool((first.n_loops >= 1).all())
    assert torch.equal(first.n_loops, again.n_loops)
    assert first.grad_loops == again.grad_loops
    assert plan.name == "fixed" or not torch.equal(first.n_loops, other.n_loops) or plan.name == "progressive"
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("plan", EVERY, ids=lambda plan: plan.name)
def test_a_plan_survives_being_written_down(plan) -> None:
    assert plan_from_dict(plan_to_dict(plan)) == plan


def test_every_plan_is_known_by_name() -> None:
    assert {plan.name for plan in EVERY} == set(PLANS)


@pytest.mark.parametrize("plan", [Poisson(mean=6, most=100), LogNormalPoisson(mean=6, sigma=0.5, most=1000)])
def test_the_mean_is_the_mean(plan) -> None:
    """Of 20,000 draws; five standard errors are 0.08 for the Poisson and 0.12 for the heavier tail."""
    loops = _draw(plan, batch=20_000).n_loops.double()
    assert abs(float(loops.mean()) - 6) < 0.13


def test_a_log_normal_rate_has_the_heavier_tail() -> None:
    light, heavy = _draw(Poisson(mean=8, most=99)).n_loops, _draw(LogNormalPoisson(mean=8, sigma=0.8, most=99)).n_loops
    assert heavy.double().var() > 2 * light.double().var()


def test_no_sequence_exceeds_the_most() -> None:
    assert int(_draw(LogNormalPoisson(mean=4, sigma=1.5, most=9)).n_loops.max()) == 9
    assert int(_draw(LogNormalPoisson(mean=4, sigma=1.5)).n_loops.max()) == 16


@pytest.mark.parametrize("plan", [Uniform(per_sequence=False), Poisson(per_sequence=False)])
def test_a_plan_per_batch_gives_all_sequences_one_depth(plan) -> None:
    assert all(len(set(_draw(plan, batch=5, seed=seed).n_loops.tolist())) == 1 for seed in range(10))
    assert len({int(_draw(plan, batch=5, seed=seed).n_loops[0]) for seed in range(40)}) > 3


def test_uniform_covers_its_range_evenly() -> None:
    counts = torch.bincount(_draw(Uniform(least=2, most=5), batch=8000).n_loops.long())
    assert counts[:2].tolist() == [0, 0]
    assert int(counts[2:].min()) > 1800


def test_difficulty_is_what_the_data_says() -> None:
    asked = Asked(3, 0.0, torch.tensor([1, 2, 5]))
    assert Difficulty().draw(asked, torch.Generator()).n_loops.tolist() == [1, 2, 5]
    assert Difficulty(factor=1.5).draw(asked, torch.Generator()).n_loops.tolist() == [2, 3, 8]
    assert Difficulty(most=4).draw(asked, torch.Generator()).n_loops.tolist() == [1, 2, 4]
    plan = Difficulty(extra=3, most=4)
    drawn = torch.stack([plan.draw(asked, torch.Generator().manual_seed(seed)).n_loops for seed in range(80)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [[1, 2, 3, 4], [2, 3, 4], [4]]
    with pytest.raises(ValueError, match="text does not"):
        Difficulty().draw(Asked(3, 0.0, None), torch.Generator())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), most=st.integers(1, 12))
def test_progressive_never_exceeds_its_most_and_always_learns(seed: int, most: int) -> None:
    drawn = _draw(Progressive(most=most), batch=2, seed=seed)
    assert 1 <= drawn.grad_loops <= int(drawn.n_loops[0]) <= most
    full = _draw(Progressive(most=most, share=0.0), batch=2, seed=seed)
    assert (int(full.n_loops[0]), full.grad_loops) == (most, most)


def test_a_ramp_rises_to_its_plan() -> None:
    ramp = Ramp(plan=Poisson(mean=12, most=99), start=1, share=0.5)
    means = [float(_draw(ramp, progress=progress).n_loops.double().mean()) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert means[0] == 1
    assert 6 < means[1] < 7
    assert abs(means[2] - 12) < 0.5
    assert abs(means[3] - 12) < 0.5
    assert ramp.typical == 12


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"name": "poison"}, "depth plan is"),
        ({"name": "poisson", "means": 3}, "has no field 'means'"),
        ({"name": "poisson", "mean": 0.5}, "mean is 0.5"),
        ({"name": "uniform", "least": 4, "most": 2}, "least is 4"),
        ({"name": "fixed", "loops": "many"}, "loops is 'many'"),
        ({"name": "ramp", "plan": {"name": "fixed"}}, "plan with a mean"),
        ({"name": "progressive", "share": 2}, "share is 2"),
        ({"name": "poisson", "grad_loops": 2.5}, "grad_loops is 2.5; it must be an integer of at least 1"),
        ({"name": "uniform", "most": 2.5}, "most is 2.5"),
        ({"name": "poisson", "mean": float("inf")}, "mean is inf"),
        ({"name": "poisson", "per_sequence": "no"}, "per_sequence is 'no'"),
        ({"name": "log_normal_poisson", "sigma": "wide"}, "sigma is 'wide'"),
        ({"name": "difficulty", "extra": 0.5}, "extra is 0.5"),
        ({"name": "difficulty", "most": 0}, "most is 0"),
        ({"name": "ramp"}, "depth plan is None"),
        ({"name": ["poisson"]}, "depth plan is"),
        ("poisson", "depth plan is 'poisson'"),
    ],
)
def test_a_wrong_plan_is_refused_by_name(data, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_from_dict(data)


def test_typical_depths() -> None:
    assert [plan.typical for plan in EVERY[:4]] == [5, 5.5, 4, 4]
    assert math.isnan(Difficulty().typical)
