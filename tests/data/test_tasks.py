"""Batches of problems: a function of seed and step, growing as they are told to; every task is trained and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos import MythosConfig
from open_mythos.data.parity import Parity
from open_mythos.data.tasks import TASKS, TaskBatches
from open_mythos.recipes.material import open_material
from open_mythos.recipes.run_config import TaskRun
from open_mythos.recipes.train import build_model
from open_mythos.training.depth import Difficulty
from open_mythos.training.trainer import Trainer, TrainerConfig


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
def test_every_task_trains_and_is_measured_by_its_own_length(name: str) -> None:
    config = MythosConfig(dim=16, n_heads=2, n_kv_heads=1, window=3, outer_window=3, max_seq_len=128)
    run = TaskRun(task=name, longest=5, model=config, training=TrainerConfig(steps=2), batch_size=3, depth=Difficulty())
    material = open_material(run, Path("unused"))
    model = build_model(run, material, torch.device("cpu"))
    Trainer(model, material.source, run.depth, run.training).run()
    rows = material.sweep(model, (1, 3), 4, (9, 2))
    assert [(row["length"], row["n_loops"]) for row in rows] == [(2, 1), (2, 3), (9, 1), (9, 3)]
    assert all(row["loss"] is not None for row in rows)
    assert [row["length"] for row in material.sweep(model, (1,), 4)] == [5, 10]


def test_a_problem_that_does_not_fit_is_refused_with_the_room_it_takes() -> None:
    with pytest.raises(ValueError, match=r"longest is 64 and takes 129 positions; it must be at most .*\(128\)"):
        TaskRun(task="addition", longest=64, model=MythosConfig(max_seq_len=128))


def test_the_position_names_the_length() -> None:
    source = _batches()
    assert str(source.batch(7).ids.shape[1]) in source.position(7)


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", 0), ("shortest", 0), ("longest", 0), ("steps", 0), ("growth", 1.5)]
)
def test_wrong_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        _batches(**{field: value})
