"""Write a model folder from the newest whole checkpoint of a run, finished or not, of one process or many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from open_mythos.recipes.train import export


@dataclass(frozen=True)
class Arguments:
    """From where, to where."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="Folder of the run.")]
    out: Annotated[Path, tyro.conf.arg(help="Folder for the model.")]


def run(arguments: Arguments) -> None:
    """Load the checkpoint in one process and save the model."""
    console = Console()
    trained = export(arguments.run, arguments.out)
    for damaged in trained.damaged:
        console.print(f"A damaged checkpoint was passed over: {damaged}.", style="yellow", highlight=False)
    console.print(f"Model of step {trained.step}: [bold]{arguments.out}[/bold]")
