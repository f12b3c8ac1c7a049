"""How a training run goes, on the screen: a bar, the figures, the experts' load per loop; or lines where there is none.

Main entry: `Display`.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from open_mythos.recipes.train import Prepared
from open_mythos.training.records import Observer, Rows, StepRecord

_LINES = 40
"""Lines that a run leaves in a log file, where nothing can be redrawn."""
_SHADES = " ▁▂▃▄▅▆▇█"


class Display(Observer):
    """An observer that draws."""

    def __init__(self, console: Console, prepared: Prepared) -> None:
        self._console = console
        self._steps = prepared.run.training.steps
        self._every = max(1, self._steps // _LINES)
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )
        self._bar = self._progress.add_task("", total=self._steps, completed=prepared.first_step)
        parameters = sum(p.numel() for p in prepared.model.parameters())
        for note in (*prepared.material.notes, f"{parameters / 1e6:.2f}M parameters"):
            console.print(note, style="dim", highlight=False)
        self._live = Live(self._progress, console=console, refresh_per_second=4) if console.is_terminal else None
        if self._live is not None:
            self._live.start()

    def on_step(self, record: StepRecord) -> None:
        """Draw the step, or print every so many."""
        self._progress.update(self._bar, completed=record.step + 1)
        if self._live is not None:
            self._live.update(Group(self._progress, *_figures(record)))
        elif record.step % self._every == 0 or record.step + 1 == self._steps:
            self._console.print(_line(record), highlight=False, soft_wrap=True)

    def on_sweep(self, step: int, rows: Rows) -> None:
        """Print a depth sweep."""
        self._console.print(f"\nHeld-out data after {step} steps:")
        self._console.print(sweep_table(rows))

    def on_message(self, text: str) -> None:
        """Print it."""
        self._console.print(text, style="yellow", highlight=False)

    def close(self) -> None:
        """Leave the last figures on the screen."""
        if self._live is not None:
            self._live.stop()


def sweep_table(rows: Rows) -> Table:
    """Rows of a depth sweep as a table, columns without any figure left out."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    names = [name for name in ("length", "n_loops", "loss", "accuracy", "exact_match") if _present(name, rows)]
    for name in names:
        table.add_column({"n_loops": "loops", "exact_match": "all right"}.get(name, name), justify="right")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in names))
    return table


def _present(name: str, rows: Rows) -> bool:
    return any(row[name] is not None for row in rows)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _line(record: StepRecord) -> str:
    parts = [f"step {record.step + 1}", *(f"{name} {value}" for name, value in _pairs(record))]
    return "  ".join(parts)


def _pairs(record: StepRecord) -> list[tuple[str, str]]:
    pairs = [("loss", f"{record.loss:.4f}")]
    if record.bits_per_byte is not None:
        pairs.append(("bits/byte", f"{record.bits_per_byte:.3f}"))
    pairs += [
        ("accuracy", f"{record.accuracy:.3f}"),
        ("loops", f"{record.mean_exit_loops:.1f}"),
        ("gradient", f"{record.grad_norm:.2f}"),
        ("state", f"{record.state_norm:.2f}"),
        ("A", f"{record.a_low:.2f}..{record.a_high:.2f}"),
        ("rate", f"{record.learning_rate:.1e}"),
        ("tokens/s", f"{record.tokens_per_second:,.0f}"),
    ]
    if record.flop_utilisation is not None:
        pairs.append(("utilisation", f"{record.flop_utilisation:.0%}"))
    if record.load is not None:
        pairs.append(("busiest expert", f"{max(max(layer) for loop in record.load for layer in loop):.0%}"))
    return [*pairs, ("", "skipped")] if record.skipped else pairs


def _figures(record: StepRecord) -> list[Any]:
    grid = Table.grid(padding=(0, 3))
    pairs = _pairs(record)
    for start in range(0, len(pairs), 5):
        row = pairs[start : start + 5]
        grid.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in row))
    return [grid] if record.load is None else [grid, _loads(record.load)]


def _loads(load: list[list[list[float]]]) -> Text:
    """One bar per expert for every loop and layer; a full block is twice an even share."""
    text = Text("expert load by loop ", style="dim")
    for t, layers in enumerate(load[:16]):
        text.append(f" {t + 1}:", style="dim")
        for shares in layers:
            text.append("".join(_shade(share * len(shares) / 2) for share in shares), style="cyan")
            text.append(" ")
    return text


def _shade(part: float) -> str:
    return _SHADES[min(len(_SHADES) - 1, round(part * (len(_SHADES) - 1)))]
