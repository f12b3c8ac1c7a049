"""Runs as data: written, read, changed, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from open_mythos import MythosConfig
from open_mythos.recipes.folder import RunFolder, locked, read_run, to_yaml
from open_mythos.recipes.material import sweep_loops, sweep_rows
from open_mythos.recipes.named import named_recipe, recipe_names
from open_mythos.recipes.run_config import TaskRun, TextRun, changed, run_from_dict, run_to_dict
from open_mythos.training.depth import Fixed, Poisson, Ramp
from open_mythos.training.trainer import TrainerConfig


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_recipe_can_be_read_and_says_what_it_is(name: str) -> None:
    run = named_recipe(name)
    assert run_from_dict(run_to_dict(run)) == run
    assert run_from_dict(yaml.safe_load(to_yaml(run))) == run
    assert len(recipe_names()[name]) > 20


def test_an_unknown_recipe_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"WHAT is 'poetry'; it must be a recipe: .*parity.*text"):
        named_recipe("poetry")


def test_a_plan_inside_a_plan_survives_yaml(tmp_path: Path) -> None:
    run = TextRun(depth=Ramp(plan=Poisson(mean=9, grad_loops=3), share=0.1))
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    assert read_run(tmp_path / "run.yaml") == run


def test_changes_reach_one_field_and_leave_the_rest() -> None:
    run = named_recipe("parity")
    other = changed(run, {"training": {"optim": {"learning_rate": "1e-3"}}, "depth": {"name": "fixed", "loops": 2}})
    assert other.training.optim.learning_rate == 1e-3
    assert other.depth == Fixed(loops=2)
    back = changed(other, {"training": {"optim": {"learning_rate": 5e-4}}, "depth": run_to_dict(run)["depth"]})
    assert back == run


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"modle": {}}, "modle is no field; there are .*model"),
        ({"model": {"dims": 3}}, "model.dims is no field"),
        ({"model": 3}, "model is 3; it must be a mapping"),
        ({"training": {"steps": "many"}}, "training.steps is 'many'; it must be an integer"),
        ({"training": {"steps": True}}, "training.steps is True; it must be an integer"),
        ({"training": {"clip": "tight"}}, "training.clip is 'tight'; it must be a number"),
        ({"training": {"recompute": 1}}, "training.recompute is 1; it must be true or false"),
        ({"training": {"precision": "float8"}}, "training.precision is 'float8'; it must be one of 'auto'"),
        ({"training": {"optim": {"betas": 0.9}}}, "training.optim.betas is 0.9; it must be a list"),
        ({"depth": {"name": "deep"}}, "depth plan is"),
        ({"model": {"window": "wide"}}, "window"),
        ({"longest": 600}, r"longest is 600; it must be at most model.max_seq_len \(512\)"),
        ({"sweep_lengths": [24, 600]}, r"sweep_lengths has 600; it must be at most model.max_seq_len \(512\)"),
        ({"task": "chess"}, "task is 'chess'; it must be one of parity"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_wrong_fields_are_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        changed(named_recipe("parity"), changes)


def test_a_row_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seq_len is 512; it must be at most model.max_seq_len \(256\)"):
        TextRun(seq_len=512, model=MythosConfig(max_seq_len=256))


def test_a_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("kind: [text")
    with pytest.raises(ValueError, match=r"run.yaml is not YAML"):
        read_run(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("kind: poem")
    with pytest.raises(ValueError, match=r"run.yaml: kind is 'poem'; a run must be of kind 'text' or 'task'"):
        read_run(tmp_path / "run.yaml")


def test_a_folder_belongs_to_one_run_which_may_be_prolonged(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    folder.check(TaskRun())
    folder.claim(TaskRun())
    longer = TaskRun(training=TrainerConfig(steps=5000, checkpoint_every=7), sweep_problems=3)
    folder.check(longer)
    folder.claim(longer)
    assert folder.read() == longer
    with pytest.raises(ValueError, match=r"model.dim is 64; the run in .*run has 128"):
        folder.check(TaskRun(model=MythosConfig(dim=64)))
    with pytest.raises(ValueError, match=r"training.seed is 1"):
        folder.check(TaskRun(training=TrainerConfig(seed=1)))
    with pytest.raises(ValueError, match=r"data is 'stdlib'"):
        folder.check(TextRun())
    assert folder.read() == longer


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no run.yaml; it must be the folder of a run"):
        RunFolder(tmp_path).read()


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match=r"is in use by another run \(process \d+\)"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_sweeps_go_to_four_times_the_typical_depth() -> None:
    assert sweep_loops(TextRun(depth=Poisson(mean=3))) == (1, 2, 4, 8, 12)
    assert sweep_loops(TextRun(depth=Fixed(loops=4))) == (1, 2, 4, 8, 16)
    assert sweep_loops(TaskRun(model=MythosConfig(max_loop_iters=2))) == (1, 2, 4, 8)
    assert sweep_loops(TaskRun(sweep_loops=(3,))) == (3,)
    assert sweep_rows(TextRun(sweep_rows=5), final=False) == 5
    assert sweep_rows(TaskRun(sweep_problems=5), final=True) == 20


def test_a_sweep_measures_twice_the_longest_where_that_fits() -> None:
    assert TaskRun(longest=16, model=MythosConfig(max_seq_len=32)).lengths_swept == (16, 32)
    assert TaskRun(longest=16, model=MythosConfig(max_seq_len=31)).lengths_swept == (16,)
    assert TaskRun(task="p_hop", longest=6).lengths_swept == (6,)  # there are no problems of 12 hops
