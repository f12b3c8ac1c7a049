"""Compiled functions: kept on disk until a file of theirs changes, announced, on as many threads as PyTorch has."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from open_mythos.model.arithmetic import compiled
from open_mythos.model.few_rows import pointwise
from open_mythos.model.few_rows.products import multiply


def test_what_is_kept_is_thrown_away_when_any_file_changes(tmp_path: Path) -> None:
    """Numba looks at a function's own file: it would go on calling an old version of what that imports."""
    for folder in ("arithmetic", "few_rows", "many_rows"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1")
    stamp = compiled._stamp.__wrapped__
    before = stamp(tmp_path)
    assert stamp(tmp_path) == before
    os.utime(tmp_path / "many_rows" / "a.py", ns=(1, 1))
    assert stamp(tmp_path) != before
    for function in (multiply, pointwise.rms_norm):
        kept: Any = function
        assert kept._cache._cache_file._source_stamp == compiled._stamp()


def test_compiling_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    notice = compiled._Notice()
    others = SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=test_compiling_is_announced_once)})
    nobodys = SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=SimpleNamespace(__module__=None))})
    own = SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=compiled.n_parts.py_func)})  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        for event in (others, nobodys, own, own):
            notice.on_start(event)  # type: ignore[arg-type]
    assert [record.getMessage()[:9] for record in caplog.records] == ["Compiling"]


def test_pytorch_keeps_its_number_of_threads() -> None:
    """Starting Numba's threads, which are PyTorch's where both use the same OpenMP, used to change it."""
    code = (
        "import torch; torch.set_num_threads(1); from open_mythos.model.arithmetic.compiled import Threads; "
        "threads = Threads(); assert threads.use(); assert threads.n == 1 == torch.get_num_threads(); "
        "torch.set_num_threads(2); threads.use(); assert torch.get_num_threads() == 2 >= threads.n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("task", "seq", "waiting"),
    [("model(ids, 2).sum().backward()", 40, {"few_rows"}), ("model.generate(ids, 2, 2)", 1, set())],
)
def test_only_what_is_needed_is_compiled(task: str, seq: int, waiting: set[str]) -> None:
    """In a process of its own: a function without its name would end it. What is not imported does not wait."""
    code = (
        "import torch; from open_mythos import OpenMythos; from open_mythos.model.arithmetic import compiled; "
        "from open_mythos.presets import mythos_tiny; torch.set_num_threads(1); "
        f"model, ids = OpenMythos(mythos_tiny()), torch.ones(1, {seq}, dtype=torch.long); "
        f"{task}; left = {{package for package, waiting in compiled._to_be_named.items() if waiting}}; "
        f"assert left == {waiting}, left"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
