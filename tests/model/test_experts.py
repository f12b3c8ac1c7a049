"""The mixture of experts: both ways of computing it against the naive one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from open_mythos.model.experts import MoEFFN
from open_mythos.model.router import Routing
from reference.experts import mixture
from tiny import tiny_config

Compute = Callable[[MoEFFN, Tensor, Routing], Tensor]
WAYS: dict[str, Compute] = {"all experts": MoEFFN._all_experts, "grouped": MoEFFN._grouped}


def _moe(**changes: object) -> MoEFFN:
    moe = MoEFFN(tiny_config(**changes))
    with torch.no_grad():
        for tensor in moe.state_dict().values():
            tensor.copy_(torch.randn_like(tensor) * 0.5)
    return moe


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("n_experts", "top_k", "shared"), [(4, 2, 1), (8, 3, 0), (9, 1, 2), (5, 5, 1)])
def test_output_and_gradients_equal_the_naive_mixture(score: str, n_experts: int, top_k: int, shared: int) -> None:
    moe = _moe(
        n_experts=n_experts, n_experts_per_tok=top_k, n_shared_experts=shared, router_score=score, routed_scale=1.7
    )
    x = torch.randn(13, 16, requires_grad=True)
    weights = list(moe.parameters())
    found = moe(x)
    found_gradients = torch.autograd.grad(found.square().sum(), [x, *weights])
    moe.double()
    exact = x.detach().double().requires_grad_()
    expected = mixture(moe, exact)
    expected_gradients = torch.autograd.grad(expected.square().sum(), [exact, *moe.parameters()])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    # A router's gradients may cancel, all of them where one expert is chosen: rounding is that of what goes into them.
    least = float(expected_gradients[0].abs().max())
    for got, want in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-6 * max(least, 10 * float(want.abs().max())), rtol=1e-4)


@pytest.mark.parametrize("n_tokens", [1, 2, 40])
def test_grouped_equals_all_experts(n_tokens: int) -> None:
    """One token leaves most groups empty."""
    moe = _moe(n_experts=8)
    x = torch.randn(n_tokens, 16, requires_grad=True)
    results = {}
    for name, compute in WAYS.items():
        out = compute(moe, x, moe.route(x))
        results[name] = [out, *torch.autograd.grad(out.square().sum(), [x, moe.router.weight, moe.gate, moe.down])]
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compute", WAYS.values(), ids=WAYS)
def test_all_tokens_on_one_expert_is_fine(compute: Compute) -> None:
    moe = _moe(n_experts=8, n_experts_per_tok=1, n_shared_experts=0)
    moe.router_bias.zero_()[3] = 1000
    x = torch.randn(6, 16)
    out = compute(moe, x, moe.route(x))
    torch.testing.assert_close(out.double(), mixture(moe, x.double()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dim", "expert_dim"), [(16, 6), (12, 8), (20, 10)])
def test_sizes_that_grouped_products_do_not_support_are_fine(dim: int, expert_dim: int) -> None:
    moe = _moe(n_experts=8, dim=dim, expert_dim=expert_dim, n_heads=1, n_kv_heads=1)
    x = torch.randn(5, dim)
    torch.testing.assert_close(moe(x).double(), mixture(moe, x.double()), atol=1e-5, rtol=1e-5)


def test_double_precision_is_fine() -> None:
    moe, x = _moe(n_experts=8).double(), torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(moe(x), mixture(moe, x), atol=1e-5, rtol=1e-5)


def test_a_token_does_not_depend_on_the_others() -> None:
    moe = _moe(n_experts=8)
    x = torch.randn(9, 16)
    torch.testing.assert_close(moe(x)[4:5], moe(x[4:5]), atol=1e-6, rtol=1e-5)


def test_any_leading_shape_is_kept() -> None:
    moe = _moe()
    x = torch.randn(2, 3, 5, 16)
    torch.testing.assert_close(moe(x), moe(x.view(30, 16)).view(2, 3, 5, 16))
