"""The proved bound holds for any weights and input, and the spectrum is that of A."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.analysis.branch_bound import branch_bound
from open_mythos.analysis.stability import spectrum, stability, state_bound
from open_mythos.config import MythosConfig
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_tiny
from tiny import random_ids, tiny_config, tiny_model

VARIANTS: list[dict[str, Any]] = [
    {"n_experts": 0},
    {"attn_type": "mla", "update_scale": 4.0},
    {"n_experts": 8, "recurrent_layers": 2},
    {"router_score": "sigmoid", "routed_scale": 2.5, "state_init": "input"},
    {"attention_sink": False, "qk_norm": False, "lora_rank": 0, "loop_embedding": False},
]


def lively_model(config: MythosConfig, seed: int, scale: float) -> OpenMythos:
    """Normally distributed values of this size added to every parameter."""
    torch.manual_seed(seed)
    model = OpenMythos(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


@settings(max_examples=25, deadline=None)
@given(variant=st.sampled_from(VARIANTS), seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_no_state_exceeds_the_bound(variant: dict[str, Any], seed: int, scale: float) -> None:
    """Weights of any size; the slack of 1e-4 is float32 rounding."""
    config = tiny_config(**variant)
    report = stability(lively_model(config, seed, scale), random_ids(config, 2, 7, seed), 6)
    assert [norm.loop for norm in report.loops] == list(range(7))
    for norm in report.loops:
        assert norm.mean <= norm.largest * (1 + 1e-6)
        assert norm.largest <= norm.bound * (1 + 1e-4)
        assert norm.tightness <= 1 + 1e-4


@settings(max_examples=15, deadline=None)
@given(variant=st.sampled_from(VARIANTS), seed=st.integers(0, 10_000))
def test_branches_stay_within_their_bound_wherever_the_state_is(variant: dict[str, Any], seed: int) -> None:
    """F alone, from states of very different sizes."""
    config = tiny_config(**variant)
    model = lively_model(config, seed, 0.3)
    bound = branch_bound(model.recurrent)
    e = torch.zeros(1, 5, 16)
    for size in (1e-3, 1.0, 1e3):
        h = torch.randn(1, 5, 16) * size
        with torch.no_grad():
            u = model.recurrent.injection(h, e)
            if model.recurrent.loop_embedding is not None:
                u = u + model.recurrent.loop_embedding(2)
            added = model.loop_step(h, e, 2) - u
        assert bool((added.double().abs() <= bound + 1e-5 * (1 + size)).all())


def test_the_bound_is_attained_by_a_state_that_only_decays() -> None:
    """With no branches and no input the state is exactly `A^t h`, and so is the bound: it is not loose by a factor."""
    model = OpenMythos(mythos_tiny().replace(n_experts=0, loop_embedding=False)).eval()
    with torch.no_grad():
        for parameter in model.recurrent.parameters():
            parameter.zero_()
        h, e = torch.randn(1, 3, 64), torch.zeros(1, 3, 64)
        bounds = state_bound(model, e, h, 3)
        for t in range(3):
            h = model.loop_step(h, e, t)
    torch.testing.assert_close(bounds[3], h.abs().amax((0, 1)).double(), rtol=1e-5, atol=0)


def test_the_spectrum_is_that_of_a() -> None:
    model = tiny_model(mythos_tiny())
    a = model.recurrent.injection.get_A().detach()
    found = spectrum(model)
    assert len(found.values) == 64
    assert found.rho == pytest.approx(float(a.max()))
    assert found.smallest == pytest.approx(float(a.min()))
    assert found.mean == pytest.approx(float(a.mean()))
    assert 0 < found.smallest <= found.rho < 1


def test_the_bounds_limit_is_where_its_sequence_goes() -> None:
    report = stability(OpenMythos(mythos_tiny()), random_ids(mythos_tiny(), 1, 4), 30)
    assert report.loops[-1].bound == pytest.approx(report.limit, rel=1e-3)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = OpenMythos(mythos_tiny()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stability(model, random_ids(mythos_tiny(), 1, 4), 2)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="n_loops is 0; it must be at least 1"):
        stability(model, random_ids(mythos_tiny(), 1, 4), 0)
