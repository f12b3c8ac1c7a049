"""Derivatives beyond the first backward: they exist inside `sdpa_kernel(MATH)`, and the first ones agree everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_mythos.model.mythos import OpenMythos
from tiny import random_ids, tiny_config, tiny_model

SEQ = 50  # long enough for the flash kernel where it is allowed


def _problem(
    attn_type: str, dtype: torch.dtype = torch.float64, n_experts: int = 8
) -> tuple[OpenMythos, Callable[[Tensor], Tensor], Tensor]:
    """A model, one of its loops as a function of the state, and a state."""
    config = tiny_config(attn_type, n_experts=n_experts, window=5)
    model = tiny_model(config).to(dtype)
    e = model.encode(random_ids(config, 1, SEQ)).detach()
    return model, lambda h: model.loop_step(h, e, 1), torch.randn_like(e)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_jvp_of_a_loop_matches_finite_differences(attn_type: str) -> None:
    """Without experts: their router works in float32 whatever the model's precision, too coarse for differences."""
    _, loop, h = _problem(attn_type, n_experts=0)
    tangent = torch.randn_like(h)
    with sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(loop, (h,), (tangent,))
        step = 1e-6
        with torch.no_grad():
            expected = (loop(h + step * tangent) - loop(h - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_jvp_works_in_float32(attn_type: str) -> None:
    """What the stability analysis runs; the fused float32 norm has no forward mode."""
    _, loop, h = _problem(attn_type, torch.float32)
    with sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(loop, (h,), (torch.randn_like(h),))
    assert bool(found.isfinite().all())
    assert float(found.detach().abs().max()) > 0


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_double_backward_of_a_loop_is_the_transpose_of_jvp(attn_type: str) -> None:
    """Differentiating `J^T u` by u gives `J v`, which is how a Jacobian product is got from two reverse passes."""
    _, loop, h = _problem(attn_type)
    h.requires_grad_()
    tangent, dual = torch.randn_like(h), torch.zeros_like(h).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (pulled,) = torch.autograd.grad(loop(h), h, dual, create_graph=True)
        (found,) = torch.autograd.grad(pulled, dual, tangent)
        _, expected = torch.func.jvp(loop, (h.detach(),), (tangent,))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_double_backward_of_the_whole_model_is_finite(attn_type: str) -> None:
    config = tiny_config(attn_type)
    model, ids = tiny_model(config), random_ids(config, 2, 6)
    with sdpa_kernel(SDPBackend.MATH):
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(model(ids, 3).square().mean(), parameters, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in parameters)


@pytest.mark.parametrize("halting", ["act", "none"])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("n_experts", [4, 8])
def test_fused_gradients_equal_elementary_ones(attn_type: str, n_experts: int, halting: str) -> None:
    """The whole model, every parameter: fused norm, flash attention and grouped experts against plain autograd."""
    config = tiny_config(
        attn_type, n_experts=n_experts, halting=halting, window=6, recurrent_layers=2, state_init="input"
    )
    model, ids = tiny_model(config).train(), random_ids(config, 2, SEQ)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients() -> list[Tensor]:
        for block in model.recurrent.blocks:
            block.ffn.balance_rate = 0.0
        out = model(ids, torch.tensor([3, 2]), full_output=True)
        loss = out.logits.square().mean() + 0.1 * out.ponder_cost
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    fused = gradients()
    with sdpa_kernel(SDPBackend.MATH):
        elementary = gradients()
    for name, one, other in zip(names, fused, elementary, strict=True):
        assert one is not None, f"{name} has no gradient"
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, atol=1e-5 * scale, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
