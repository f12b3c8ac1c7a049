"""Every case runs, on a size of milliseconds, beside a peer; floors follow from the cost model."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from open_mythos.bench import cases
from open_mythos.bench.cases import CASES, SIZES, Case, Task, run_case
from open_mythos.config import MythosConfig
from open_mythos.model.cost import forward_flops, parameter_counts
from open_mythos.model.mythos import OpenMythos

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    "vocab_size": 16,
    "dim": 16,
    "n_heads": 2,
    "n_kv_heads": 1,
    "max_seq_len": 64,
    "max_loop_iters": 4,
    "n_experts": 8,
    "n_experts_per_tok": 2,
    "expert_dim": 8,
}


@pytest.fixture(autouse=True)
def _tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.SIZES, "fake-gqa", TINY)
    monkeypatch.setitem(cases._BATCH, "fake", (2, 8))


@pytest.fixture
def peer() -> ModuleType:
    """A peer with the published package's names: it stands in for it, being our own model."""
    module = ModuleType("peer")
    module.OpenMythos, module.MythosConfig = OpenMythos, MythosConfig  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("task", ["train", "forward", "decode"])
def test_a_case_beside_a_peer(task: Task, peer: ModuleType) -> None:
    found = run_case(Case(task, "fake-gqa", 2), peer, seconds=0, flops=1e11, bandwidth=1e10)
    row = found.to_dict()
    assert row["seconds"] > row["floor_seconds"] > 0
    assert row["times_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
    assert row["speedup"] == pytest.approx(row["peer_seconds"] / row["seconds"])
    assert row["parameters"] == row["peer_parameters"] == parameter_counts(MythosConfig(**TINY)).total


def test_without_a_peer_its_columns_are_empty() -> None:
    row = run_case(Case("forward", "fake-gqa", 2), None, seconds=0, flops=1e11, bandwidth=1e10).to_dict()
    assert row["peer_seconds"] is row["speedup"] is row["peer_parameters"] is None
    assert row["seconds"] > 0


def test_the_floor_is_all_products_at_the_peak_and_three_times_that_for_training() -> None:
    model = OpenMythos(MythosConfig(**TINY))
    flops = forward_flops(model.config, 8).total(3) * 2 * 8
    floors = [cases._floor(Case(task, "fake-gqa", 3), model, 1e9, 1.0) for task in ("forward", "train")]
    assert floors == pytest.approx([flops / 1e9, 3 * flops / 1e9])


def test_the_floor_of_decoding_is_one_read_of_what_each_pass_uses() -> None:
    """A prompt of 16 uses all weights; each of 31 tokens the active ones, and a cache of 32 positions in the mean."""
    model = OpenMythos(MythosConfig(**TINY))
    counts, cached = parameter_counts(model.config), 2 * model.config.head_dim * 3 * 32
    mean = (counts.total + 31 * (counts.active + cached)) / 32 * 4
    assert cases._floor(Case("decode", "fake-gqa", 1), model, 1.0, 1e9) == pytest.approx(mean / 1e9)


def test_loops_that_choose_other_experts_read_them_too() -> None:
    model = OpenMythos(MythosConfig(**TINY))
    shares = [cases._chosen_share(model, n_loops) for n_loops in (1, 2, 4)]
    assert shares[0] == 2 / 8
    assert shares == sorted(shares)
    with torch.no_grad():
        for block in model.recurrent.blocks:
            block.ffn.router.weight.zero_()  # all tie, in every loop
    assert cases._chosen_share(model, 4) == 2 / 8


def test_a_training_step_moves_the_weights_and_decoding_does_not() -> None:
    for task, moves in (("train", True), ("decode", False)):
        model = OpenMythos(MythosConfig(**TINY))
        before = model.embed.weight.detach().clone()
        cases._runner(Case(task, "fake-gqa", 2), model, greedy={"temperature": 0.0})()
        assert torch.equal(model.embed.weight, before) is not moves


def test_the_published_cases_are_valid_and_cover_both_kinds_of_attention() -> None:
    for case in CASES:
        MythosConfig(**SIZES[case.size])
        assert case.size.split("-")[0] in cases._BATCH
    assert {case.size for case in CASES} == SIZES.keys() - {"fake-gqa"}


def test_importing_the_cases_loads_no_peer() -> None:
    assert "open_mythos_peer" not in sys.modules
