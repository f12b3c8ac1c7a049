"""The model against the naive one in tests/reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reference import model as reference
from tiny import random_ids, tiny_config, tiny_model

VARIANTS: list[dict[str, Any]] = [
    {},
    {"window": 3, "outer_window": 4},
    {"halting": "none"},
    {"halting": "settled", "settle_tolerance": 0.3, "window": 3},
    {"recurrent_layers": 2, "window": 2},
    {"prelude_layers": 0, "coda_layers": 0},
    {"n_experts": 0, "lora_rank": 0, "loop_embedding": False},
    {"tie_embeddings": False, "use_rope": False, "attention_sink": False, "qk_norm": False},
    {"router_score": "sigmoid", "routed_scale": 2.5, "n_experts": 8, "n_shared_experts": 0, "state_init": "input"},
]


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "all")
def test_forward_equals_the_naive_model(attn_type: str, changes: dict[str, Any]) -> None:
    config = tiny_config(attn_type, **changes)
    model, ids, n_loops = tiny_model(config), random_ids(config, 2, 7), [5, 4]
    expected = reference.forward(model, ids, n_loops)
    found = model(ids, torch.tensor(n_loops), full_output=True)
    assert torch.equal(found.exit_loops, expected.exit_loops)
    torch.testing.assert_close(found.logits.double(), expected.logits, atol=1e-5, rtol=1e-5)
    assert found.ponder_cost.item() == pytest.approx(expected.ponder_cost, abs=1e-5)
    if config.halting == "act":
        assert found.exit_loops.unique().numel() >= 3, "no test of halting unless positions halt at different loops"


def test_forward_of_a_long_sequence_equals_the_naive_model() -> None:
    """Long enough for the CPU flash kernel, which short sequences do not reach."""
    config = tiny_config(window=5, prelude_layers=1, coda_layers=0)
    model, ids = tiny_model(config), random_ids(config, 1, 60)
    expected = reference.forward(model, ids, [2])
    torch.testing.assert_close(model(ids, 2).double(), expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_encode_loop_step_and_decode_compose_to_forward(attn_type: str) -> None:
    config = tiny_config(attn_type, halting="none")
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    e = model.encode(ids)
    h = model.recurrent.initial_state(e)
    for t in range(3):
        h = model.loop_step(h, e, t)
    torch.testing.assert_close(model.decode(h), model(ids, 3), atol=1e-6, rtol=1e-6)


def test_the_linear_part_of_a_loop_is_exactly_the_injection() -> None:
    """The block adds no second residual path: with silent branches one loop is `A*h + B*e` and nothing else."""
    config = tiny_config(lora_rank=0, loop_embedding=False)
    model = tiny_model(config)
    with torch.no_grad():
        block = model.recurrent.block
        for branch in (block.attn.out.weight, block.ffn.down, block.ffn.shared.down.weight):
            branch.zero_()
    h, e = torch.randn(2, 5, config.dim), torch.randn(2, 5, config.dim)
    injection = model.recurrent.injection
    torch.testing.assert_close(model.loop_step(h, e, 0), injection.get_A() * h + injection.B * e)


def test_last_keeps_the_final_positions_only() -> None:
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 2, 8)
    torch.testing.assert_close(model(ids, last=3), model(ids)[:, -3:])


def test_no_n_loops_means_max_loop_iters() -> None:
    config = tiny_config(halting="none", max_loop_iters=3)
    model, ids = tiny_model(config), random_ids(config, 2, 5)
    assert torch.equal(model(ids), model(ids, 3))


def test_int32_ids_give_what_int64_ids_give() -> None:
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 2, 5)
    assert torch.equal(model(ids.int()), model(ids))


def test_full_output_tells_loops_probabilities_and_load() -> None:
    config = tiny_config(n_experts=8, recurrent_layers=2)
    model, ids = tiny_model(config), random_ids(config, 3, 6)
    out = model(ids, 5, full_output=True)
    loops_run = int(out.exit_loops.max())
    assert out.logits.shape == (3, 6, config.vocab_size)
    assert out.state.shape == (3, 6, config.dim)
    assert out.halting_probabilities.shape == (loops_run, 3, 6)
    assert out.expert_load.shape == (loops_run, 2, 8)
    for t in range(loops_run):
        active = int((out.exit_loops > t).sum())
        assert out.expert_load[t].sum(-1).tolist() == [active * config.n_experts_per_tok] * 2


def test_full_output_has_none_where_there_is_nothing_to_tell() -> None:
    config = tiny_config(n_experts=0, halting="none")
    out = tiny_model(config)(random_ids(config, 2, 4), 3, full_output=True)
    assert out.halting_probabilities is None
    assert out.expert_load is None
    assert float(out.ponder_cost) == 0
    assert (out.exit_loops == 3).all()


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("n_experts", [4, 8])
@torch.no_grad()
def test_bfloat16_follows_float32(attn_type: str, n_experts: int) -> None:
    """bfloat16 keeps 8 bits; over a handful of layers the relative error stays well under 10 percent."""
    config = tiny_config(attn_type, halting="none", n_experts=n_experts)
    model, ids = tiny_model(config), random_ids(config, 2, 50)
    expected = model(ids, 2)
    found = model.bfloat16()(ids, 2)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.1
