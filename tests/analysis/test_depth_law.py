"""The law of quality against loops: it finds what made exact figures, and says how far it is from others."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.analysis.depth_law import DepthLaw, fit_depth_law, fit_depth_laws

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
# Held-out loss of the tiny Shakespeare run in docs/training.md: it falls to 3 loops and then drifts up a little.
SHAKESPEARE = {1: 1.6286, 2: 1.6107, 3: 1.6085, 4: 1.6091, 6: 1.6115, 8: 1.6131, 12: 1.6141, 16: 1.6142}
# Accuracy on 48 bits of a parity model trained with at most 3 loops, by the knob alone: first nothing, then much.
LATE = {1: 0.52, 2: 0.54, 4: 0.6, 8: 0.78, 16: 0.95, 32: 0.985}


def _law(measure: str, first: float, limit: float, constant: float) -> DepthLaw:
    return DepthLaw(
        measure=measure,
        shallowest=1,
        deepest=16,
        first=first,
        limit=limit,
        time_constant=constant,
        rms_error=0.0,
    )


losses = st.builds(
    lambda limit, gain, constant: _law("loss", limit + gain, limit, constant),
    st.floats(0.5, 4),
    st.floats(0.05, 3),
    st.floats(0.5, 20),
)
accuracies = st.builds(
    lambda first, gain, constant: _law("accuracy", first, first + gain * (1 - first), constant),
    st.floats(0.0, 0.9),
    st.floats(0.1, 1),
    st.floats(0.5, 20),
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(law=losses | accuracies)
def test_exact_figures_give_back_what_made_them(law: DepthLaw) -> None:
    found = fit_depth_law({n: law.predict(n) for n in DEPTHS}, law.measure)
    assert found.first == pytest.approx(law.first, abs=1e-6)
    assert found.limit == pytest.approx(law.limit, rel=1e-6, abs=1e-6)
    assert found.time_constant == pytest.approx(law.time_constant, rel=1e-6)
    assert found.rms_error < 1e-9


@settings(max_examples=25, deadline=None, derandomize=True)
@given(law=losses, seed=st.integers(0, 10_000))
def test_noise_moves_predictions_by_about_as_much(law: DepthLaw, seed: int) -> None:
    """With noise of 1% of the gain: within the depths by 3% of it; beyond, twice as deep, by what is left as well."""
    gain, noise = law.first - law.limit, random.Random(seed)
    found = fit_depth_law({n: law.predict(n) + 0.01 * gain * noise.uniform(-1, 1) for n in DEPTHS}, "loss")
    assert found.rms_error <= 0.01 * gain
    assert all(abs(found.predict(n) - law.predict(n)) < 0.03 * gain for n in DEPTHS)
    assert abs(found.predict(32) - law.predict(32)) < (0.03 + 0.5 * (1 - law.covered)) * gain


@settings(max_examples=30, deadline=None, derandomize=True)
@given(law=losses | accuracies, share=st.floats(0.01, 0.99))
def test_predictions_go_one_way_and_loops_for_is_their_inverse(law: DepthLaw, share: float) -> None:
    predicted = [law.predict(n) for n in range(1, 80)]
    assert predicted == sorted(predicted, reverse=law.measure == "loss")
    target = law.first + share * (law.limit - law.first)
    loops = law.loops_for(target)
    assert loops is not None
    assert law.predict(loops) == pytest.approx(target, rel=1e-9)


def test_a_target_is_met_at_one_loop_or_out_of_reach_or_between() -> None:
    law = _law("loss", 2.0, 1.0, 4.0)
    assert law.loops_for(2.5) == law.loops_for(2.0) == 1
    assert law.loops_for(1 + 1 / math.e) == pytest.approx(5)
    assert law.loops_for(1.0) is law.loops_for(0.9) is None
    rising = _law("accuracy", 0.5, 0.9, 4.0)
    assert rising.loops_for(0.4) == 1
    assert rising.loops_for(0.9 - 0.4 / math.e) == pytest.approx(5)
    assert rising.loops_for(0.95) is None
    worse = _law("loss", 1.0, 2.0, 4.0)
    assert worse.loops_for(1.5) == 1, "it is best at one loop"
    assert worse.loops_for(0.5) is None


def test_nothing_is_said_of_fewer_loops_than_were_measured() -> None:
    """Backwards an exponential that is level after its first depth exceeds every number."""
    law = fit_depth_law({50: 2.0, 51: 1.0, 52: 1.0}, "loss")
    assert law.loops_for(3.0) == 50
    assert law.loops_for(1.5) == pytest.approx(50, abs=0.1)
    with pytest.raises(ValueError, match=r"n_loops is 1; it must be at least the shallowest depth \(50\)"):
        law.predict(1)


def test_the_deepest_point_of_a_trained_curve_is_predicted_from_the_others() -> None:
    """Within 0.3%, though the curve turns around after 3 loops: the law goes level where the curve climbs by 0.35%."""
    law = fit_depth_law({n: loss for n, loss in SHAKESPEARE.items() if n <= 6}, "loss")
    assert abs(law.predict(16) - SHAKESPEARE[16]) < 0.003 * SHAKESPEARE[16]
    law = fit_depth_law({n: loss for n, loss in SHAKESPEARE.items() if n < 16}, "loss")
    assert abs(law.predict(16) - SHAKESPEARE[16]) < 0.002 * SHAKESPEARE[16]


def test_curves_of_another_form_show_in_the_error() -> None:
    """In shares of the gain: a saturating curve under 1%, one that turns around or starts late far more."""
    for quality, measure, least in ((SHAKESPEARE, "loss", 0.1), (LATE, "accuracy", 0.02)):
        law = fit_depth_law(quality, measure)
        assert law.rms_error > least * abs(law.limit - law.first)
    turns = fit_depth_law({1: 0.9, 2: 0.2, 3: 0.9}, "accuracy")
    assert turns.rms_error > 0.2


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_quality_that_does_not_change_is_its_own_limit(value: float) -> None:
    law = fit_depth_law(dict.fromkeys(DEPTHS, value), "accuracy")
    assert (law.first, law.limit, law.rms_error) == pytest.approx((value, value, 0), abs=1e-12)
    assert law.predict(100) == pytest.approx(value)
    assert law.loops_for(value - 0.1) == 1
    assert law.loops_for(value + 0.1) is None


@pytest.mark.parametrize(
    "quality",
    [
        {1: 0.5, 2: 0.6, 3: 0.7, 4: 0.8},
        {1: 0.5, 2: 0.51, 4: 0.6, 8: 0.99},
        {2: 0.0, 3: 0.0, 50: 1.0},
        {1: 1.0, 2: 0.5, 3: 0.1, 4: 0.0},
    ],
)
def test_an_accuracy_saturates_at_what_an_accuracy_can_be(quality: dict[int, float]) -> None:
    """Straight and accelerating curves have no limit of their own: unbounded least squares would put it anywhere."""
    law = fit_depth_law(quality, "accuracy")
    assert 0 <= law.limit <= 1
    assert all(-0.2 < law.predict(n) < 1.2 for n in quality)


def test_a_law_tells_how_much_of_it_was_seen() -> None:
    assert _law("loss", 2.0, 1.0, 15.0).covered == pytest.approx(1 - 1 / math.e)
    straight = fit_depth_law({n: 2.0 - 0.001 * n for n in DEPTHS}, "loss")
    assert straight.covered < 0.1


def test_it_takes_three_depths_and_figures() -> None:
    for depths in ((), (1,), (1, 2), (0, 1, 2)):
        with pytest.raises(ValueError, match="must be of at least 3"):
            fit_depth_law(dict.fromkeys(depths, 1.0), "loss")
    with pytest.raises(ValueError, match="finite"):
        fit_depth_law({1: 1.0, 2: math.nan, 3: 1.0}, "loss")
    with pytest.raises(ValueError, match="measure is 'speed'"):
        fit_depth_law({1: 1.0, 2: 0.5, 3: 0.4}, "speed")


def test_a_sweep_has_a_law_for_each_length_with_three_depths() -> None:
    def rows(length: int, depths: tuple[int, ...]) -> list[dict]:
        none = {"accuracy": None, "exact_match": None}
        return [{"length": length, "n_loops": n, "loss": 1 + 2.0**-n, **none} for n in depths]

    laws = fit_depth_laws([*rows(8, (1, 2, 4)), *rows(16, (1, 2)), *rows(24, (1, 2, 4, 8))], "loss")
    assert sorted(laws) == [8, 24]
    assert laws[24].limit == pytest.approx(1, abs=1e-6)
    assert laws[24].time_constant == pytest.approx(1 / math.log(2))
    assert fit_depth_laws(rows(24, (1, 2, 4, 8)), "loss", most=4)[24].deepest == 4
    assert not fit_depth_laws(rows(24, (1, 2, 4, 8)), "accuracy")
    broken = [{**row, "loss": math.nan} if row["n_loops"] == 8 else row for row in rows(24, (1, 2, 4, 8))]
    assert not fit_depth_laws(broken, "loss")
    assert fit_depth_laws(broken, "loss", most=4)
