"""The laws of a sweep, on the screen and as data.

Main entries: `law_lines`, `law_entry`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from open_mythos.analysis.depth_law import DepthLaw, whole_loops
from open_mythos.analysis.depth_sweep import SweepRow

_SEEN = 0.5
"""Share of the way to the limit that depths must have come for the limit to be worth telling."""

_LEVEL = 0.2
"""With a time constant of that many loops, less than 1% of the way is left after one."""


def law_lines(laws: Mapping[int, DepthLaw], rows: Sequence[SweepRow], target: float | None) -> Iterator[str]:
    """For each length where quality goes, how fast, how well the law fits; then what it predicts."""
    width = max(len(str(length)) for length in laws)
    for length, law in sorted(laws.items()):
        limit = f"{law.limit:.4f}" if law.covered >= _SEEN else f"a level not seen by {law.deepest} loops"
        gain = abs(law.limit - law.first)
        share = f" ({law.rms_error / gain:.0%} of the change)" if gain else ""
        yield (
            f"length {length:>{width}}: {law.measure} saturates at {limit}, "
            f"time constant {_constant(law)} loops, rms error {law.rms_error:.4f}{share}"
        )
        predictions = [] if target is None else [f"{law.measure} {target:g}: {_needed(law.loops_for(target))}"]
        predictions += [_test(row, law) for row in rows if _is_deeper(row, length, law)]
        for prediction in predictions:
            yield f"{'':{width + 9}}{prediction}"


def law_entry(length: int, law: DepthLaw, target: float | None) -> dict[str, Any]:
    """Plain data for JSON; without a target, or with one out of reach, `target_loops` is None."""
    loops = None if target is None else law.loops_for(target)
    return {"length": length, **asdict(law), "covered": law.covered, "target": target, "target_loops": loops}


def _is_deeper(row: SweepRow, length: int, law: DepthLaw) -> bool:
    measured = row[law.measure]  # type: ignore[literal-required]
    return row["length"] == length and row["n_loops"] > law.deepest and measured is not None


def _test(row: SweepRow, law: DepthLaw) -> str:
    predicted, measured = law.predict(row["n_loops"]), row[law.measure]  # type: ignore[literal-required]
    return f"{row['n_loops']} loops: predicted {predicted:.4f}, measured {measured:.4f} ({predicted - measured:+.4f})"


def _constant(law: DepthLaw) -> str:
    """Of a law that is level after one loop the depths, whole loops, cannot tell the time constant."""
    return f"below {_LEVEL}" if law.time_constant < _LEVEL else f"{law.time_constant:.2f}"


def _needed(loops: float | None) -> str:
    if loops is None:
        return "out of reach"
    whole = whole_loops(loops)
    return "1 loop" if whole == 1 else f"{whole} loops ({loops:.2f} by the law)"
