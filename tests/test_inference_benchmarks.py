"""The benchmarks of the engine on a run of seconds: they print their tables, and their own checks of equality hold."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from open_mythos.cli.main import main

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model that has hardly learned anything."""
    folder = tmp_path_factory.mktemp("benchmarks")
    book = folder / "book.txt"
    book.write_text("It was the best of times, it was the worst of times.\n" * 60, encoding="utf-8")
    sizes = ["--model.dim", "16", "--model.max-seq-len", "24", "--model.n-heads", "2", "--model.n-kv-heads", "1"]
    small = ["--steps", "2", "--batch-size", "2", "--seq-len", "16", "--sweep-rows", "2", "--model.ffn-dim", "24"]
    assert main(["train", "text", "--data", str(book), "--out", str(folder / "run"), *sizes, *small]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("speculation", ["--texts", "2", "--loops", "5"], "guesses right"),
        ("depth_wise", ["--requests", "5", "--loops", "4", "--rounds", "1", "--batch-tokens", "8"], "PredictionChange"),
        ("cache_sharing", ["--texts", "3", "--loops", "3"], "FirstLoops(own=0)"),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_a_benchmark_runs(
    script: str,
    words: list[str],
    says: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [script, str(run), *words])
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert says in capsys.readouterr().out
