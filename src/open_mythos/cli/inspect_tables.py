"""The tables that `mythos inspect` prints.

Main entries: `config_tables`, `model_tables`.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from open_mythos.analysis.inspection import ConfigReport, ModelReport
from open_mythos.analysis.routing import RoutingReport
from open_mythos.analysis.stability import StabilityReport

_DECIMAL = ("", "k", "M", "G", "T", "P", "E")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_PLAN_PARTS = ("weights", "gradients", "optimizer", "kv_cache", "activations", "total")


def config_tables(name: str, report: ConfigReport) -> Iterator[Table]:
    """Parameters by stage, FLOPs by loops, memory by use."""
    counts = report.parameters
    table = _table(f"{name}: parameters", "stage", "count", "share")
    for stage in ("embedding", "prelude", "recurrent", "coda", "head"):
        count = getattr(counts, stage)
        table.add_row(stage, _decimal(count), f"{count / counts.total:.1%}")
    table.add_section()
    table.add_row("total", _decimal(counts.total), "")
    table.add_row("active per token", _decimal(counts.active), f"{counts.active / counts.total:.1%}")
    yield table

    table = _table(f"FLOPs per token of {report.seq_len}", "loops", "FLOPs", "of one loop")
    table.caption = "matrix products only"
    for loops, flops in report.flops_by_loops.items():
        table.add_row(str(loops), _decimal(flops), f"{flops / report.flops.total(1):.2f}x")
    yield table

    sizes = f"{report.batch} x {report.seq_len} tokens, {report.n_loops} loops, {report.dtype}"
    table = _table(f"Memory, {sizes}", "", *report.plans)
    for part in _PLAN_PARTS:
        if part == "total":
            table.add_section()
        table.add_row(part.replace("_", " "), *(_binary(getattr(plan, part)) for plan in report.plans.values()))
    table.caption = "activations are an estimate, the rest is exact"
    yield table


def model_tables(report: ModelReport) -> Iterator[Table]:
    """Stability and routing on random tokens, or the names of the weights that are not finite."""
    if report.non_finite:
        table = _table("Weights that are not finite", "name")
        for name in report.non_finite:
            table.add_row(name)
        yield table
    if report.stability is not None and report.jacobian_radius is not None:
        yield _stability_table(report.stability, report.jacobian_radius)
    if report.routing is not None:
        yield _routing_table(report.routing)


def _stability_table(report: StabilityReport, jacobian_radius: float) -> Table:
    """The state's norm at loops 0, 1, 2, 4, ... beside its bound."""
    last = report.loops[-1].loop
    table = _table("State on random tokens", "loops", "mean norm", "largest norm", "proved bound")
    for norm in report.loops:
        if norm.loop & (norm.loop - 1) == 0 or norm.loop == last:
            table.add_row(str(norm.loop), f"{norm.mean:,.1f}", f"{norm.largest:,.1f}", f"{norm.bound:,.1f}")
    table.add_section()
    table.add_row("any", "", "", f"{report.limit:,.1f}")
    a = report.spectrum
    table.caption = (
        f"A: smallest {a.smallest:.4f}, mean {a.mean:.4f}, rho {a.rho:.4f}\n"
        f"Jacobian after {last} loops: rho {jacobian_radius:.4f}"
    )
    return table


def _routing_table(report: RoutingReport) -> Table:
    """Load of every layer over all loops."""
    table = _table("Expert load on random tokens", "layer", "busiest expert", "its share", "even share", "max / mean")
    for layer, load in enumerate(report.layers):
        shares = f"{load.shares[load.busiest]:.1%}", f"{1 / len(load.slots):.1%}"
        table.add_row(str(layer), str(load.busiest), *shares, f"{load.imbalance:.2f}")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _decimal(value: float) -> str:
    return _scaled(value, 1000, _DECIMAL)


def _binary(value: int) -> str:
    return "-" if value == 0 else _scaled(value, 1024, _BINARY)


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """Three significant digits and a unit."""
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    digits = f"{value:.0f}" if power == 0 or value >= 100 else f"{value:.3g}"
    return f"{digits} {units[power]}".rstrip()
