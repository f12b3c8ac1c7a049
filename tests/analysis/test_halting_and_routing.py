"""Halting and routing reports say what the forward pass did."""

import pytest
import torch

from open_mythos.analysis.halting import halting_matrix
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


def test_halting_needs_act() -> None:
    model = OpenMythos(mythos_tiny().replace(halting="none"))
    with pytest.raises(ValueError, match="halting is 'none'; it must be 'act'"):
        halting_matrix(model, random_ids(model.config, 1, 4))


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
