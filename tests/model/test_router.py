"""The router: what decides the choice, what weighs it, and how the bias balances the load."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.model.few_rows.feed_forward import dispatch
from open_mythos.model.router import balance_step, count_load, route
from tiny import random_ids, tiny_config, tiny_model


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_decides_the_choice_and_never_the_weights(score: str) -> None:
    logits = torch.randn(50, 6)
    bias = torch.tensor([0.0, 0, 0, 100, 0, 100])
    plain, biased = route(logits, torch.zeros(6), 2, score, 1.0), route(logits, bias, 2, score, 1.0)
    assert set(biased.experts.flatten().tolist()) == {3, 5}
    assert len(plain.experts.unique()) == 6
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    chosen = scores.gather(-1, biased.experts)
    torch.testing.assert_close(biased.weights, chosen / chosen.sum(-1, keepdim=True))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_weights_sum_to_the_routed_scale(score: str, top_k: int) -> None:
    routing = route(torch.randn(40, 5), torch.zeros(5), top_k, score, 2.5)
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((40,), 2.5))
    assert all(len(set(row)) == top_k for row in routing.experts.tolist())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_extreme_logits_give_finite_weights(score: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    assert bool(route(logits, torch.zeros(3), 2, score, 1.0).weights.isfinite().all())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_few_tokens_are_routed_as_many_are(score: str, top_k: int) -> None:
    logits, bias = torch.randn(30, 6) * 5, torch.randn(6)
    logits[0], logits[1] = 1e4 * logits[0], -1000 - logits[1].abs()
    experts, weights = route(logits, bias, top_k, score, 2.5)
    ends, owners = np.zeros(6, np.int64), np.empty(30 * top_k, np.int64)
    factors = np.empty(30 * top_k, np.float32)
    dispatch(logits.numpy(), bias.numpy(), score == "softmax", np.float32(2.5), ends, owners, factors)
    chosen = np.repeat(np.arange(6), np.diff(ends, prepend=0))
    assert len(chosen) == ends[-1] == len(owners)
    for row in range(30):
        expected = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        own = owners == row
        assert dict(zip(chosen[own].tolist(), factors[own].tolist(), strict=True)) == pytest.approx(expected, abs=1e-6)


def test_load_counts_slots() -> None:
    experts = torch.tensor([[0, 2], [2, 3], [2, 0]])
    assert count_load(experts, 5).tolist() == [2, 0, 3, 1, 0]


def test_a_step_raises_the_idle_lowers_the_busy_and_stays_centred() -> None:
    bias = torch.zeros(4)
    balance_step(bias, torch.tensor([10, 2, 4, 4]), 0.1)
    assert bias[0] < bias[2] < bias[1]
    assert float(bias.sum()) == pytest.approx(0, abs=1e-6)
    assert float(bias.abs().max()) <= 0.2
    before = bias.clone()
    balance_step(bias, torch.tensor([5, 5, 5, 5]), 0.1)
    torch.testing.assert_close(bias, before)


def test_balancing_flattens_a_skewed_router() -> None:
    """Experts 0 and 1 are preferred by 2 logits; the bias learns to undo exactly that."""
    logits = torch.randn(4000, 6) + torch.tensor([2.0, 2.0, 0, 0, 0, 0])
    bias = torch.zeros(6)
    for _ in range(400):
        balance_step(bias, count_load(route(logits, bias, 2, "softmax", 1.0).experts, 6), 0.02)
    load = count_load(route(logits, bias, 2, "softmax", 1.0).experts, 6)
    assert float(load.max() / load.float().mean()) < 1.1


def _skewed_model() -> OpenMythos:
    model = tiny_model(tiny_config(n_experts=4, recurrent_layers=2, balance_rate=0.2))
    for block in model.recurrent.blocks:
        block.ffn.router_bias.copy_(torch.tensor([3.0, 3.0, -3.0, -3.0]))
    return model


def test_the_model_balances_every_router_in_training_mode() -> None:
    model = _skewed_model().train()
    ids = random_ids(model.config, 8, 12)
    first = model.eval()(ids, 3, full_output=True).expert_load.sum(0)
    model.train()
    for _ in range(60):
        model(ids, 3)
    last = model.eval()(ids, 3, full_output=True).expert_load.sum(0)
    share = lambda load: (load.max(-1).values / load.sum(-1)).tolist()  # noqa: E731
    assert all(value > 0.45 for value in share(first)), "half of the slots is the most that one of two choices can take"
    assert all(value < 0.32 for value in share(last))


def test_the_bias_is_still_in_evaluation_mode_and_without_a_rate() -> None:
    model = _skewed_model()
    ids = random_ids(model.config, 4, 6)
    before = model.recurrent.block.ffn.router_bias.clone()
    model(ids, 3)
    model(ids, 3, full_output=True)
    model.generate(ids, 2, n_loops=2)
    assert torch.equal(model.recurrent.block.ffn.router_bias, before)
    frozen = tiny_model(tiny_config(balance_rate=0.0)).train()
    before = frozen.recurrent.block.ffn.router_bias.clone()
    frozen(random_ids(frozen.config, 4, 6), 3)
    assert torch.equal(frozen.recurrent.block.ffn.router_bias, before)


def test_one_training_forward_is_one_step_whatever_the_loops() -> None:
    """A step per loop would tie the rate to the depth."""
    model = _skewed_model().train()
    before = model.recurrent.block.ffn.router_bias.clone()
    model(random_ids(model.config, 4, 6), 6)
    moved = (model.recurrent.block.ffn.router_bias - before).abs().max()
    assert 0 < float(moved) <= 2 * model.config.balance_rate


def test_the_bias_is_a_buffer_that_no_optimizer_sees() -> None:
    model = _skewed_model()
    assert not any("router_bias" in name for name, _ in model.named_parameters())
    assert any("router_bias" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_the_bias_in_float32_and_whole(dtype: torch.dtype) -> None:
    model = _skewed_model()
    bias = model.recurrent.block.ffn.router_bias.fill_(1 / 3)
    for cast in (model.to(dtype), model.to(device="cpu", dtype=dtype), model.to(torch.float32)):
        assert cast.recurrent.block.ffn.router_bias.dtype == torch.float32
        assert torch.equal(cast.recurrent.block.ffn.router_bias, bias)
    assert model.to("meta").recurrent.block.ffn.router_bias.device.type == "meta"


def test_a_bfloat16_model_still_balances() -> None:
    """Next to a bias of 3 the gap between bfloat16 numbers is 1/64: steps of a thousandth would be lost for ever."""
    model = tiny_model(tiny_config(balance_rate=0.001)).to(torch.bfloat16).train()
    before = model.recurrent.block.ffn.router_bias.copy_(torch.tensor([3.0, 3.0, -3.0, -3.0])).clone()
    model(random_ids(model.config, 4, 6), 3)
    moved = (model.recurrent.block.ffn.router_bias - before).abs()
    assert 0 < float(moved.max()) <= 0.002


def test_the_router_learns() -> None:
    model = tiny_model(tiny_config())
    model(random_ids(model.config, 2, 6), 3).square().mean().backward()
    assert model.recurrent.block.ffn.router.weight.grad.abs().max() > 0
