"""Attention of a few positions and what stands around it are those of naive loops in float64, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.model.arithmetic.compiled import Threads
from open_mythos.model.few_rows.attention import _absorb, _attend, _release
from open_mythos.model.few_rows.pointwise import adapt
from open_mythos.model.rows import Array, Rows


@pytest.fixture(scope="module", autouse=True)
def _named() -> None:
    Threads().use("few_rows")


def _random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _attended(query: Array, keys: Array, values: Array, seen: Rows, scale: float, sink: float | None) -> Array:
    scores = [scale * float(query.astype(np.float64) @ keys[row]) for row in seen]
    most = max(scores if sink is None else [*scores, sink])
    weights = [np.exp(score - most) for score in scores]
    total = sum(weights) + (0 if sink is None else np.exp(sink - most))
    mixed: Array = sum(weight / total * values[row] for weight, row in zip(weights, seen, strict=True))
    return mixed


@settings(deadline=None, max_examples=150)
@given(
    counts=st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 40]), min_size=1, max_size=5),
    n_kv=st.integers(1, 3),
    group=st.integers(1, 9),
    width=st.sampled_from([1, 2, 7, 8, 16, 24, 31, 64, 80]),
    value_width=st.sampled_from([1, 5, 8, 16, 23, 64, 65, 100]),
    has_sink=st.booleans(),
    threads=st.integers(1, 4),
)
def test_attention_is_that_of_a_naive_loop(
    counts: list[int], n_kv: int, group: int, width: int, value_width: int, has_sink: bool, threads: int
) -> None:
    n_heads, stored, random = n_kv * group, 60, np.random.default_rng(0)
    queries, keys, values = (
        _random(1, len(counts), n_heads + 2, width),
        _random(2, n_kv, stored, width),
        _random(3, n_kv, stored, value_width),
    )
    sink = _random(4, n_heads if has_sink else 0)
    listed = [random.choice(stored, count, replace=False).astype(np.int64) for count in counts]
    rows = np.array([seen.ctypes.data for seen in listed])
    out, scale = np.empty((len(counts), n_heads, value_width), np.float32), np.float32(0.4)
    _attend(queries, keys, values, rows, np.array(counts), scale, sink, out, threads)
    for i, seen in enumerate(listed):
        for head in range(n_heads):
            k, own = head // group, float(sink[head]) if has_sink else None
            expected = _attended(queries[i, head], keys[k], values[k], seen, 0.4, own)
            np.testing.assert_allclose(out[i, head], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 6, 13, 40])
@pytest.mark.parametrize(("rank", "nope", "rope", "value_width"), [(16, 8, 4, 8), (5, 3, 2, 7), (40, 17, 6, 70)])
def test_latents_are_multiplied_by_each_heads_own_matrices(
    n: int, rank: int, nope: int, rope: int, value_width: int
) -> None:
    n_heads = 3
    q, kv_up = _random(0, n, n_heads, nope + rope), _random(1, n_heads, nope + value_width, rank)
    absorbed, before = _random(2, n, n_heads, rank + rope), _random(2, n, n_heads, rank + rope)
    _absorb(q, kv_up, 1, 3, absorbed)
    expected = np.einsum("nhk,hkr->nhr", q[..., :nope].astype(np.float64), kv_up[:, :nope])
    np.testing.assert_allclose(absorbed[:, 1:, :rank], expected[:, 1:], atol=1e-4)
    np.testing.assert_array_equal(absorbed[:, 0], before[:, 0])
    np.testing.assert_array_equal(absorbed[..., rank:], before[..., rank:])
    mixed, out = _random(3, n, n_heads, rank), np.zeros((n, n_heads, value_width), np.float32)
    _release(mixed, kv_up, 0, 2, out)
    expected = np.einsum("nhr,hvr->nhv", mixed.astype(np.float64), kv_up[:, nope:])
    np.testing.assert_allclose(out[:, :2], expected[:, :2], atol=1e-4)
    assert not out[:, 2].any()


@pytest.mark.parametrize("n", [1, 3, 50])
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
@pytest.mark.parametrize("own_scales", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_adapter_reads_what_the_branches_added(n: int, rank: int, own_scales: bool, threads: int) -> None:
    dim = 37
    x, u, down, up = _random(0, n, dim), _random(1, n, dim), _random(2, rank, dim), _random(3, rank, dim)
    scale = _random(4, n if own_scales else 1, rank)
    expected = x + ((x - u).astype(np.float64) @ down.T * scale) @ up
    adapt(x, u, down, scale, up, threads)
    np.testing.assert_allclose(x, expected, atol=1e-4)
