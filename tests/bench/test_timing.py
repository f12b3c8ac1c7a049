"""Contestants take turns, and the peaks are rates."""

import pytest

from open_mythos.bench.timing import median, race, read_bandwidth
from open_mythos.training.hardware import matmul_peak


def test_contestants_take_turns_after_warming_up() -> None:
    calls: list[str] = []
    times = race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, warmup=2, least=3)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    assert all(second >= 0 for found in times.values() for second in found)


def test_a_race_lasts_about_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that gains 0.1 s at every look, a turn of one contestant takes 0.3 s: start, end, and the check."""
    ticks = iter(range(10_000))
    monkeypatch.setattr("open_mythos.bench.timing.time.perf_counter", lambda: next(ticks) / 10)
    times = race({"a": lambda: None}, seconds=3, warmup=0, least=1)
    assert 9 <= len(times["a"]) <= 11
    assert times["a"] == pytest.approx([0.1] * len(times["a"]))


def test_the_median_is_not_moved_by_one_bad_turn() -> None:
    assert median([1.0, 1.1, 99.0]) == 1.1


def test_peaks_are_positive_and_plausible() -> None:
    """Any machine does over 10 MFLOP/s and reads over 1 MB/s; none does over 10 PFLOP/s or reads 1 PB/s."""
    assert 1e7 < matmul_peak(size=64, seconds=0.01) < 1e16
    assert 1e6 < read_bandwidth(megabytes=1, seconds=0.01) < 1e15
