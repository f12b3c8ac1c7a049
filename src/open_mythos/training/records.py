"""The figures of a run, step by step, and where they are written.

Main entries: `StepRecord`, `Observer`, `JsonLines`, `TensorBoard`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one optimizer step tells."""

    step: int
    """From 0."""
    loss: float
    """Mean cross-entropy over counted tokens, in nats."""
    bits_per_byte: float | None
    accuracy: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens_per_second: float
    flop_utilisation: float | None
    """Share of the hardware's peak that the model's own products make up; None where the peak is not known."""
    mean_loops: float
    """Loops that the plan drew."""
    mean_exit_loops: float
    """Loops that positions ran."""
    ponder_cost: float
    movement: float | None
    """How far one loop more would move the last loop's state, mean square over channels; None without
    `settle_weight`."""
    state_norm: float
    """Root mean square of the state after the last loop."""
    a_low: float
    a_mean: float
    a_high: float
    finite: bool
    """Whether all of these figures are."""
    skipped: bool
    """The loss or the gradients were not finite, and nothing was changed."""
    load: list[list[list[float]]] | None
    """(loops, layers, experts): each routed expert's share of the slots; None without experts. With gradients through
    the last loops only, sequences end together, and so the last row is everybody's last loop."""


Rows = Sequence[Mapping[str, Any]]


class Observer:
    """Whoever wants to know how a run goes; called on the main rank. Override what you want to know."""

    def on_step(self, record: StepRecord) -> None:
        """A step is done."""

    def on_sweep(self, step: int, rows: Rows) -> None:
        """A depth sweep on held-out data after `step` steps; rows as `analysis.depth_sweep` gives them."""

    def on_message(self, text: str) -> None:
        """Something a person should read."""

    def close(self) -> None:
        """The run is over."""


class JsonLines(Observer):
    """One line per step and per sweep in `metrics.jsonl`; a resumed run cuts off what it will write again."""

    def __init__(self, folder: Path, first_step: int, load_every: int = 10) -> None:
        path = folder / METRICS_FILE
        kept = [line for line in _complete_lines(path) if line["step"] < first_step + ("sweep" in line)]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._load_every = load_every

    def on_step(self, record: StepRecord) -> None:
        line = asdict(record)
        if record.step % self._load_every:
            del line["load"]
        self._write(line)

    def on_sweep(self, step: int, rows: Rows) -> None:
        self._write({"step": step, "sweep": list(rows)})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(line)) + "\n")
        self._file.flush()


class TensorBoard(Observer):
    """The same figures for TensorBoard, in `DIR/tensorboard`."""

    def __init__(self, folder: Path, first_step: int, every: int = 10) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=first_step)
        self._every = every

    def on_step(self, record: StepRecord) -> None:
        if record.step % self._every:
            return
        for field in fields(record):
            value = getattr(record, field.name)
            if isinstance(value, float):
                self._writer.add_scalar(f"train/{field.name}", value, record.step)
        for t, layers in enumerate(record.load or []):
            for layer, shares in enumerate(layers):
                self._writer.add_scalar(f"busiest_expert/layer_{layer}/loop_{t}", max(shares), record.step)

    def on_sweep(self, step: int, rows: Rows) -> None:
        for row in rows:
            if row["loss"] is not None:
                self._writer.add_scalar(f"held_out_loss/{row['length']}/loops_{row['n_loops']}", row["loss"], step)

    def close(self) -> None:
        self._writer.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, without one that a killed process left half written."""
    return _complete_lines(folder / METRICS_FILE)


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: a process that is killed, or a machine that loses power, leaves others."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
