"""`mythos demo`: two commands after a fresh clone, so it has to work as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from open_mythos.cli.main import main
from open_mythos.model.mythos import OpenMythos

PICTURES = ["depth_sweep", "expert_load", "halting", "kv_cache", "memory_plan", "stability", "training"]


def test_two_steps_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main(["demo", "--steps", "2", "--seed", "3", "--out", str(tmp_path / "tour")]) == 0
    assert torch.get_num_threads() == threads
    folder = tmp_path / "tour"
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(["model", "report.html", "results.json", *(f"{name}.png" for name in PICTURES)])

    text = capsys.readouterr().out
    headings = re.findall(r"^([1-9])  (\S.*?) ─", text, re.MULTILINE)
    assert [int(number) for number, _ in headings] == list(range(1, 10))
    page = (folder / "report.html").read_text(encoding="utf-8")
    for number, title in headings:
        assert f'<h2><span class="number">{number}</span>{title}</h2>' in page
    assert page.count("<img ") == len(PICTURES)

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["seed"] == 3
    assert results["recipe"]["training"]["steps"] == results["training"]["steps"] == 2
    deepest = results["depth_sweep"]["rows"][-1]
    assert (deepest["length"], deepest["n_loops"]) == (96, 128)

    model = OpenMythos.from_pretrained(folder / "model")
    assert model.config.to_dict() == results["recipe"]["model"]
    assert torch.isfinite(model(torch.ones(1, 96, dtype=torch.long), 4)).all()


@pytest.mark.parametrize(("words", "said"), [(["--steps", "0"], "steps is 0"), (["--out", "{file}"], "exists")])
def test_bad_input_is_told_before_training(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    words = [word.format(file=tmp_path / "file") for word in ["--out", str(tmp_path / "new"), *words]]
    assert main(["demo", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "training" not in captured.out
    assert not (tmp_path / "new").exists()


def test_a_missing_matplotlib_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise ImportError("plots need matplotlib; install it with: pip install 'open-mythos[plots]'")

    monkeypatch.setattr("open_mythos.analysis.plots._figure", missing)
    assert main(["demo", "--out", str(tmp_path / "tour")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "mythos: plots need matplotlib; install it with: pip install 'open-mythos[plots]'\n"
    assert captured.out == ""
