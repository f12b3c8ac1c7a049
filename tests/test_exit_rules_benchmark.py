"""The benchmark of exit rules: positions stop where they do in the engine, and a table is printed for a short run."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from open_mythos.inference import Engine, SamplingParams, StateChange
from open_mythos.recipes.named import named_recipe
from open_mythos.recipes.run_config import changed
from open_mythos.recipes.train import train
from tiny import tiny_config, tiny_model

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "exit_rules.py"


@pytest.mark.parametrize("state_init", ["input", "zeros"])
@pytest.mark.parametrize("index", range(10))
def test_positions_stop_where_they_do_in_the_engine(index: int, state_init: str) -> None:
    script = runpy.run_path(str(SCRIPT))
    rule = (*script["RULES"], StateChange(0.9))[index]
    model, exits = tiny_model(tiny_config(halting="none", state_init=state_init)), set()
    for prompt in ([1, 2, 3], [4], [5, 6, 7, 8]):
        (served,) = Engine(model).generate([prompt], SamplingParams(max_new_tokens=1, n_loops=9, exit_rule=rule))
        state = model.encode(torch.tensor([prompt]))
        halting = script["Ruled"](model, rule, torch.tensor([9]), state)
        with torch.inference_mode():
            model.recurrent.accumulator = lambda *_, halting=halting, **__: halting
            model(torch.tensor([prompt]), 9)
        del model.recurrent.accumulator
        assert int(halting.exit_loops[0, -1]) == served.exit_loops[0]
        exits.add(served.exit_loops[0])
    assert min(exits) < 9


@pytest.mark.usefixtures("one_thread")
def test_it_prints_a_row_for_every_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"training": {"steps": 2}, "batch_size": 4, "sweep_loops": [1], "sweep_lengths": [4], "sweep_problems": 2}
    train(changed(named_recipe("p_hop"), small), tmp_path / "run", torch.device("cpu"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(tmp_path / "run"), "--problems", "3", "--most", "3"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "p_hop, length 8" in printed
    assert all(name in printed for name in ("32 loops", "settled, 0.03", "StateChange", "StableArgmax(loops=4)"))
