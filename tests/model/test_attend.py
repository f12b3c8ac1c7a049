"""Every attention kernel against the naive one, forward and gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from open_mythos.model.attend import Kernel, attend
from open_mythos.model.mask import AttentionMask
from reference.attention import attention

KERNELS: tuple[Kernel, ...] = ("explicit", "flash_cpu", "sdpa")


class Shape(NamedTuple):
    """One attention problem; `keys` above `queries` means that earlier positions are cached."""

    queries: int
    keys: int
    heads: int = 4
    key_heads: int = 2
    width: int = 8
    value_width: int = 8
    window: int | None = None
    batch: int = 2


SHAPES = {
    "square": Shape(7, 7),
    "one query": Shape(1, 9),
    "one position": Shape(1, 1),
    "chunk": Shape(4, 11),
    "one key head": Shape(5, 5, heads=3, key_heads=1),
    "as many key heads as heads": Shape(5, 5, heads=3, key_heads=3),
    "odd widths": Shape(5, 5, width=5, value_width=3),
    "wide values": Shape(5, 5, width=4, value_width=12),
    "window": Shape(9, 9, window=4),
    "window of one": Shape(6, 6, window=1),
    "window in a chunk": Shape(4, 13, window=3),
    "window wider than the keys": Shape(5, 5, window=40),
    "window with one query": Shape(1, 12, window=5),
    "cut into runs": Shape(150, 150, heads=2, key_heads=1, window=6, batch=1),
    "cut into runs after a past": Shape(129, 190, heads=2, window=9, value_width=5, batch=1),
    "long": Shape(50, 53, heads=2, key_heads=1, window=6, batch=1),
}


def _inputs(shape: Shape, sink: bool) -> list[Tensor]:
    q = torch.randn(shape.batch, shape.queries, shape.heads, shape.width)
    k = torch.randn(shape.batch, shape.keys, shape.key_heads, shape.width)
    v = torch.randn(shape.batch, shape.keys, shape.key_heads, shape.value_width)
    return [x.requires_grad_() for x in ([q, k, v, torch.randn(shape.heads)] if sink else [q, k, v])]


def _mask(shape: Shape, dtype: torch.dtype = torch.float32) -> AttentionMask:
    return AttentionMask(shape.queries, shape.keys, shape.window, torch.device("cpu"), dtype)


def _naive(shape: Shape, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> Tensor:
    return torch.stack(
        [attention(*one, scale=0.3, window=shape.window, sink=sink) for one in zip(q, k, v, strict=True)]
    )


def _output_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * probe).sum(), inputs)]


@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no sink"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_and_its_gradients_equal_the_naive_attention(name: str, kernel: Kernel, sink: bool) -> None:
    shape = SHAPES[name]
    inputs = _inputs(shape, sink)

    def fast(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        return attend(q, k, v, _mask(shape), scale=0.3, sink=s, kernel=kernel)

    found = _output_and_gradients(fast, inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = _output_and_gradients(lambda *tensors: _naive(shape, *tensors), exact)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 47, 48, 64])
def test_the_kernel_that_is_picked_equals_the_explicit_one(queries: int) -> None:
    """Both sides of the length at which the choice changes."""
    shape = Shape(queries, queries + 3, window=9)
    inputs = _inputs(shape, sink=True)
    *qkv, sink = inputs
    picked = attend(*qkv, _mask(shape), scale=0.3, sink=sink)
    explicit = attend(*qkv, _mask(shape), scale=0.3, sink=sink, kernel="explicit")
    torch.testing.assert_close(picked, explicit, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_very_low_sink_takes_nothing_and_a_very_high_one_everything(kernel: Kernel) -> None:
    shape = SHAPES["square"]
    q, k, v = (x.detach() for x in _inputs(shape, sink=False))

    def run(sink: Tensor | None) -> Tensor:
        return attend(q, k, v, _mask(shape), scale=0.3, sink=sink, kernel=kernel)

    torch.testing.assert_close(run(torch.full((4,), -1e4)), run(None))
    assert float(run(torch.full((4,), 1e4)).abs().max()) == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_stay_finite(kernel: Kernel) -> None:
    shape = SHAPES["square"]
    inputs = [x.detach().mul(100).requires_grad_() for x in _inputs(shape, sink=True)]

    def fast(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        return attend(q, k, v, _mask(shape), scale=1.0, sink=sink, kernel=kernel)

    assert all(bool(x.isfinite().all()) for x in _output_and_gradients(fast, inputs))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_accept_half_precision(kernel: Kernel, dtype: torch.dtype) -> None:
    shape = SHAPES["window"]
    exact = [x.detach() for x in _inputs(shape, sink=True)]
    expected = _naive(shape, *exact)
    q, k, v, sink = (x.to(dtype) for x in exact)
    found = attend(q, k, v, _mask(shape, dtype), scale=0.3, sink=sink, kernel=kernel)
    assert found.dtype == dtype
    assert float((found.float() - expected).abs().max()) < 0.05  # values are of size 1, bfloat16 keeps 8 bits


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_sink_is_that_of_gpt_oss(kernel: Kernel) -> None:
    shape = Shape(6, 6)
    q, k, v, sink = (x.detach() for x in _inputs(shape, sink=True))
    theirs = SimpleNamespace(num_key_value_groups=2, sinks=sink, training=False)
    causal = torch.full((6, 6), float("-inf")).triu(1)
    expected, _ = eager_attention_forward(
        theirs, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal.expand(2, 1, 6, 6), scaling=0.3
    )
    found = attend(q, k, v, _mask(shape), scale=0.3, sink=sink, kernel=kernel)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
