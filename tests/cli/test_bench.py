"""`mythos bench`, with its clock and its peer replaced: what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from open_mythos.bench.cases import CASES, Case, Measured
from open_mythos.bench.peer import PeerUnavailableError
from open_mythos.cli import bench
from open_mythos.cli.main import main


@pytest.fixture(autouse=True)
def _without_network_and_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_peer(directory: Path) -> None:
        raise PeerUnavailableError("installing open-mythos==0.5.0 failed: no network")

    def measured(case: Case, *_: object) -> Measured:
        return Measured(case, ours=0.002, peer=None, floor=0.001, parameters=1234, peer_parameters=None)

    monkeypatch.setattr(bench, "load_peer", no_peer)
    monkeypatch.setattr(bench, "run_case", measured)
    monkeypatch.setattr(bench, "matmul_peak", lambda: 1e11)
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 1e10)


def test_a_name_that_no_case_has_is_refused_with_the_names_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--only", "nonsense"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mythos: only is 'nonsense'; it must be part of one of train-tutorial-gqa, ")
    assert "decode-small-mla" in captured.err
    assert captured.out == ""


def test_without_a_peer_the_reason_is_told_and_our_columns_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "new" / "bench.json"
    assert main(["bench", "--only", "decode", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "No comparison: installing open-mythos==0.5.0 failed: no network" in text
    assert "100 GFLOP/s" in text
    (line,) = (line for line in text.splitlines() if "decode small-gqa" in line)
    assert line.split() == ["decode", "small-gqa", "T=4", "0.00", "-", "2.00", "-", "-", "1.00", "2.00"]
    rows = json.loads(file.read_text())
    assert [row["task"] for row in rows] == ["decode", "decode"]
    assert rows[0]["times_floor"] == 2


def test_all_cases_run_unless_told_otherwise(tmp_path: Path) -> None:
    assert main(["bench", "--json", str(tmp_path / "bench.json")]) == 0
    assert len(json.loads((tmp_path / "bench.json").read_text())) == len(CASES)
