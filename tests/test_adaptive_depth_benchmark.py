"""The benchmark of adaptive depth on a run of seconds: it prints its table and draws its picture."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from open_mythos.recipes.named import named_recipe
from open_mythos.recipes.run_config import changed
from open_mythos.recipes.train import train

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "adaptive_depth.py"


@pytest.mark.usefixtures("one_thread")
def test_it_runs_on_a_short_run_of_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"training": {"steps": 2}, "batch_size": 4, "sweep_loops": [1], "sweep_lengths": [4], "sweep_problems": 2}
    run, picture = tmp_path / "run", tmp_path / "exits.png"
    train(changed(named_recipe("parity_adaptive"), small), run, torch.device("cpu"))
    words = ["--problems", "6", "--longest", "9", "--most", "5", "--rounds", "1", "--plot", str(picture)]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(run), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "times faster" in capsys.readouterr().out
    assert picture.stat().st_size > 5000
