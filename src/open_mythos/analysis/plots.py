"""One picture per measurement.

Main entries: the functions named after what they draw; each returns a matplotlib `Figure` and touches no global state.
Matplotlib is an optional package, imported when the first picture is drawn. Colours are Okabe and Ito's, which remain
distinct without colour vision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from open_mythos.analysis.depth_law import DepthLaw, whole_loops
from open_mythos.analysis.depth_sweep import SweepRow
from open_mythos.analysis.halting import HaltingReport
from open_mythos.analysis.kv_memory import KVCacheComparison
from open_mythos.analysis.memory_plan import MemoryPlan
from open_mythos.analysis.routing import RoutingReport
from open_mythos.analysis.stability import StabilityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
_SERIES = (_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#666666"
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "kv_cache": "KV cache",
    "activations": "activations",
}


def require_matplotlib() -> None:
    """Raise `ImportError` with what to install if nothing can be drawn: to be asked before long work, not after."""
    _figure(1, 1)


def kv_cache(comparison: KVCacheComparison) -> Figure:
    """Measured and planned cache bytes of both models, as bars."""
    figure = _figure(6, 3.6)
    axes = _axes(figure, f"KV cache: MLA is {comparison.ratio:.2f}x smaller")
    sizes = (comparison.gqa, comparison.mla)
    for offset, label, colour, kinds in (
        (-0.2, "measured", _BLUE, [size.measured for size in sizes]),
        (0.2, "planned", _SKY, [size.planned for size in sizes]),
    ):
        bars = axes.bar(
            [place + offset for place in range(2)], [n / 1024 for n in kinds], 0.38, label=label, color=colour
        )
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_xticks(range(2), ["GQA", "MLA"])
    axes.set_ylabel(f"KiB for {comparison.seq_len} tokens\nand {comparison.n_loops} loops")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    return figure


def memory_plan(plans: Mapping[str, MemoryPlan]) -> Figure:
    """Plans by name as stacked horizontal bars, in GiB, or in MiB if all are below one GiB."""
    figure = _figure(8, 1.6 + 0.55 * len(plans))
    axes = _axes(figure, "Memory plan", grid="x")
    unit, name = (2**30, "GiB") if max(plan.total for plan in plans.values()) >= 2**30 else (2**20, "MiB")
    left = [0.0] * len(plans)
    for part, colour in zip(_PARTS, _SERIES, strict=False):
        widths = [getattr(plan, part) / unit for plan in plans.values()]
        if any(widths):
            axes.barh(list(plans), widths, 0.6, left=left, label=_PARTS[part], color=colour)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:,.1f} {name}", va="center")
    axes.set_xlim(0, max(left) * 1.18)
    axes.set_xlabel(name)
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.28 / len(plans) ** 0.5))
    return figure


def stability(report: StabilityReport) -> Figure:
    """The entries of A, and the state's norm at each loop beside its bound."""
    figure = _figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    _style(left, f"Spectrum of A: rho = {report.spectrum.rho:.3f}, always below 1")
    left.plot(range(1, len(report.spectrum.values) + 1), report.spectrum.values, color=_BLUE, linewidth=2)
    left.axhline(1, color=_RED, linestyle="--", linewidth=1)
    left.set(xlabel="channel, sorted", ylabel="entry of A", ylim=(0, 1.08))
    _style(right, "State norm: proved bound and observation")
    shown = [norm for norm in report.loops if norm.largest > 0]  # a state that starts at zero has no logarithm
    loops = [norm.loop for norm in shown]
    for label, colour, style, values in (
        ("bound", _RED, "--", [norm.bound for norm in shown]),
        ("largest observed", _ORANGE, "-", [norm.largest for norm in shown]),
        ("mean observed", _BLUE, "-", [norm.mean for norm in shown]),
    ):
        right.plot(loops, values, color=colour, linestyle=style, linewidth=2, label=label)
    right.set(xlabel="loops", ylabel="l2 norm of the state", yscale="log")
    _whole_numbers(right.xaxis)
    right.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def depth_sweep(
    rows: Sequence[SweepRow],
    trained_loops: int | None = None,
    measure: str = "accuracy",
    chance: float | None = None,
    laws: Mapping[int, DepthLaw] | None = None,
    target: float | None = None,
) -> Figure:
    """A measure of the sweep against loops, one line per length; marks the trained depth and the level of chance.

    `laws` by length are drawn dashed, dotted beyond what they were fitted to, and the loops that each takes to `target`
    marked with a star, if they are at most four times the deepest depth.
    """
    figure = _figure(7.5, 4.2)
    axes = _axes(figure, f"Depth sweep: {measure.replace('_', ' ')} by loops")
    drawn = [row for row in rows if _value(row, measure) is not None]
    if not drawn:
        raise ValueError(f"rows has no {measure}; it must have at least one row where that is not None")
    lengths = sorted({row["length"] for row in drawn})
    depths = sorted({row["n_loops"] for row in drawn})
    most = max([depths[-1], *_loops_to_mark(laws or {}, target, 4 * depths[-1])])
    room = 1.1 if most == depths[-1] else 1.6  # beyond the depths stands a star with its label
    for index, length in enumerate(lengths):
        points = [(row["n_loops"], _value(row, measure)) for row in drawn if row["length"] == length]
        colour, marker = _SERIES[index % len(_SERIES)], _MARKERS[index % len(_MARKERS)]
        law = (laws or {}).get(length)
        width = 2 if law is None else 0.5
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, linewidth=width, label=f"length {length}")
        if law is not None:
            _law(axes, law, colour, most, target)
    if trained_loops is not None:
        axes.axvspan(0.9, trained_loops, color=_GREY, alpha=0.12, label=f"trained: up to {trained_loops} loops")
    if chance is not None:
        axes.axhline(chance, color=_GREY, linestyle=":", label="chance")
    if target is not None:
        axes.axhline(target, color=_GREY, linestyle=":", label=f"target {target:g}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.set(xlabel="loops at inference (log scale)", ylabel=measure.replace("_", " "), xlim=(0.9, most * room))
    if measure != "loss":
        axes.set_ylim(min(0.5, *(_value(row, measure) or 0.0 for row in drawn)) - 0.04, 1.04)
    axes.legend(frameon=False, loc="best")
    return figure


def halting(report: HaltingReport) -> Figure:
    """Who still runs, loops by positions, and the exit loop of every position over it."""
    matrix = report.running
    figure = _figure(8, 1.8 + 0.22 * min(len(matrix), 16))
    axes = figure.subplots()
    image = axes.imshow(matrix, aspect="auto", cmap="cividis", vmin=0, vmax=1, origin="lower", extent=_cells(matrix))
    figure.colorbar(image, ax=axes, label="share of sequences still looping", pad=0.02)
    positions = range(len(matrix[0]))
    axes.step(positions, report.mean_exit_by_position, where="mid", color="white", linewidth=3.5)
    axes.step(positions, report.mean_exit_by_position, where="mid", color=_RED, linewidth=2)
    axes.set_title(f"Halting (line: exit loop): {report.mean_exit:.1f} of {report.n_loops} loops run on average")
    axes.set(xlabel="position", ylabel="loop")
    _whole_numbers(axes.xaxis, axes.yaxis)
    return figure


def exit_loops(runs: Mapping[str, Mapping[int, float]], fixed: Mapping[str, int]) -> Figure:
    """The mean exit loop of the positions that need so many loops, one line per run; its `fixed` loops, dashed."""
    figure = _figure(7.5, 4.2)
    axes = _axes(figure, "Adaptive depth: a position runs the loops that it needs")
    for index, (name, exits) in enumerate(runs.items()):
        colour, marker = _SERIES[index % len(_SERIES)], _MARKERS[index % len(_MARKERS)]
        axes.plot(list(exits), list(exits.values()), marker=marker, markersize=5, color=colour, label=name)
        axes.axhline(fixed[name], color=colour, linestyle="--", linewidth=1)
    most = max(max(exits) for exits in runs.values())
    axes.plot([1, most], [1, most], color=_GREY, linestyle=":", label="loops needed")
    axes.plot([], [], color=_GREY, linestyle="--", linewidth=1, label="fixed loops, as accurate")
    axes.set(xlabel="loops that the task needs at a position", ylabel="mean exit loop", ylim=(0, None))
    _whole_numbers(axes.xaxis, axes.yaxis)
    axes.legend(frameon=False, loc="lower right")
    return figure


def expert_load(report: RoutingReport, layer: int = 0) -> Figure:
    """Share of each expert at every loop, as a heat map; its title names the busiest expert."""
    figure = _figure(8, 1.8 + 0.22 * min(len(report.loops), 16))
    axes = figure.subplots()
    shares = [loop[layer].shares for loop in report.loops]
    total = report.layers[layer]
    image = axes.imshow(shares, aspect="auto", cmap="cividis", vmin=0, origin="lower", extent=_cells(shares))
    figure.colorbar(image, ax=axes, label="share of slots", pad=0.02)
    busiest = f"expert {total.busiest} is busiest with {total.shares[total.busiest]:.1%}"
    axes.set_title(f"Expert load: {busiest}, an even share is {1 / len(total.slots):.1%}")
    axes.set(xlabel="expert", ylabel="loop")
    _whole_numbers(axes.xaxis, axes.yaxis)
    return figure


def training_loss(losses: Sequence[float], window: int = 20) -> Figure:
    """The loss of each step, and its running mean over `window` steps."""
    figure = _figure(7.5, 3.6)
    axes = _axes(figure, "Training loss")
    axes.plot(losses, color=_SKY, linewidth=0.8, alpha=0.7, label="each step")
    means = [sum(part) / len(part) for part in _trailing(losses, window)]
    axes.plot(means, color=_BLUE, linewidth=2, label=f"mean of the last {window}")
    axes.set(xlabel="step", ylabel="cross-entropy (nats)", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def _law(axes: Axes, law: DepthLaw, colour: str, most: float, target: float | None) -> None:
    """The curve, dashed where it was fitted and dotted beyond, and a star where it meets the target."""
    for first, last, style, label in (
        (law.shallowest, law.deepest, "--", f"law: towards {law.limit:.4f}"),
        (law.deepest, most, ":", None),
    ):
        loops = [first * (last / first) ** (step / 200) for step in range(201)]
        axes.plot(loops, [law.predict(n) for n in loops], color=colour, linestyle=style, linewidth=2, label=label)
    if target is None:
        return
    for met in _loops_to_mark({0: law}, target, most):
        axes.plot([met], [target], "*", markersize=16, color=colour, markeredgecolor="white", zorder=3)
        # In the corner that the curve leaves empty.
        offset = (9, 9) if law.measure == "loss" else (9, -16)
        axes.annotate(f"{whole_loops(met)} loops", (met, target), offset, textcoords="offset points", color=colour)


def _loops_to_mark(laws: Mapping[int, DepthLaw], target: float | None, most: float) -> list[float]:
    """The loops that the laws take to the target, where that is not beyond `most`."""
    met = [law.loops_for(target) for law in laws.values() if target is not None]
    return [loops for loops in met if loops is not None and loops <= most]


def _value(row: SweepRow, measure: str) -> float | None:
    if measure not in ("loss", "accuracy", "exact_match"):
        raise ValueError(f"measure is {measure!r}; it must be 'loss', 'accuracy' or 'exact_match'")
    value = row[measure]  # type: ignore[literal-required]
    return None if value is None else float(value)


def _trailing(values: Sequence[float], window: int) -> Iterator[Sequence[float]]:
    for end in range(1, len(values) + 1):
        yield values[max(0, end - window) : end]


def _cells(matrix: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """The image's extent: columns count from 0, and rows, the loops, from 1."""
    return (-0.5, len(matrix[0]) - 0.5, 0.5, len(matrix) + 0.5)


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches at 100 dots per inch."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'open-mythos[plots]'") from error
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _axes(figure: Figure, title: str, grid: Any = "y") -> Axes:
    axes = figure.subplots()
    _style(axes, title, grid)
    return axes


def _style(axes: Axes, title: str, grid: Any = "y") -> None:
    axes.set_title(title)
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_numbers(*scales: Axis) -> None:
    """No ticks between whole numbers: loops, positions and experts are counted."""
    from matplotlib.ticker import MaxNLocator

    for scale in scales:
        scale.set_major_locator(MaxNLocator(integer=True))
