"""Rotary positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from open_mythos.model.arithmetic.vectors import THERE, rotated
from open_mythos.model.rope import apply_rotary, rotary_table, rotations
from reference.elementary import rotate


@pytest.mark.parametrize("dim", [2, 6, 32])
@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_rotary_equals_the_formula(dim: int, theta: float) -> None:
    positions = torch.tensor([0, 1, 5, 63])
    x = torch.randn(2, 4, 3, dim)
    found = apply_rotary(x, rotary_table(positions, dim, theta, torch.float32))
    for batch in range(2):
        for i, position in enumerate(positions.tolist()):
            for head in range(3):
                expected = rotate(x[batch, i, head].double(), position, theta)
                torch.testing.assert_close(found[batch, i, head].double(), expected, atol=1e-5, rtol=1e-5)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 1, 8).expand(40, 1, 8), torch.randn(1, 1, 8).expand(40, 1, 8)
    table = rotary_table(torch.arange(40), 8, 10_000.0, torch.float32)
    scores = (apply_rotary(q, table) @ apply_rotary(k, table).transpose(1, 2)).flatten()
    torch.testing.assert_close(scores, scores[:1].expand(40), atol=1e-4, rtol=1e-4)
    queries, keys = apply_rotary(q, table)[3:], apply_rotary(k, table)[:-3]
    scores = (queries * keys).sum(-1).flatten()
    torch.testing.assert_close(scores, scores[:1].expand(37), atol=1e-4, rtol=1e-4)


def test_rotation_keeps_lengths() -> None:
    x = torch.randn(50, 2, 16)
    turned = apply_rotary(x, rotary_table(torch.arange(50), 16, 10_000.0, torch.float32))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_angles_are_computed_in_float32_for_half_precision() -> None:
    """bfloat16 cannot tell position 1000 from 1003: angles computed in it would be wrong by whole turns."""
    half = rotary_table(torch.tensor([1003]), 8, 10_000.0, torch.bfloat16)
    full = rotary_table(torch.tensor([1003]), 8, 10_000.0, torch.float32)
    torch.testing.assert_close(half.cos.float(), full.cos, atol=0.005, rtol=0)


def test_a_table_laid_out_for_every_head_rotates_alike() -> None:
    x, positions = torch.randn(2, 7, 3, 8), torch.arange(5, 12)
    laid_out = rotary_table(positions, 8, 100.0, torch.float32, heads=3)
    assert laid_out.cos.shape == (7, 3, 8)
    assert torch.equal(apply_rotary(x, laid_out), apply_rotary(x, rotary_table(positions, 8, 100.0, torch.float32)))


@pytest.mark.parametrize("position", [0, 1, 1003, 100_000])
def test_the_kernel_rotates_in_place_as_the_table_does(position: int) -> None:
    x = torch.randn(1, 5, 16)
    table = rotary_table(torch.tensor([position]), 16, 10_000.0, torch.float32)
    array = x[0].numpy().copy()
    for head in array:
        rotated(head, rotations(np.array([position]), 16, 10_000.0)[0], THERE)
    torch.testing.assert_close(torch.from_numpy(array), apply_rotary(x, table)[0], atol=1e-5, rtol=0)
