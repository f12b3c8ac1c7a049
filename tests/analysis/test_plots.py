"""Every measurement can be drawn."""

import builtins
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.figure import Figure

from open_mythos.analysis import plots
from open_mythos.analysis.depth_law import fit_depth_laws
from open_mythos.analysis.depth_sweep import SweepRow, depth_sweep
from open_mythos.analysis.halting import halting_matrix
from open_mythos.analysis.kv_memory import compare_kv_cache
from open_mythos.analysis.memory_plan import plan_inference, plan_training
from open_mythos.analysis.routing import expert_load
from open_mythos.analysis.stability import stability
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_1b, mythos_tiny
from tiny import random_ids, tiny_model

MODEL = tiny_model(mythos_tiny())
IDS = random_ids(MODEL.config, 2, 8)
ROWS = [
    SweepRow(length=length, n_loops=n, loss=None, accuracy=0.5 + 0.4 * (1 - 2 ** (-n / slow)), exact_match=None)
    for length, slow in ((24, 1), (48, 8))
    for n in (1, 2, 4, 8, 12)
]
DRAWINGS: dict[str, Callable[[], Figure]] = {
    "kv_cache": lambda: plots.kv_cache(
        compare_kv_cache(MODEL, OpenMythos(mythos_tiny().replace(attn_type="mla")), 8, 2)
    ),
    "memory_plan": lambda: plots.memory_plan(
        {"serve": plan_inference(mythos_1b()), "train": plan_training(mythos_1b())}
    ),
    "stability": lambda: plots.stability(stability(MODEL, IDS, 4)),
    "depth_sweep": lambda: plots.depth_sweep(depth_sweep(MODEL, (IDS, IDS), [1, 2, 4]), trained_loops=2, chance=0.5),
    "depth_sweep_loss": lambda: plots.depth_sweep(depth_sweep(MODEL, (IDS, IDS), [1, 2]), measure="loss"),
    "depth_sweep_laws": lambda: plots.depth_sweep(ROWS, laws=fit_depth_laws(ROWS, "accuracy", 8), target=0.85),
    "halting": lambda: plots.halting(halting_matrix(MODEL, IDS, 6)),
    "exit_loops": lambda: plots.exit_loops({"one": {1: 2.5, 2: 3.0}, "two": {1: 2.0, 2: 4.0}}, {"one": 5, "two": 6}),
    "expert_load": lambda: plots.expert_load(expert_load(MODEL, IDS, 3)),
    "training_loss": lambda: plots.training_loss([2.0, 1.0, 0.5, 0.4]),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_it_draws(name: str) -> None:
    figure = DRAWINGS[name]()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert len(file.getvalue()) > 5_000
    assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)


def test_laws_are_dashed_where_fitted_and_dotted_beyond_with_a_star_at_the_target() -> None:
    """Accuracy 0.85 is at 3 and 24 loops, and the fit, to 8 of 12 depths, is exact."""
    (axes,) = DRAWINGS["depth_sweep_laws"]().axes
    stars = [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "*"]
    assert stars == pytest.approx([3, 24])
    assert [text.get_text() for text in axes.texts] == ["3 loops", "24 loops"]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [(min(line.get_xdata()), max(line.get_xdata())) for line in dashed] == [(1, 8), (1, 8)]
    assert axes.get_xlim()[1] > 24
    far = plots.depth_sweep(ROWS, laws=fit_depth_laws(ROWS, "accuracy"), target=0.89999).axes[0]
    assert len([line for line in far.lines if line.get_marker() == "*"]) == 1, "the other is far beyond the depths"


def test_no_global_state_is_touched() -> None:
    DRAWINGS["training_loss"]()
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_missing_matplotlib_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'open-mythos\[plots\]'"):
        plots.training_loss([1.0])


def test_bad_input_is_named() -> None:
    rows = depth_sweep(MODEL, (IDS, IDS), [1], exact_match=False)
    with pytest.raises(ValueError, match="measure is 'speed'; it must be 'loss', 'accuracy' or 'exact_match'"):
        plots.depth_sweep(rows, measure="speed")
    with pytest.raises(ValueError, match="rows has no exact_match"):
        plots.depth_sweep(rows, measure="exact_match")
