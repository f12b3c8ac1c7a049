"""What the laws of a sweep say on the screen."""

from __future__ import annotations

from open_mythos.analysis.depth_law import fit_depth_laws
from open_mythos.analysis.depth_sweep import SweepRow
from open_mythos.cli.depth_law import law_entry, law_lines


def _rows(length: int, accuracy: dict[int, float | None]) -> list[SweepRow]:
    return [
        SweepRow(length=length, n_loops=n, loss=None, accuracy=value, exact_match=None) for n, value in accuracy.items()
    ]


def _said(accuracy: dict[int, float | None], target: float | None = None, most: int | None = None) -> list[str]:
    rows = _rows(24, accuracy)
    return [line.strip() for line in law_lines(fit_depth_laws(rows, "accuracy", most), rows, target)]


def test_an_exact_law_is_told_with_its_predictions() -> None:
    halving = {n: 0.9 - 0.4 * 2.0 ** (1 - n) for n in (1, 2, 4, 8)}
    assert _said({**halving, 8: halving[8] - 0.01}, target=0.8, most=4) == [
        "length 24: accuracy saturates at 0.9000, time constant 1.44 loops, rms error 0.0000 (0% of the change)",
        "accuracy 0.8: 3 loops (3.00 by the law)",
        "8 loops: predicted 0.8969, measured 0.8869 (+0.0100)",
    ]
    assert _said(halving, target=0.4)[1] == "accuracy 0.4: 1 loop"
    assert _said(halving, target=0.95)[1] == "accuracy 0.95: out of reach"


def test_what_the_depths_cannot_tell_is_not_told() -> None:
    """A limit far beyond them, how fast a curve falls that is level after one loop, and a share of no change."""
    (line,) = _said({n: 0.5 + 0.01 * n for n in (1, 2, 3, 4)})
    assert "saturates at a level not seen by 4 loops" in line
    (line,) = _said({1: 0.5, 2: 0.9, 3: 0.9, 4: 0.9})
    assert "saturates at 0.9000, time constant below 0.2 loops" in line
    (line,) = _said({1: 0.5, 2: 0.5, 3: 0.5})
    assert line.endswith("rms error 0.0000")


def test_lengths_are_aligned_and_depths_without_figures_left_out() -> None:
    curve = {1: 0.5, 2: 0.7, 3: 0.8}
    rows = [*_rows(8, {**curve, 9: None}), *_rows(128, curve)]
    lines = list(law_lines(fit_depth_laws(rows, "accuracy"), rows, 0.6))
    assert [line[:12] for line in lines] == ["length   8: ", " " * 12, "length 128: ", " " * 12]


def test_as_data_a_target_out_of_reach_has_no_loops() -> None:
    (law,) = fit_depth_laws(_rows(8, {1: 0.5, 2: 0.7, 3: 0.8}), "accuracy").values()
    assert law_entry(8, law, 0.95)["target_loops"] is None
    assert law_entry(8, law, None)["target"] is None
    assert law_entry(8, law, 0.6)["target_loops"] == law.loops_for(0.6)
