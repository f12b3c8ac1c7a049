"""What may not influence what: later tokens, other sequences, other depths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import random_ids, tiny_config, tiny_model

ARCHITECTURES: list[dict[str, Any]] = [{}, {"halting": "none", "window": 3}, {"n_experts": 8, "recurrent_layers": 2}]
both_types = pytest.mark.parametrize("attn_type", ["gqa", "mla"])
architectures = pytest.mark.parametrize("changes", ARCHITECTURES, ids=lambda changes: ",".join(changes) or "all")


@both_types
@architectures
@pytest.mark.parametrize("seq", [8, 55])
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit(attn_type: str, changes: dict[str, Any], seq: int) -> None:
    config = tiny_config(attn_type, **changes)
    model, ids = tiny_model(config), random_ids(config, 1, seq)
    expected = model(ids, 5, full_output=True)
    for changed_at in sorted({1, seq // 2, seq - 1}):
        other = ids.clone()
        other[:, changed_at:] = (other[:, changed_at:] + 1) % config.vocab_size
        found = model(other, 5, full_output=True)
        torch.testing.assert_close(found.logits[:, :changed_at], expected.logits[:, :changed_at], atol=1e-5, rtol=1e-5)
        assert torch.equal(found.exit_loops[:, :changed_at], expected.exit_loops[:, :changed_at])
        assert not torch.isclose(found.logits[:, changed_at], expected.logits[:, changed_at]).all()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), changed_at=st.integers(1, 9), n_loops=st.integers(1, 6))
@torch.no_grad()
def test_causality_holds_for_random_models(seed: int, changed_at: int, n_loops: int) -> None:
    config = tiny_config("mla" if seed % 2 else "gqa", window=None if seed % 3 else 4)
    model, ids = tiny_model(config, seed), random_ids(config, 2, 10, seed)
    other = ids.clone()
    other[:, changed_at:] = random_ids(config, 2, 10 - changed_at, seed + 1)
    found, expected = model(other, n_loops)[:, :changed_at], model(ids, n_loops)[:, :changed_at]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_gradient_flows_from_a_logit_to_a_later_token() -> None:
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 1, 8)
    x = model.embed(ids).detach().requires_grad_()
    model.embed.forward = lambda ids: x
    model(ids, 4)[0, 3].square().sum().backward()
    per_position = x.grad[0].abs().amax(-1)
    assert per_position[:4].gt(0).all()
    assert per_position[4:].eq(0).all()


@both_types
@architectures
@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_batch(attn_type: str, changes: dict[str, Any]) -> None:
    config = tiny_config(attn_type, **changes)
    model, ids = tiny_model(config), random_ids(config, 4, 9)
    together = model(ids, 5, full_output=True)
    for row in range(4):
        alone = model(ids[row : row + 1], 5, full_output=True)
        torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone.exit_loops[0], together.exit_loops[row])


@both_types
@architectures
@torch.no_grad()
def test_a_depth_per_sequence_equals_each_sequence_alone(attn_type: str, changes: dict[str, Any]) -> None:
    config = tiny_config(attn_type, **changes)
    model, ids, n_loops = tiny_model(config), random_ids(config, 4, 9), [3, 1, 6, 3]
    together = model(ids, torch.tensor(n_loops))
    for row, depth in enumerate(n_loops):
        alone = model(ids[row : row + 1], depth)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@torch.no_grad()
def test_depths_may_have_any_integer_type(dtype: torch.dtype) -> None:
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 2, 5)
    assert torch.equal(model(ids, torch.tensor([3, 3], dtype=dtype)), model(ids, 3))


@torch.no_grad()
def test_more_loops_change_the_result() -> None:
    config = tiny_config(halting="none")
    model, ids = tiny_model(config), random_ids(config, 1, 6)
    for n_loops in range(1, 6):
        assert not torch.isclose(model(ids, n_loops), model(ids, n_loops + 1)).all()


@torch.no_grad()
def test_with_a_window_information_travels_one_window_per_layer() -> None:
    """Window w, one layer per loop and no outer layers: T loops reach T * (w - 1) positions back and no further."""
    config = tiny_config(window=3, prelude_layers=0, coda_layers=0, halting="none")
    model, ids = tiny_model(config), random_ids(config, 1, 20)
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % config.vocab_size
    for n_loops in (1, 2, 4):
        differs = ~torch.isclose(model(ids, n_loops), model(other, n_loops), atol=1e-6).all(-1)[0]
        assert differs.nonzero().max() == n_loops * 2


@torch.no_grad()
def test_without_a_sink_a_constant_sequence_has_no_absolute_position() -> None:
    """Why the sink is on by default: softmax attention over equal values returns the value at every position."""
    ids = torch.full((1, 12), 3)
    blind = tiny_model(tiny_config(attention_sink=False, halting="none"))(ids, 4)
    torch.testing.assert_close(blind, blind[:, :1].expand_as(blind), atol=1e-4, rtol=1e-4)
    anchored = tiny_model(tiny_config(halting="none"))(ids, 4)
    assert not torch.isclose(anchored[0, 0], anchored[0, 5], atol=1e-3).all()
