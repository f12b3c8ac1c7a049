"""What a run learns from and is measured on.

Main entry: `open_material`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from open_mythos.analysis.depth_sweep import SweepRow, depth_sweep
from open_mythos.data.batch import Batch, BatchSource
from open_mythos.data.documents import resolve_spec
from open_mythos.data.hub import HUB_PREFIX
from open_mythos.data.packing import TextRows
from open_mythos.data.seeding import generator
from open_mythos.data.tasks import TASKS, TaskBatches
from open_mythos.data.text import open_text
from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.data.tokenizer_spec import resolve_tokenizer
from open_mythos.model.mythos import OpenMythos
from open_mythos.recipes.run_config import RunConfig, TaskRun, TextRun

_FINAL_FACTOR = 4
"""How much more held-out data the sweep at the end measures than those on the way."""


@dataclass(frozen=True)
class Material:
    """Training batches, held-out batches by length, and the words for both."""

    source: BatchSource
    held_out: Callable[[Sequence[int] | None, int], Iterable[tuple[int, Iterable[Batch]]]]
    """Held-out batches by length, of the run's own lengths unless some are given, about so many rows of each."""
    tokenizer: TextTokenizer | None
    is_text: bool
    notes: list[str]

    def sweep(
        self, model: OpenMythos, loops: Sequence[int], rows: int, lengths: Sequence[int] | None = None
    ) -> list[SweepRow]:
        """Quality on held-out data at each of `loops`; a row's length is what the data counts, not always tokens."""
        return [
            {**row, "length": length}
            for length, batches in self.held_out(lengths, rows)
            for row in depth_sweep(model, batches, loops, exact_match=not self.is_text)
        ]


def open_material(
    run: RunConfig, cache: Path, on_progress: Callable[[int], None] | None = None, *, pinned: bool = False
) -> Material:
    """The material of a run; text is tokenised into the folder `cache` unless it is there already."""
    return _task(run) if isinstance(run, TaskRun) else _text(run, cache, on_progress, pinned=pinned)


def located(run: RunConfig) -> RunConfig:
    """The run with its paths made absolute, so that its folder can be used from everywhere."""
    if isinstance(run, TaskRun):
        return run
    data = run.data if run.data.startswith(HUB_PREFIX) else resolve_spec(run.data)
    return replace(run, data=data, tokenizer=resolve_tokenizer(run.tokenizer))


def sweep_rows(run: RunConfig, *, final: bool) -> int:
    """How many held-out rows of each length a sweep measures."""
    rows = run.sweep_problems if isinstance(run, TaskRun) else run.sweep_rows
    return rows * _FINAL_FACTOR if final else rows


def positions(run: RunConfig, length: int) -> int:
    """How many tokens held-out data of that length has per row."""
    return TASKS[run.task]().positions(length) if isinstance(run, TaskRun) else length


def sweep_loops(run: RunConfig) -> tuple[int, ...]:
    """The depths of a run's sweeps: doubling from 1 up to four times what training typically runs."""
    if run.sweep_loops is not None:
        return run.sweep_loops
    typical = run.depth.typical
    most = 4 * (run.model.max_loop_iters if math.isnan(typical) else math.ceil(typical))
    return (*(2**k for k in range(most.bit_length()) if 2**k < most), most)


def _task(run: TaskRun) -> Material:
    task = TASKS[run.task]()
    seed = run.training.seed
    source = TaskBatches(
        task,
        batch_size=run.batch_size,
        shortest=run.shortest,
        longest=run.longest,
        steps=run.training.steps,
        growth=run.growth,
        seed=seed,
    )

    def held_out(lengths: Sequence[int] | None, rows: int) -> Iterable[tuple[int, Iterable[Batch]]]:
        for length in sorted(set(lengths or run.lengths_swept)):
            yield length, [task.batch(rows, length, generator(seed, length, "held-out problems"))]

    note = f"{run.task}: problems of length {run.shortest} to {run.longest}, made as they are needed"
    return Material(source, held_out, None, is_text=False, notes=[note])


def _text(run: TextRun, cache: Path, on_progress: Callable[[int], None] | None, *, pinned: bool) -> Material:
    text = open_text(
        run.data,
        cache=cache,
        seq_len=run.seq_len,
        batch_size=run.batch_size,
        tokenizer=run.tokenizer,
        holdout=run.holdout,
        seed=run.training.seed,
        on_progress=on_progress,
        pinned=pinned,
    )

    def held_out(lengths: Sequence[int] | None, rows: int) -> Iterable[tuple[int, Iterable[Batch]]]:
        for length in sorted(set(lengths or (run.seq_len,))):
            store = text.held_out.store
            yield length, TextRows(store, seq_len=length, batch_size=run.batch_size, split="held-out").in_order(rows)

    summary = text.summary
    notes = [f"{summary.data}, tokenizer {summary.tokenizer}, vocabulary {summary.vocab_size}"]
    for name, counts in (("training", summary.train), ("held out", summary.held_out)):
        if counts is not None:
            notes.append(f"{name}: {counts.documents} documents, {counts.tokens} tokens, {counts.bytes} bytes")
    return Material(text.train, held_out, text.tokenizer, is_text=True, notes=notes)
