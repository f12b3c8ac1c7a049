"""The soak test in small: an engine gives everything back, and the test would notice if it did not."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.usefixtures("one_thread")
def test_a_hundred_requests_of_every_kind_leave_nothing(script: dict[str, Any]) -> None:
    report = script["soak"](100)
    assert report.leaks == []
    assert report.endings.total() == 100
    assert report.endings.keys() == {"length", "stop", "error", "cancelled", "stream left"}
    assert report.tokens > 100


def test_what_is_left_is_named(script: dict[str, Any]) -> None:
    report = script["Report"](memory_after_warm_up=2**20, memory=8 * 2**20, pages_held=3, requests_left=1)
    assert report.leaks == ["3 pages held left", "1 requests left", "memory grew by 7.0 MiB"]
