"""The guided tour: train a small model in about two minutes, turn its loop knob, and see every promise measured.

Writes `report.html`, `results.json`, the pictures and the trained model folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from open_mythos import __version__
from open_mythos.analysis.plots import require_matplotlib
from open_mythos.analysis.report import Section, format_cell, render_page
from open_mythos.tour.parts import Part, as_data, run_parts
from open_mythos.tour.recipe import TourRecipe, Trained, tour_recipe, train

TITLE = "OpenMythos: a guided tour"
INTRODUCTION = (
    "A recurrent-depth transformer runs one block again and again with the same weights. How often is chosen at "
    "inference. This page was written by `mythos demo` from a model that it trained just before: its figures were "
    "measured in that run, and those that are planned say so."
)


@dataclass(frozen=True)
class Arguments:
    """Where to write, and how to train."""

    out: Annotated[Path, tyro.conf.arg(help="Folder for the report, the results and the model.")] = Path("mythos_tour")
    seed: Annotated[int, tyro.conf.arg(help="Seed of the weights and of all data.")] = 0
    steps: Annotated[int | None, tyro.conf.arg(help="Training steps; with fewer, the model learns less.")] = None


def run(arguments: Arguments) -> None:
    """Train, measure, print, write."""
    require_matplotlib()
    recipe = tour_recipe(arguments.seed, arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    parts: list[Part] = []
    with _one_thread():
        trained = _train_with_progress(recipe, console)
        for number, part in enumerate(run_parts(recipe, trained), start=1):
            _print_section(console, number, part.section)
            parts.append(part)
    _write(arguments.out, recipe, trained, parts)
    console.print(f"\nReport: [bold]{arguments.out / 'report.html'}[/bold]  (open it in a browser)")
    console.print(f"Look inside the model: mythos inspect {arguments.out / 'model'}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain little from a second thread; on a busy machine, waiting for it is 7 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_with_progress(recipe: TourRecipe, console: Console) -> Trained:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        bar = progress.add_task("training", total=recipe.run.training.steps, loss="")
        return train(recipe, lambda done, loss: progress.update(bar, completed=done, loss=f"loss {loss:.3f}"))


def _print_section(console: Console, number: int, section: Section) -> None:
    console.rule(f"[bold]{number}  {section.title}", align="left")
    console.print(section.text, highlight=False)
    if section.rows:
        table = Table(*section.rows[0], box=None, padding=(0, 2), header_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in section.rows:
            table.add_row(*map(format_cell, row.values()))
        console.print()
        console.print(table)
        console.print()
    if section.preformatted:
        console.print(f"\n{section.preformatted}\n", highlight=False, markup=False)
    if section.verdict:
        console.print(f"[bold green]{section.verdict}", highlight=False)
    console.print()


def _write(out: Path, recipe: TourRecipe, trained: Trained, parts: list[Part]) -> None:
    for part in parts:
        for name, picture in part.section.pictures.items():
            (out / f"{name}.png").write_bytes(picture)
    trained.model.save_pretrained(out / "model")
    (out / "results.json").write_text(json.dumps(as_data(recipe, parts), indent=2) + "\n", encoding="utf-8")
    footer = f"open-mythos {__version__}, PyTorch {torch.__version__}, seed {recipe.seed}."
    page = render_page(TITLE, INTRODUCTION, [part.section for part in parts], footer)
    (out / "report.html").write_text(page, encoding="utf-8")
