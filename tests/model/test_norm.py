"""RMSNorm and its fused backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_mythos.model.norm import RMSNorm, rms_norm
from reference import elementary


@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("shape", [(1, 3), (4, 7, 16), (2, 3, 5, 33), (700, 64)], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm_and_its_gradients_equal_the_formula(shape: tuple[int, ...], with_weight: bool, size: float) -> None:
    x = (torch.randn(shape) * size + size / 2).requires_grad_()  # a mean far from 0, which LayerNorm would remove
    weight = torch.randn(shape[-1], requires_grad=True) if with_weight else None
    probe = torch.randn(shape)
    inputs = [x] if weight is None else [x, weight]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found = rms_norm(*inputs, *([] if with_weight else [None]), 1e-6)
    expected = elementary.rms_norm(*exact, *([] if with_weight else [None]), 1e-6)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    found_gradients = torch.autograd.grad((found * probe).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * probe.double()).sum(), exact)
    for got, want in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5 * float(want.abs().max()) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_a_row_of_zeros_gives_zeros(grad: bool) -> None:
    x = torch.zeros(2, 8, requires_grad=grad)
    y = rms_norm(x, torch.ones(8), 1e-6)
    assert not y.any()
    if grad:
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert bool(gradient.isfinite().all())


def test_a_strided_input_and_a_strided_gradient_are_fine() -> None:
    base = torch.randn(5, 6, 8, requires_grad=True)
    probe = torch.randn(8, 5, 6).permute(1, 2, 0)
    weight = torch.randn(8)
    (found,) = torch.autograd.grad(rms_norm(base.transpose(0, 1), weight, 1e-6).transpose(0, 1), base, probe)
    (expected,) = torch.autograd.grad(elementary.rms_norm(base, weight, 1e-6), base, probe)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_elementary_form_has_second_derivatives() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert gradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))
        assert torch.autograd.gradgradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))


def test_the_module_starts_with_a_gain_of_one() -> None:
    x = torch.randn(4, 16)
    rms = RMSNorm(16)(x).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("first", [torch.inference_mode, partial(torch.device, "meta")])
def test_a_first_use_under_another_mode_leaves_nothing_behind(
    first: Callable[[], AbstractContextManager[object]], request: pytest.FixtureRequest
) -> None:
    """Whatever is kept between calls must not remember the mode it was made in: each case has an eps of its own."""
    eps = 1e-6 + 1e-8 * len(request.node.name)
    with first(), torch.no_grad():
        rms_norm(torch.ones(2, 8, device="cpu"), None, eps)
    x = torch.randn(2, 8, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, None, eps), elementary.rms_norm(x, None, eps))
    rms_norm(x, None, eps).sum().backward()
