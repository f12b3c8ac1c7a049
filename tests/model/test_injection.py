"""A lies strictly between 0 and 1, whatever the optimizer did to the parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos import OpenMythos
from open_mythos.model.injection import LTIInjection
from tiny import random_ids, tiny_config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
hostile = st.floats(width=16, allow_nan=True, allow_infinity=True) | st.sampled_from(
    [0.0, -0.0, 1e4, -1e4, 65504.0, -65504.0, math.inf, -math.inf, math.nan, 6e-8]
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(log_a=st.lists(hostile, min_size=4, max_size=4), log_dt=st.lists(hostile, min_size=4, max_size=4))
def test_a_is_strictly_inside_the_unit_interval(dtype: torch.dtype, log_a: list[float], log_dt: list[float]) -> None:
    injection = LTIInjection(4).to(dtype)
    with torch.no_grad():
        injection.log_a.copy_(torch.tensor(log_a))
        injection.log_dt.copy_(torch.tensor(log_dt))
    A = injection.get_A()
    assert A.dtype == dtype
    assert A.shape == (4,)
    assert A.gt(0).all()
    assert A.lt(1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_survives_the_largest_floats(dtype: torch.dtype, sign: int) -> None:
    injection = LTIInjection(3).to(dtype)
    for parameter in (injection.log_a, injection.log_dt):
        parameter.data.fill_(sign * torch.finfo(dtype).max)
    assert injection.get_A().gt(0).all()
    assert injection.get_A().lt(1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", [1, -1])
def test_a_survives_a_million_times_too_large_a_learning_rate(dtype: torch.dtype, direction: int) -> None:
    config = tiny_config(halting="none")
    model, ids = OpenMythos(config).to(dtype), random_ids(config, 2, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=min(1e6, torch.finfo(dtype).max))
    for _ in range(3):
        optimizer.zero_grad()
        (direction * model(ids, 2).float().square().mean()).backward()
        optimizer.step()
        A = model.recurrent.injection.get_A()
        assert A.gt(0).all()
        assert A.lt(1).all()


def test_a_extreme_in_one_step_comes_back_by_gradient() -> None:
    """A bound by clamping would have no gradient at its ends; after ten times the usual reach this one still has."""
    injection = LTIInjection(2)
    injection.log_dt.data = torch.tensor([10.0, -10.0])
    injection.get_A().sum().backward()
    assert injection.log_dt.grad.abs().gt(0).all()


def test_the_step_is_a_times_state_plus_b_times_input() -> None:
    injection = LTIInjection(5)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_()
    h, e = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    torch.testing.assert_close(injection(h, e), injection.get_A() * h + injection.B * e)


def test_a_fresh_model_decays_by_the_square_root_of_a_fifth() -> None:
    torch.testing.assert_close(LTIInjection(3).get_A(), torch.full((3,), 0.2**0.5), atol=0.01, rtol=0)
