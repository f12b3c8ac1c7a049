"""The tour on a recipe of a few steps: nine parts in order, plain data, pictures that open."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from open_mythos.config import MythosConfig
from open_mythos.recipes.run_config import TaskRun
from open_mythos.tour.parts import Part, as_data, run_parts
from open_mythos.tour.recipe import TourRecipe, Trained, tour_recipe, train
from open_mythos.training.optim import OptimConfig
from open_mythos.training.trainer import TrainerConfig

KEYS = [
    "model_sizes",
    "kv_cache",
    "stability_by_construction",
    "task",
    "training",
    "depth_sweep",
    "halting",
    "expert_load",
    "answers",
]
RECIPE = TourRecipe(
    run=TaskRun(
        batch_size=4,
        model=MythosConfig(
            dim=16,
            n_heads=2,
            n_kv_heads=1,
            recurrent_layers=2,
            max_seq_len=24,
            max_loop_iters=8,
            window=5,
            n_experts=4,
            expert_dim=8,
        ),
        training=TrainerConfig(steps=3, optim=OptimConfig(learning_rate=0.01)),
    ),
    sweep_loops=(1, 4, 8),
    sweep_lengths=(6, 24),
    sweep_strings=3,
)


@pytest.fixture(scope="module")
def toured() -> Iterator[tuple[Trained, list[Part]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = train(RECIPE)
    yield trained, list(run_parts(RECIPE, trained))
    torch.set_num_threads(threads)


def test_nine_parts_in_order(toured: tuple[Trained, list[Part]]) -> None:
    assert [part.key for part in toured[1]] == KEYS
    for part in toured[1]:
        assert part.section.title
        assert part.section.text
        assert part.section.rows or part.section.preformatted


def test_rows_of_a_table_have_the_same_columns(toured: tuple[Trained, list[Part]]) -> None:
    for part in toured[1]:
        assert len({tuple(row) for row in part.section.rows}) <= 1


def test_pictures_are_png_and_their_names_differ(toured: tuple[Trained, list[Part]]) -> None:
    pictures = [(name, png) for part in toured[1] for name, png in part.section.pictures.items()]
    names = [name for name, _ in pictures]
    assert len(set(names)) == len(names)
    assert {"memory_plan", "kv_cache", "stability", "training", "depth_sweep", "halting", "expert_load"} == set(names)
    for _, png in pictures:
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert png.endswith(b"IEND\xaeB`\x82")
        assert len(png) > 5_000


def test_the_data_is_json_and_complete(toured: tuple[Trained, list[Part]]) -> None:
    data = as_data(RECIPE, toured[1])
    assert list(json.loads(json.dumps(data, allow_nan=False))) == ["seed", "recipe", *KEYS]
    assert data["recipe"]["training"]["steps"] == 3
    assert data["kv_cache"]["ratio"] == pytest.approx(2.67, abs=0.01)
    assert data["stability_by_construction"]["smallest_abused"] > 0
    assert data["stability_by_construction"]["rho_abused"] < 1
    rows = data["depth_sweep"]["rows"]
    assert [(row["length"], row["n_loops"]) for row in rows] == [(n, t) for n in (6, 24) for t in (1, 4, 8)]
    assert len(data["halting"]["exit_by_position"]) == 24
    assert [sum(shares) for shares in data["expert_load"]["shares_by_layer"]] == pytest.approx([1, 1])
    assert list(data["answers"]["right_by_loops"]) == ["1", "2", "4", "6", "12", "32"]


def test_training_keeps_its_promise_on_lengths_and_loops(toured: tuple[Trained, list[Part]]) -> None:
    """At most 16 bits and at most 4 loops: everything beyond is extrapolation."""
    recipe = tour_recipe(seed=3)
    assert recipe.seed == 3
    assert recipe.run.longest <= 16
    assert recipe.trained_loops <= 4
    assert all(step.mean_loops <= RECIPE.trained_loops for step in toured[0].steps)


def test_the_observer_sees_every_step_and_the_seed_decides() -> None:
    seen: list[int] = []
    one = train(RECIPE, lambda done, _: seen.append(done))
    assert seen == [1, 2, 3]
    same = train(RECIPE)
    assert [step.loss for step in one.steps] == [step.loss for step in same.steps]
    assert all(map(torch.equal, one.model.state_dict().values(), same.model.state_dict().values()))
