"""The halting head learns when answers have settled, and nothing else of the model moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from open_mythos.model.mythos import OpenMythos
from open_mythos.training.halting import HaltingFitConfig, _states_and_targets, fit_halting
from tiny import random_ids, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(step: int) -> tuple[Tensor, int]:
    return random_ids(tiny_config(), 4, 6, seed=step), 2


def test_only_the_halting_head_changes_and_its_loss_falls() -> None:
    model, losses = tiny_model(tiny_config()).train(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = HaltingFitConfig(steps=30, learning_rate=0.05, extra_loops=3)
    fit_halting(model, draw, config, lambda step, loss: losses.append((step, loss)))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"recurrent.act.halt.weight", "recurrent.act.halt.bias"}
    assert [step for step, _ in losses] == list(range(30))
    assert sum(loss for _, loss in losses[-5:]) < sum(loss for _, loss in losses[:5])
    assert not model.training
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("recurrent.act")]
    assert all(parameter.grad is None for parameter in others)


def naive_targets(probabilities: list[float]) -> list[float]:
    """Of the final answer's probability at each loop: 1 where it was at least 0.9 a loop before and ever since."""
    targets = [0.0]
    for t in range(1, len(probabilities)):
        targets.append(1.0 if min(probabilities[t - 1 :]) >= 0.9 else 0.0)
    return targets


@torch.no_grad()
def test_the_target_is_that_of_a_naive_loop_over_sequences_positions_and_loops() -> None:
    model = tiny_model(tiny_config(n_experts=0))
    model.norm.weight.mul_(3)  # so that some answers become confident
    ids, n_loops = random_ids(model.config, 3, 5), 6
    states, targets = _states_and_targets(model, ids, n_loops)
    assert states.shape == (n_loops * 3, 5, model.config.dim)
    found = targets.view(n_loops, 3, 5)
    e = model.encode(ids)
    h = model.recurrent.initial_state(e)
    predictions = []
    for t in range(n_loops):
        h = model.loop_step(h, e, t)
        torch.testing.assert_close(states.view(n_loops, 3, 5, -1)[t], h)
        predictions.append(model.decode(h).softmax(-1).tolist())
    for sequence in range(3):
        for position in range(5):
            last = predictions[-1][sequence][position]
            answer = last.index(max(last))
            of_one = [predictions[t][sequence][position][answer] for t in range(n_loops)]
            assert found[:, sequence, position].tolist() == naive_targets(of_one)
    assert 0 < float(found[1:].mean()) < 1, "the example must have settled and unsettled states"


def test_the_naive_definition_by_hand() -> None:
    assert naive_targets([0.95, 0.2, 0.9, 0.99]) == [0, 0, 0, 1]
    assert naive_targets([0.95, 0.95, 0.95]) == [0, 1, 1]
    assert naive_targets([0.95, 0.95, 0.5]) == [0, 0, 0]


def test_a_model_without_halting_is_refused() -> None:
    model = OpenMythos(tiny_config(halting="none"))
    with pytest.raises(ValueError, match="halting is 'none'; it must be 'act'"):
        fit_halting(model, draw, HaltingFitConfig(steps=1, learning_rate=0.1, extra_loops=1))
