"""Halting and routing reports say what the forward pass did."""

from typing import Literal

import pytest
import torch

from open_mythos.analysis.halting import halting_matrix, under_halting
from open_mythos.analysis.routing import ExpertLoad, expert_load
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_tiny
from tiny import random_ids, tiny_model


def test_halting_matrix_is_loops_by_positions_with_exit_loops() -> None:
    model = tiny_model(mythos_tiny())
    ids = random_ids(model.config, 2, 7)
    with torch.no_grad():
        output = model(ids, 10, full_output=True)
    report = halting_matrix(model, ids, 10)
    assert output.halting_probabilities is not None
    torch.testing.assert_close(torch.tensor(report.probabilities), output.halting_probabilities.mean(1))
    assert torch.equal(torch.tensor(report.exit_loops), output.exit_loops)
    assert report.mean_exit_by_position == pytest.approx(output.exit_loops.float().mean(0).tolist())
    assert report.mean_exit == pytest.approx(float(output.exit_loops.float().mean()))
    assert report.n_loops == 10


def test_running_counts_those_that_have_not_stopped() -> None:
    model = tiny_model(mythos_tiny().replace(halting="settled"))
    report = halting_matrix(model, random_ids(model.config, 3, 7), 12)
    exits = torch.tensor(report.exit_loops)
    assert report.probabilities is None
    assert len(report.running) == int(exits.max())
    for t, row in enumerate(report.running):
        assert row == pytest.approx([float((exits[:, i] > t).float().mean()) for i in range(7)])


@pytest.mark.parametrize("halting", ["settled", "none"])
def test_the_same_weights_under_another_rule(halting: Literal["settled", "none"]) -> None:
    """And nothing is shared: the copy may be trained."""
    model = tiny_model(mythos_tiny())
    ids = random_ids(model.config, 2, 5)
    copy = under_halting(model, halting)
    expected = OpenMythos(model.config.replace(halting=halting)).eval()
    expected.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(copy(ids, 5), expected(ids, 5))
        next(copy.parameters()).zero_()
    assert bool(next(model.parameters()).any())
    assert halting_matrix(under_halting(model, "none"), ids, 5).mean_exit == 5


def test_load_counts_every_slot_of_every_active_position() -> None:
    model = tiny_model(mythos_tiny().replace(recurrent_layers=2))
    ids = random_ids(model.config, 3, 11)
    report = expert_load(model, ids, 6)
    exits = torch.tensor(halting_matrix(model, ids, 6).exit_loops)
    for t, layers in enumerate(report.loops):
        assert [sum(load.slots) for load in layers] == [2 * int((exits > t).sum())] * 2
    assert len(report.layers) == 2
    assert sum(report.layers[0].slots) == 2 * int(exits.sum())


def test_imbalance_is_max_over_mean_and_the_busiest_is_named() -> None:
    load = ExpertLoad((10, 40, 30, 0))
    assert load.busiest == 1
    assert load.imbalance == pytest.approx(2.0)
    assert load.shares == pytest.approx((0.125, 0.5, 0.375, 0.0))
    assert ExpertLoad((0, 0)).imbalance == 1.0


def test_routing_needs_experts_and_leaves_the_bias_alone() -> None:
    with pytest.raises(ValueError, match="n_experts is 0; it must be at least 1"):
        expert_load(OpenMythos(mythos_tiny().replace(n_experts=0)), torch.zeros(1, 4, dtype=torch.long))
    model = OpenMythos(mythos_tiny()).train()
    expert_load(model, random_ids(model.config, 2, 16), 3)
    assert not bool(model.recurrent.block.ffn.router_bias.any())
