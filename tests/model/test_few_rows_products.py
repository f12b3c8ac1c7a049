"""Products of a few rows are NumPy's, whatever the sizes, on one thread and on several."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.model.arithmetic.compiled import Threads
from open_mythos.model.few_rows.feed_forward import _add_down, _gate, add_experts
from open_mythos.model.few_rows.products import multiply, share
from open_mythos.model.rows import Array


def _random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    use = Threads()
    use.use("few_rows")
    yield use.n
    torch.set_num_threads(before)
    use.use("few_rows")


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 6, 7, 10, 31, 32, 47, 48, 49, 64])
@pytest.mark.parametrize("dim", [1, 15, 16, 40, 257])
@pytest.mark.parametrize("width", [1, 5, 16, 23, 257, 384])
def test_products_are_numpys(n: int, dim: int, width: int, threads: int) -> None:
    x, weight, before = _random(n, n, dim), _random(dim, width, dim), _random(width, n, width)
    added, written = before.copy(), np.full_like(before, np.nan)
    multiply(x, weight, np.float32(0.5), added, 1, threads)
    multiply(x, weight, np.float32(0.5), written, 0, threads)
    product = 0.5 * (x.astype(np.float64) @ weight.T.astype(np.float64))
    np.testing.assert_allclose(added, before + product, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(written, product, atol=1e-4, rtol=1e-5)


@settings(deadline=None)
@given(width=st.integers(0, 5000), parts=st.integers(1, 40))
def test_parts_are_neighbours_and_leave_nothing_out(width: int, parts: int) -> None:
    ends = [share(width, part, parts) for part in range(parts + 1)]
    assert ends == sorted(ends)
    assert (ends[0], ends[-1]) == (0, width)
    assert all(end % 4 == 0 for end in ends[:-1])


@pytest.mark.parametrize("n", [1, 2, 9, 40, 150])
@pytest.mark.parametrize("dim", [24, 64, 176])
@pytest.mark.parametrize("softmax", [True, False])
def test_experts_are_those_of_a_naive_loop(n: int, dim: int, softmax: bool, threads: int) -> None:
    hidden, n_experts, top_k, eps = 52, 6, 2, np.float32(1e-6)
    x, gain = _random(0, n, dim), _random(1, dim)
    shared, router = [_random(k, 24, dim) * 0.1 for k in (2, 3, 4)], _random(5, n_experts, dim) * 0.1
    bias, experts = _random(6, n_experts), [_random(k, n_experts, hidden, dim) * 0.1 for k in (7, 8, 9)]
    out = x.copy()
    gate, up, down = shared[0][None], shared[1][None], np.ascontiguousarray(shared[2].T)
    options = (router, bias, top_k, softmax, np.float32(1.5), *experts)
    add_experts(out, gain, eps, gate, up, down, *options, np.float32(0.7), threads)
    np.testing.assert_allclose(out, _naive(x, gain, eps, shared, router, bias, experts, softmax), atol=1e-4, rtol=1e-4)


def _naive(
    x: Array,
    gain: Array,
    eps: np.float32,
    shared: list[Array],
    router: Array,
    bias: Array,
    experts: list[Array],
    softmax: bool,
) -> Array:
    out = x.copy()
    for i, row in enumerate(x):
        normed = row / np.sqrt((row * row).mean() + eps) * gain
        added = _swiglu(normed, *shared)
        logits = router @ normed
        chosen = np.argsort(-(logits + bias))[:2]
        scores = np.exp(logits[chosen]) if softmax else 1 / (1 + np.exp(-logits[chosen]))
        for expert, weight in zip(chosen, 1.5 * scores / scores.sum(), strict=True):
            added = added + weight * _swiglu(normed, *(matrix[expert] for matrix in experts))
        out[i] += 0.7 * added
    return out


def _swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    a = gate @ x
    return (a / (1 + np.exp(-a)) * (up @ x)) @ down


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 3, 4, 5, 6, 10, 17, 33, 48, 49, 70]), min_size=1, max_size=6).filter(any),
    dim=st.sampled_from([1, 3, 4, 7, 16, 31, 65, 130, 200]),
    width=st.sampled_from([1, 3, 4, 9, 16, 31, 64, 130]),
    parts=st.integers(1, 4),
)
def test_experts_with_few_rows_and_with_many_in_one_call(lengths: list[int], dim: int, width: int, parts: int) -> None:
    Threads().use("few_rows")
    ends, n, n_experts = np.cumsum(lengths).astype(np.int64), sum(lengths), len(lengths)
    x, factors, before = _random(0, n, dim), _random(1, n), _random(2, n // 2 + 1, dim)
    gate, up, down = (_random(k, n_experts, width, dim) / np.float32(dim**0.5) for k in (3, 4, 5))
    owners = np.random.default_rng(6).integers(0, len(before), n)
    hidden, out = np.zeros((n, width), np.float32), before.copy()
    _gate(x, gate, up, ends, factors, hidden, parts)
    _add_down(hidden, down, ends, owners, out, parts)
    expected, expert = before.astype(np.float64), np.repeat(np.arange(n_experts), lengths)
    for r in range(n):
        row, e = x[r].astype(np.float64), expert[r]
        opened, given_up = gate[e] @ row, up[e] @ row
        own = factors[r] * given_up * opened / (1 + np.exp(-opened))
        np.testing.assert_allclose(hidden[r], own, atol=1e-4)
        expected[owners[r]] += own @ down[e]
    np.testing.assert_allclose(out, expected, atol=2e-4 * max(1, float(abs(expected).max())))
