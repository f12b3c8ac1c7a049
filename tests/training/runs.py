"""Runs small enough to be done many times in a test.

Main entries: `small_model`, `small_source`, `trained`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from open_mythos import MythosConfig, OpenMythos
from open_mythos.data.parity import Parity
from open_mythos.data.tasks import TaskBatches
from open_mythos.training.depth import DepthPlan, Uniform
from open_mythos.training.records import Observer, StepRecord
from open_mythos.training.trainer import Trainer, TrainerConfig


class Recorder(Observer):
    """An observer that remembers."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.sweeps: list[tuple[int, Any]] = []
        self.messages: list[str] = []

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)

    def on_sweep(self, step: int, rows: Any) -> None:
        self.sweeps.append((step, rows))

    def on_message(self, text: str) -> None:
        self.messages.append(text)

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]


def small_model(**changes: Any) -> OpenMythos:
    sizes = {"dim": 16, "n_experts": 4, "expert_dim": 8, "max_seq_len": 16, "vocab_size": 3}
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(**{**sizes, **changes}))


def small_source(batch_size: int = 8, seed: int = 0) -> TaskBatches:
    return TaskBatches(Parity(), batch_size=batch_size, shortest=4, longest=12, steps=10, seed=seed)


def trained(
    *,
    model: OpenMythos | None = None,
    source: Any = None,
    depth: DepthPlan | None = None,
    checkpoints: Path | None = None,
    sweep: Any = None,
    **config: Any,
) -> tuple[Trainer, Recorder]:
    """A trainer after its run, and what it told."""
    trainer = Trainer(
        model or small_model(),
        source or small_source(),
        depth or Uniform(least=1, most=4, grad_loops=2),
        TrainerConfig(**{"steps": 6, **config}),
        checkpoints=checkpoints,
        sweep=sweep,
    )
    recorder = Recorder()
    trainer.run([recorder])
    return trainer, recorder
