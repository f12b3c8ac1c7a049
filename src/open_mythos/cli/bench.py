"""Speed beside open-mythos 0.5.0 and beside what the hardware allows, side by side in one run.

The peer is installed without its dependencies into a folder of its own and loaded under another name; without a network
its columns stay empty.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from open_mythos.bench.cases import CASES, Measured, run_case
from open_mythos.bench.peer import PEER, PeerUnavailableError, load_peer
from open_mythos.bench.timing import read_bandwidth
from open_mythos.training.hardware import matmul_peak


@dataclass(frozen=True)
class Arguments:
    """What to time, and for how long."""

    only: Annotated[str, tyro.conf.arg(help="Run the cases whose name, such as train-small-gqa, contains this.")] = ""
    seconds: Annotated[float, tyro.conf.arg(help="Time for each case.")] = 10.0
    peer_dir: Annotated[Path, tyro.conf.arg(help="Where the peer is kept.")] = Path(".bench/peer")
    json: Annotated[Path | None, tyro.conf.arg(help="Also write the rows here.")] = None


def run(arguments: Arguments) -> None:
    """Time every case and print a table."""
    console = Console()
    cases = [case for case in CASES if arguments.only in f"{case.task}-{case.size}"]
    if not cases:
        names = ", ".join(f"{case.task}-{case.size}" for case in CASES)
        raise ValueError(f"only is {arguments.only!r}; it must be part of one of {names}")
    try:
        peer = load_peer(arguments.peer_dir)
    except PeerUnavailableError as error:
        console.print(f"[yellow]No comparison: {error}")
        peer = None
    flops, bandwidth = matmul_peak(), read_bandwidth()
    console.print(
        f"Measured peaks: {flops / 1e9:.0f} GFLOP/s in float32 products, {bandwidth / 1e9:.1f} GB/s of reading."
    )
    measured: list[Measured] = []
    for case in cases:
        with console.status(f"timing {case.task} {case.size}"):
            measured.append(run_case(case, peer, arguments.seconds, flops, bandwidth))
    console.print(_table(measured))
    if arguments.json is not None:
        rows = [one.to_dict() for one in measured]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _table(measured: list[Measured]) -> Table:
    title = f"Median milliseconds (per token for decode), beside {PEER}; M: million parameters"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for name in ("M", "peer M", "ms", "peer ms", "faster", "floor ms", "x floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in measured:
        row = one.to_dict()
        table.add_row(
            f"{one.case.task} {one.case.size} T={one.case.n_loops}",
            _number(one.parameters / 1e6),
            _number(None if one.peer_parameters is None else one.peer_parameters / 1e6),
            _number(one.ours * 1e3),
            _number(None if one.peer is None else one.peer * 1e3),
            _number(one.speedup),
            _number(one.floor * 1e3),
            _number(row["times_floor"]),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
