"""Batches of problems: a function of seed and step, growing as they are told to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from open_mythos.data.parity import Parity
from open_mythos.data.tasks import TASKS, TaskBatches


def _batches(**changes: Any) -> TaskBatches:
    return TaskBatches(Parity(), **{"batch_size": 4, "shortest": 1, "longest": 16, "steps": 100, **changes})


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    source, again, other = _batches(), _batches(), _batches(seed=1)
    order = [5, 0, 99, 5]
    for step in order:
        one, same = source.batch(step), again.batch(step)
        assert torch.equal(one.ids, same.ids)
        assert torch.equal(one.targets, same.targets)
    assert any(source.batch(s).ids.shape != other.batch(s).ids.shape for s in range(10))
    assert source.state_dict() == {}


def test_problems_grow_from_one_loop_to_the_longest() -> None:
    source = _batches(growth=0.5, batch_size=1)
    lengths = [source.batch(step).ids.shape[1] for step in range(100)]
    assert max(lengths[:12]) <= 4
    assert max(lengths[:30]) <= 10
    assert max(lengths[50:]) == 16
    assert min(lengths) >= 1
    assert min(_batches(shortest=6, growth=0.5).batch(s).ids.shape[1] for s in range(50)) == 6


def test_without_growth_all_lengths_come_from_the_start() -> None:
    lengths = [_batches().batch(step).ids.shape[1] for step in range(40)]
    assert max(lengths[:20]) > 12


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_says_how_hard_its_problems_are(name: str) -> None:
    task = TASKS[name]()
    batch = task.batch(3, 9, torch.Generator().manual_seed(0))
    assert batch.difficulty.tolist() == [task.loops(9)] * 3
    assert int(batch.ids.max()) < task.vocab_size
    assert int(batch.targets.max()) < task.vocab_size


def test_the_position_names_the_length() -> None:
    source = _batches()
    assert str(source.batch(7).ids.shape[1]) in source.position(7)


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", 0), ("shortest", 0), ("longest", 0), ("steps", 0), ("growth", 1.5)]
)
def test_wrong_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        _batches(**{field: value})
