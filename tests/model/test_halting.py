"""Adaptive computation time: weights, exit loops, the ponder cost, and halted means frozen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import OpenMythos
from open_mythos.model.budget import LoopBudget
from open_mythos.model.halting import ACTAccumulator, ACTHalting, SettledState
from reference import model as reference
from reference.halting import loop_weights
from tiny import random_ids, tiny_config, tiny_model


def _recovered_weights(probabilities: Tensor, n_loops: Tensor, threshold: float) -> tuple[Tensor, ACTAccumulator]:
    """The accumulator's weights (batch, seq, loops): with loop t's state the unit vector t, they are its output."""
    loops, batch, seq = probabilities.shape
    states = torch.eye(loops, dtype=probabilities.dtype)
    halting = ACTAccumulator(threshold, LoopBudget(n_loops, states.device), probabilities.new_zeros(batch, seq, loops))
    for t in range(int(n_loops.max())):
        halting.update(states[t].expand(batch, seq, loops), probabilities[t], t)
    return halting.output, halting


probabilities = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, 1e-7, 0.01, 0.3, 0.99, 0.5])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(probabilities, min_size=8, max_size=8), min_size=2, max_size=6),
    budgets=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    threshold=st.sampled_from([0.5, 0.9, 0.99, 1.0]),
)
def test_weights_sum_to_exactly_one_and_equal_the_formula(
    rows: list[list[float]], budgets: tuple[int, int], threshold: float
) -> None:
    """Added in the order of the loops, in the same precision, the weights give 1 and not one bit more or less."""
    p = torch.tensor(rows).T.unsqueeze(1).expand(8, 2, len(rows))
    weights, halting = _recovered_weights(p, torch.tensor(budgets), threshold)
    total = torch.zeros_like(weights[..., 0])
    for t in range(8):
        total = total + weights[..., t]
    assert total.eq(1).all()
    assert weights.ge(0).all()
    for sequence, budget in enumerate(budgets):
        for position, row in enumerate(p[:, sequence].T.tolist()):
            _assert_equals_formula(weights[sequence, position], row, budget, threshold, halting, (sequence, position))


def _assert_equals_formula(
    weights: Tensor, row: list[float], budget: int, threshold: float, halting: ACTAccumulator, where: tuple[int, int]
) -> None:
    partial_sums = [sum(row[: t + 1]) for t in range(budget)]
    if any(abs(total - threshold) < 1e-5 for total in partial_sums):
        return  # float32 and float64 may disagree on which side of the threshold the sum lies
    expected = loop_weights(row, budget, threshold)
    expected_weights = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(weights[: len(expected)], expected_weights, atol=1e-6, rtol=0)
    assert not weights[len(expected) :].any()
    assert int(halting.exit_loops[where]) == len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_sum_to_one_in_every_precision(dtype: torch.dtype) -> None:
    p = torch.rand(12, 3, 50).mul(0.3).to(dtype)
    weights, _ = _recovered_weights(p, torch.tensor([12, 5, 1]), 0.99)
    total = torch.zeros_like(weights[..., 0])
    for t in range(12):
        total = total + weights[..., t]
    assert total.eq(1).all()


def test_the_ponder_cost_is_mean_loops_plus_mean_remainder() -> None:
    p = torch.rand(6, 2, 5) * 0.6
    weights, halting = _recovered_weights(p, torch.tensor([6, 3]), 0.99)
    last = weights.gather(-1, (halting.exit_loops - 1).long().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(halting.ponder_cost, (halting.exit_loops + last).mean())


def test_the_ponder_cost_teaches_halting_to_stop_earlier() -> None:
    config = tiny_config()
    model = tiny_model(config)
    ids = random_ids(config, 2, 8)
    before = model(ids, 6, full_output=True)
    before.ponder_cost.backward()
    bias = model.recurrent.act.halt.bias
    assert float(bias.grad) < 0
    with torch.no_grad():
        bias -= 3 * bias.grad.sign()
    assert model(ids, 6, full_output=True).exit_loops.sum() < before.exit_loops.sum()


def test_a_halting_probability_depends_on_the_direction_of_the_state_only() -> None:
    act = ACTHalting(16)
    with torch.no_grad():
        act.halt.weight.normal_()
    h = torch.randn(2, 5, 16)
    torch.testing.assert_close(act(h), act(h * 1000), atol=1e-4, rtol=0)
    assert act(h).shape == (2, 5)
    assert bool(act(torch.zeros(1, 1, 16)).isfinite().all())


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_halted_position_is_frozen(attn_type: str) -> None:
    """Its state stays as it is, bit for bit, and what others see of it is what they saw in its last active loop."""
    config = tiny_config(attn_type, recurrent_layers=2)
    model, ids = tiny_model(config), random_ids(config, 2, 6)
    context = model.context(6)
    e = model.encode(ids, context)
    h = model.loop_step(e, e, 0, context)
    active = torch.rand(2, 6) > 0.5
    assert active.any()
    assert not active.all()
    after = model.loop_step(h, e, 1, context, active)
    assert torch.equal(after[~active], h[~active])
    assert not torch.isclose(after[active], h[active]).all()
    noise = torch.where(active.unsqueeze(-1), 0.0, torch.randn(2, 6, config.dim))
    disturbed = model.context(6)
    model.loop_step(e, e, 0, disturbed)
    found = model.loop_step(h + noise, e, 1, disturbed, active)
    torch.testing.assert_close(found[active], after[active], atol=1e-6, rtol=1e-5)


def test_loops_end_when_every_position_has_halted() -> None:
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 2, 5)
    with torch.no_grad():
        model.recurrent.act.halt.bias.fill_(20.0)
    assert len(model(ids, 50, full_output=True).halting_probabilities) == 1


def test_loops_beyond_the_last_exit_change_nothing() -> None:
    """Once a model halts, more budget is the same computation."""
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 2, 5)
    with torch.no_grad():
        model.recurrent.act.halt.weight.mul_(0.2)
    deepest = int(model(ids, 60, full_output=True).exit_loops.max())
    assert 2 < deepest < 59
    assert torch.equal(model(ids, deepest + 1), model(ids, 60))


def test_an_untrained_model_uses_all_of_its_first_24_loops() -> None:
    """Halting that starts near the threshold would cut the first training steps short."""
    config = tiny_config()
    exit_loops = OpenMythos(config).eval()(random_ids(config, 2, 5), 24, full_output=True).exit_loops
    assert exit_loops.eq(24).all()


def test_training_and_evaluation_compute_the_same_numbers() -> None:
    config = tiny_config(balance_rate=0.0, state_init="zeros")
    model, ids = tiny_model(config), random_ids(config, 2, 7)
    torch.testing.assert_close(model.train()(ids, 6), model.eval()(ids, 6), atol=1e-6, rtol=1e-5)


SETTLED = {"halting": "settled", "window": 3, "recurrent_layers": 2}


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("tolerance", [0.03, 0.1, 0.3])
def test_settled_positions_stop_as_in_the_naive_model(attn_type: str, tolerance: float) -> None:
    config = tiny_config(attn_type, settle_tolerance=tolerance, **SETTLED)
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    expected = reference.forward(model, ids, [20, 5])
    found = model(ids, torch.tensor([20, 5]), full_output=True)
    assert torch.equal(found.exit_loops, expected.exit_loops)
    torch.testing.assert_close(found.logits.double(), expected.logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_position_that_rests_waits_for_those_before_it() -> None:
    """The states of a batch: the second position never moves, the first for three loops; the third has its own time."""
    h = torch.ones(1, 3, 4)
    halting = SettledState(0.1, LoopBudget(torch.tensor([9]), h.device), h)
    for t, moves in enumerate([[1, 0, 1], [1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]]):
        h = h + torch.tensor(moves, dtype=h.dtype).view(1, 3, 1)
        halting.update(h, None, t)
    assert halting.exit_loops.tolist() == [[4, 4, 5]]
    assert halting.finished


@torch.no_grad()
def test_what_has_settled_is_what_more_loops_would_give() -> None:
    """At a tolerance of a millionth, halting changes no logit by more than a thousandth."""
    config = tiny_config(settle_tolerance=1e-6, loop_embedding=False, lora_rank=0, **SETTLED)
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    endless = tiny_model(config.replace(halting="none"))
    found = model(ids, 200, full_output=True)
    assert int(found.exit_loops.max()) < 150
    torch.testing.assert_close(found.logits, endless(ids, 200), atol=1e-3, rtol=0)


def test_training_runs_every_loop_of_a_model_that_halts_when_settled() -> None:
    config = tiny_config(settle_tolerance=0.3, **SETTLED)
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    assert int(model(ids, 20, full_output=True).exit_loops.max()) < 20
    assert model.train()(ids, 20, full_output=True).exit_loops.eq(20).all()


@pytest.mark.parametrize("halting", ["act", "settled", "none"])
@torch.no_grad()
def test_padding_may_be_given_one_loop(halting: str) -> None:
    """Loops may differ by position: what comes before is as if the rest were not there."""
    config = tiny_config(window=3, halting=halting)
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    loops = torch.full((2, 9), 7)
    loops[0, 5:] = 1
    found, alone = model(ids, loops, full_output=True), model(ids[:1, :5], 7, full_output=True)
    torch.testing.assert_close(found.logits[:1, :5], alone.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.exit_loops[:1, :5], alone.exit_loops)
    assert found.exit_loops[0, 5:].eq(1).all()
    with pytest.raises(ValueError, match=r"n_loops .* must be an integer, or an integer tensor of shape \(2,\)$"):
        model(ids, loops, {})


def test_what_is_not_finite_never_settles() -> None:
    """Divergence is no rest: such positions, and all after them, run every loop."""
    halting = SettledState(0.1, LoopBudget(torch.tensor([9]), torch.device("cpu")), torch.ones(1, 4, 3))
    state = torch.ones(1, 4, 3)
    state[0, 2] = float("nan")
    for t in range(9):
        halting.update(state, None, t)
    assert halting.exit_loops.tolist() == [[2, 2, 9, 9]]


def test_the_loops_of_earlier_positions_come_to_the_device_of_the_state() -> None:
    """Loops are counted on the CPU."""
    config = tiny_config(halting="settled")
    with torch.device("meta"):
        model = OpenMythos(config).eval()
        e = torch.zeros(2, 3, config.dim)
    loops = torch.tensor([4, 4])
    halting = model.recurrent.accumulator(loops, e, reached=loops.unsqueeze(-1))
    assert isinstance(halting, SettledState)
    assert halting._settled(e, e, 1).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.9, 0.7, 0.99])
def test_a_threshold_that_is_just_reached_stops(threshold: float, dtype: torch.dtype) -> None:
    """In the state's type 0.9 is less than in Python's, and both ways of comparing have to see the same."""
    states = torch.ones(1, 2, 4, dtype=dtype)
    for probabilities in (torch.full((1, 2), threshold, dtype=dtype), torch.tensor([[threshold, 1.0]], dtype=dtype)):
        halting = ACTAccumulator(threshold, LoopBudget(torch.tensor([5]), states.device), states)
        halting.update(states, probabilities, 0)
        assert halting.finished
        assert halting.exit_loops.eq(1).all()
