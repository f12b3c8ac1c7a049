"""Quality of a trained model as a function of its loops, on the held-out data of the run that trained it.

One pass at the greatest depth answers for all of them. With --json the rows are written as
{"length", "n_loops", "loss", "accuracy", "exact_match"}. From three depths on, each length gets a law: what is left to
gain shrinks by the same factor with every loop. --target asks it for the loops to a loss (of a task: an accuracy);
--fit-loops N tests it: fitted up to N loops, it predicts the deeper ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from open_mythos.analysis.depth_law import LEAST_DEPTHS, DepthLaw, fit_depth_laws
from open_mythos.analysis.depth_sweep import SweepRow
from open_mythos.cli.depth_law import law_entry, law_lines
from open_mythos.cli.train_display import sweep_table
from open_mythos.model.folder import CONFIG_FILE
from open_mythos.model.mythos import OpenMythos
from open_mythos.recipes.folder import RunFolder
from open_mythos.recipes.material import Material, open_material, positions, sweep_loops, sweep_rows
from open_mythos.recipes.run_config import RunConfig, TaskRun
from open_mythos.recipes.train import newest


@dataclass(frozen=True)
class Arguments:
    """Which model, at which depths."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="Folder of a run of mythos train.")]
    loops: Annotated[str, tyro.conf.arg(help="Depths, such as 1,2,4,8; by default the run's own.")] = ""
    lengths: Annotated[str, tyro.conf.arg(help="Lengths, such as 24,48; by default the run's own.")] = ""
    rows: Annotated[int | None, tyro.conf.arg(help="Held-out rows or problems of each length.")] = None
    json: Annotated[Path | None, tyro.conf.arg(help="Write the rows to this file.")] = None
    plot: Annotated[Path | None, tyro.conf.arg(help="Draw the curve into this PNG file.")] = None
    target: Annotated[float | None, tyro.conf.arg(help="Predict the loops to this loss (task: accuracy).")] = None
    fit_loops: Annotated[int | None, tyro.conf.arg(help="Fit the law to depths up to this only.")] = None
    law: Annotated[Path | None, tyro.conf.arg(help="Write the law of each length to this file.")] = None


def run(arguments: Arguments) -> None:
    """Measure, print, and write what was asked for."""
    console = Console()
    folder = RunFolder(arguments.model)
    loops, lengths = numbers("loops", arguments.loops), numbers("lengths", arguments.lengths)
    described = folder.read()
    for name, file in (("json", arguments.json), ("plot", arguments.plot), ("law", arguments.law)):
        if file is not None and file.is_dir():
            raise ValueError(f"{name} is {file}, which is a folder; it must be a file")
    if arguments.rows is not None and arguments.rows < 1:
        raise ValueError(f"rows is {arguments.rows}; it must be at least 1")
    _check_lengths(described, lengths or [])
    depths = loops or sweep_loops(described)
    measure = "accuracy" if isinstance(described, TaskRun) else "loss"
    _check_law(arguments, depths, measure)
    with console.status("measuring"):
        model, material = _trained(folder, described, console)
        n_rows = arguments.rows or sweep_rows(described, final=True)
        rows = material.sweep(model, depths, n_rows, lengths)
    console.print(f"{arguments.model}: held-out data, up to {n_rows} rows of each length", highlight=False)
    console.print(sweep_table(rows))
    laws = fit_depth_laws(rows, measure, arguments.fit_loops)
    if laws:
        console.print("Law: limit + (first - limit) * exp(-(loops - first depth) / time constant)", style="dim")
        for line in law_lines(laws, rows, arguments.target):
            console.print(line, highlight=False, soft_wrap=True)
    _write(arguments, rows, laws, measure)


def _write(arguments: Arguments, rows: list[SweepRow], laws: dict[int, DepthLaw], measure: str) -> None:
    """The files that were asked for."""
    for file in (arguments.json, arguments.plot, arguments.law):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if arguments.law is not None:
        found = [law_entry(length, law, arguments.target) for length, law in sorted(laws.items())]
        arguments.law.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        from open_mythos.analysis import plots

        picture = plots.depth_sweep(rows, measure=measure, laws=laws, target=arguments.target)
        picture.savefig(arguments.plot, dpi=150)


def _trained(folder: RunFolder, described: RunConfig, console: Console) -> tuple[OpenMythos, Material]:
    """The model of a run, finished or not, and its data."""
    if (folder.path / CONFIG_FILE).is_file():
        return OpenMythos.from_pretrained(folder.path), open_material(described, folder.data, pinned=True)
    trained = newest(folder.path)
    console.print(f"The run is not finished: this is its checkpoint of step {trained.step}.", style="yellow")
    return trained.model, trained.material


def _check_lengths(run: RunConfig, lengths: list[int]) -> None:
    most = run.model.max_seq_len
    for length in lengths:
        taken = positions(run, length)
        if taken > most:
            takes = "" if taken == length else f", which takes {taken} positions"
            they = "it" if taken == length else "they"
            raise ValueError(f"lengths has {length}{takes}; {they} must be at most max_seq_len ({most})")


def _check_law(arguments: Arguments, depths: Sequence[int], measure: str) -> None:
    """Before anything is measured, that a law can be fitted if it was asked for."""
    target, most = arguments.target, arguments.fit_loops
    if target is not None and not (0 <= target < math.inf and (measure == "loss" or target <= 1)):
        accepted = "a loss, at least 0" if measure == "loss" else "an accuracy, from 0 to 1"
        raise ValueError(f"target is {target}; it must be {accepted}")
    fitted = {depth for depth in depths if most is None or depth <= most}
    if len(fitted) < LEAST_DEPTHS and (target, most, arguments.law) != (None, None, None):
        where = "" if most is None else f" up to fit_loops ({most})"
        raise ValueError(f"loops has {len(fitted)} depths{where}; for a law it must have at least {LEAST_DEPTHS}")


def numbers(name: str, text: str) -> list[int] | None:
    """Integers of at least 1, separated by commas; None for no text."""
    if not text:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise ValueError(f"{name} is {text!r}; it must be integers of at least 1, separated by commas")
    return [int(word) for word in words]
