"""`mythos inspect` on presets and folders."""

import json
from pathlib import Path

import pytest
import torch

from open_mythos.cli.main import main
from open_mythos.model.cost import parameter_counts
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_1t, mythos_tiny


def test_a_preset_of_any_size_is_described_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main(["inspect", "mythos_1t", "--dtype", "bfloat16", "--seq-len", "4096", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    for words in ("mythos_1t: parameters", "FLOPs per token", "Memory, 1 x 4096 tokens, 64 loops, bfloat16"):
        assert words in text
    report = json.loads(file.read_text())
    assert report["costs"]["parameters"]["total"] == parameter_counts(mythos_1t()).total
    assert report["costs"]["plans"]["inference"]["weights"] == pytest.approx(2e12, rel=0.02)
    assert list(report["costs"]["flops_by_loops"]) == ["1", "2", "4", "8", "16", "32", "64"]
    assert "behaviour" not in report


def test_a_folder_is_also_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    OpenMythos(mythos_tiny()).save_pretrained(tmp_path)
    file = tmp_path / "report.json"
    assert main(["inspect", str(tmp_path), "--loops", "3", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    for words in ("State on random tokens", "Jacobian after 3 loops: rho", "busiest expert"):
        assert words in text
    behaviour = json.loads(file.read_text())["behaviour"]
    assert 0 < behaviour["stability"]["rho"] < 1
    assert len(behaviour["stability"]["loops"]) == 4
    assert behaviour["jacobian_radius"] > 0
    assert sum(behaviour["routing"][0][0]["shares"]) == pytest.approx(1)


def test_weights_that_are_not_finite_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = OpenMythos(mythos_tiny())
    with torch.no_grad():
        model.prelude[0].ffn.up.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "Weights that are not finite" in text
    assert "prelude.0.ffn.up.weight" in text
    assert "State on random tokens" not in text


def test_an_incomplete_folder_and_an_unknown_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is not a complete model folder" in capsys.readouterr().err
    assert main(["inspect", "mythos_smal"]) == 2
    assert "there is no model folder 'mythos_smal'" in capsys.readouterr().err
