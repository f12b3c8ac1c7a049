"""A law of quality against loops: what is left to gain shrinks by the same factor with every loop.

Main entries: `fit_depth_law`, `fit_depth_laws`. The form is `limit + Z * exp(-z * n_loops)` of Parcae (arXiv
2604.12946, section 5.3), with Z and z written as the quality at the shallowest depth and a time constant 1 / z. It can
neither turn around nor start late: where loops first help and then harm, or help only together, `rms_error` says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from open_mythos.analysis.depth_sweep import SweepRow

LEAST_DEPTHS = 3
"""Depths that a fit needs: as many as the law has parameters."""
_BOUNDS = {"loss": (0.0, math.inf), "accuracy": (0.0, 1.0), "exact_match": (0.0, 1.0)}
_GRID = 200
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class DepthLaw:
    """`limit + (first - limit) * exp(-(n_loops - shallowest) / time_constant)`, fitted to the depths of one length."""

    measure: str
    """"loss", "accuracy" or "exact_match"."""
    shallowest: int
    deepest: int
    """The depths that it was fitted to lie between these."""
    first: float
    """Quality at the shallowest depth, by the law."""
    limit: float
    """Quality after any number of loops."""
    time_constant: float
    """Loops after which 63% of what is left to the limit is gained."""
    rms_error: float
    """Root mean square of measured less fitted quality."""

    @property
    def covered(self) -> float:
        """Share of the way from `first` to `limit` that the deepest depth has come; the rest is extrapolated."""
        return -math.expm1((self.shallowest - self.deepest) / self.time_constant)

    def predict(self, n_loops: float) -> float:
        """Quality after so many loops, the shallowest depth or more: backwards the law says nothing."""
        if n_loops < self.shallowest:
            raise ValueError(f"n_loops is {n_loops}; it must be at least the shallowest depth ({self.shallowest})")
        return self.limit + (self.first - self.limit) * math.exp((self.shallowest - n_loops) / self.time_constant)

    def loops_for(self, target: float) -> float | None:
        """The fewest loops, from `shallowest` on and not always whole, to quality `target`; None if none suffice."""
        sign = -1 if self.measure == "loss" else 1
        if sign * self.first >= sign * target:
            return float(self.shallowest)
        if sign * self.limit <= sign * target:
            return None
        return self.shallowest + self.time_constant * math.log((self.first - self.limit) / (target - self.limit))


def whole_loops(loops: float) -> int:
    """As many loops as a model must run for so many by a law; what is over only by rounding is not counted."""
    return math.ceil(loops - 1e-6)


def fit_depth_laws(rows: Sequence[SweepRow], measure: str, most: int | None = None) -> dict[int, DepthLaw]:
    """The law of each length of a sweep, of depths up to `most`.

    Lengths with fewer than three depths have none, nor have those with a figure that is not finite.
    """
    points: dict[int, dict[int, float]] = {}
    for row in rows:
        value = row[measure]  # type: ignore[literal-required]
        if value is not None and (most is None or row["n_loops"] <= most):
            points.setdefault(row["length"], {})[row["n_loops"]] = value
    return {
        length: fit_depth_law(quality, measure)
        for length, quality in points.items()
        if len(quality) >= LEAST_DEPTHS and all(map(math.isfinite, quality.values()))
    }


def fit_depth_law(quality: Mapping[int, float], measure: str) -> DepthLaw:
    """The law closest to the quality at each depth, in least squares; `limit` keeps to what the measure can be.

    For a given time constant the other two parameters are a linear regression, so that one dimension is left to search
    (variable projection, Golub and Pereyra 1973).
    """
    if measure not in _BOUNDS:
        raise ValueError(f"measure is {measure!r}; it must be one of {', '.join(map(repr, _BOUNDS))}")
    if len(quality) < LEAST_DEPTHS or min(quality) < 1:
        raise ValueError(
            f"quality is of depths {sorted(quality)}; it must be of at least {LEAST_DEPTHS}, each 1 or more"
        )
    if not all(math.isfinite(value) for value in quality.values()):
        raise ValueError(f"quality is {dict(quality)}; it must hold finite numbers")
    depths = np.array(sorted(quality), dtype=np.float64)
    values = np.array([quality[depth] for depth in sorted(quality)], dtype=np.float64)
    loops = depths - depths[0]

    # Below the lower end nothing but the shallowest depth differs from the limit, in floating point; beyond the upper
    # end the law is a straight line.
    low, high = math.log(np.diff(depths).min() / 36), math.log(1000 * loops[-1])
    if np.ptp(values) > 1e-12 * np.abs(values).max():
        grid = np.linspace(low, high, _GRID)
        best = int(np.argmin([_project(loops, values, x, measure).error for x in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
        while high - low > 1e-10:
            left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            if _project(loops, values, left, measure).error <= _project(loops, values, right, measure).error:
                high = right
            else:
                low = left
    found = _project(loops, values, low, measure)
    return DepthLaw(
        measure=measure,
        shallowest=int(depths[0]),
        deepest=int(depths[-1]),
        first=found.first,
        limit=found.limit,
        time_constant=math.exp(low),
        rms_error=found.error,
    )


class _Projection(NamedTuple):
    first: float
    limit: float
    error: float
    """Root mean square."""


def _project(loops: NDArray[np.float64], values: NDArray[np.float64], log_constant: float, measure: str) -> _Projection:
    """The best `first` and `limit` for a time constant: a line through the values over the share of the way gone."""
    gone = -np.expm1(-loops / math.exp(log_constant))
    from_mean = gone - gone.mean()
    change = from_mean @ (values - values.mean()) / (from_mean @ from_mean)
    first = values.mean() - change * gone.mean()
    limit = float(np.clip(first + change, *_BOUNDS[measure]))
    if limit != first + change:  # then a line through the limit, at which the share is 1
        left = 1 - gone
        first = limit + left @ (values - limit) / (left @ left)
    error = values - (first + (limit - first) * gone)
    return _Projection(float(first), limit, math.sqrt(error @ error / len(error)))
