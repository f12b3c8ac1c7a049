"""The plan for a cluster: its figures are those of the document, and right where they can be checked by hand."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from open_mythos.analysis.memory_plan import plan_training
from open_mythos.model.cost import parameter_counts
from open_mythos.presets import mythos_tiny

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "cluster_plan.py"


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_document_shows_what_the_script_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def test_one_rank_receives_nothing_and_holds_everything(plan: dict[str, Any]) -> None:
    work = plan["Work"](seq_len=64)
    alone = plan["needs"](mythos_tiny(), plan["Layout"]("alone", 1), work)
    state = plan_training(mythos_tiny(), seq_len=64)
    assert alone.traffic == 0
    assert alone.state == state.weights + state.gradients + state.optimizer


def test_traffic_as_implemented_does_not_depend_on_loops_and_by_use_it_does(plan: dict[str, Any]) -> None:
    def traffic(loops: int, **layout: Any) -> float:
        work = plan["Work"](seq_len=64, loops=loops, learned=1)
        return plan["needs"](mythos_tiny(), plan["Layout"]("", 4, gathered=4, **layout), work).traffic

    counts = parameter_counts(mythos_tiny())
    blocks = counts.prelude + counts.coda
    assert traffic(1) == traffic(16) == 3 / 4 * 4 * (2 * counts.total + blocks)
    assert traffic(16, per_layer=True) - traffic(1, per_layer=True) == pytest.approx(15 * 3 / 4 * 4 * counts.recurrent)


def test_tokens_travel_only_to_experts_elsewhere(plan: dict[str, Any]) -> None:
    config = mythos_tiny()
    work = plan["Work"](seq_len=64, loops=3, learned=2)
    split = plan["needs"](config, plan["Layout"]("", 2, expert_ranks=4), work)
    sent = 64 * config.n_experts_per_tok * config.dim * 2 * 3 / 4
    assert split.tokens_in == 2 * sent * (3 + 2 * 2)
    assert plan["needs"](config, plan["Layout"]("", 8), work).tokens_in == 0
