"""The benchmarks that change the tasks' recipes, in a few steps: they print their tables, and change what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from open_mythos.recipes.named import named_recipe, recipe_names
from open_mythos.recipes.run_config import TaskRun
from tiny import tiny_config, tiny_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RECIPES = [name for name in recipe_names() if isinstance(named_recipe(name), TaskRun)]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("controls", ["addition", "--nets", "once", "--seeds", "0,1", "--factors", "1"], "once, full attention"),
        ("ablation", ["addition", "--changes", "no carry", "the next loop's move"], "no carry"),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_a_benchmark_prints_a_row_per_setting_and_seed(
    script: str, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *words, "--steps", "2", "--problems", "2"])
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 2
    assert len({line.count("|") for line in lines}) == 1
    assert sum(says in line for line in lines) == 2


@pytest.fixture
def ablation() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "ablation.py"))


def test_without_the_carry_a_stays_where_it_is(ablation: dict[str, Any]) -> None:
    model = tiny_model(tiny_config())
    ablation["no_carry"](model)
    injection = model.recurrent.injection
    assert injection.get_A().max() < 0.001
    assert [name for name, parameter in injection.named_parameters() if parameter.requires_grad] == ["B"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_changes_something(name: str, ablation: dict[str, Any]) -> None:
    run = named_recipe(name)
    rows = ablation["changes"](run)
    unchanged = [
        row for row, change in rows.items() if change.model is None and ablation["altered"](run, change.run) == run
    ]
    assert unchanged == ["the base"]


def test_deep_nets_have_as_many_layers_as_the_deepest_pass_of_training() -> None:
    controls = runpy.run_path(str(BENCHMARKS / "controls.py"))
    altered = controls["altered"]
    found = {name: controls["nets"](named_recipe(name)) for name in RECIPES}
    layers = {name: nets["deep, window"]["model"]["recurrent_layers"] for name, nets in found.items()}
    crossing = {"parity": 2 * 4, "addition": 2 * 10, "sums": 2 * 10, "dyck": 2 * 10, "reverse": 2 * 10}
    assert layers == {**crossing, "parity_adaptive": 2 * 7, "p_hop": 12, "walk": 8}
    assert altered(named_recipe("walk"), found["walk"]["once, window"]).training.settle_weight == 0  # it is about loops
