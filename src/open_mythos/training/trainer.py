"""The training loop: draw a batch and its depths, differentiate, step, record; resume where a run ended.

Main entry: `Trainer`. On several ranks each takes its share of every batch; the losses do not depend on their number,
except through dropout and noise, which each rank draws for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from open_mythos.data.batch import IGNORED, BatchSource
from open_mythos.data.seeding import generator, number
from open_mythos.model.mythos import OpenMythos
from open_mythos.training.checkpoint import Checkpoints, Progress
from open_mythos.training.depth import Asked, DepthPlan, LoopPlan
from open_mythos.training.hardware import has_fast_bfloat16, peak_flops
from open_mythos.training.metering import Meter, OnItsWay, StepSums, add, scalars
from open_mythos.training.objective import Contribution, Objective
from open_mythos.training.optim import OptimConfig, build_optimizers, set_rate
from open_mythos.training.parallelize import Parallel, parallelize, whole, without_sync
from open_mythos.training.ranks import Ranks
from open_mythos.training.records import Observer, Rows, StepRecord
from open_mythos.training.schedule import Schedule

_MOST_SKIPPED = 50
"""Steps in a row that may be skipped before the run is taken for lost."""


class NonFiniteLossError(ValueError):
    """The loss or its gradients stopped being finite."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to train, apart from the model, the data and the depths."""

    steps: int = 1000
    seed: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: Schedule = field(default_factory=Schedule)
    clip: float = 1.0
    """Largest norm of the gradients."""
    micro_batch: int | None = None
    """Sequences per forward and rank; None takes the rank's whole share. Smaller ones are accumulated: same numbers."""
    z_weight: float = 0.0
    ponder_weight: float = 0.0
    """Weight of the ponder cost (loops run plus remainder, per position) in the loss."""
    settle_weight: float = 0.0
    """Weight in the loss of how far one loop more would move the last loop's state, mean square over channels. It
    teaches states to rest, for models without ACT (docs/training.md); a step computes one loop more."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the products; "auto" is bfloat16 where that is faster. Weights and sums stay in float32."""
    recompute: bool = False
    """Keep one state per loop and compute the loops again on the way back: less memory, a third more work."""
    compiled: bool = False
    """Compile the looped layers' feed-forwards with `torch.compile`."""
    parallel: Parallel = "auto"
    """On several ranks: "ddp" copies the model to each, "fsdp" shards it; "auto" shards."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradients are not finite. Skipping waits for each step's figures."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    sweep_every: int = 0
    """Steps between depth sweeps on held-out data; 0 sweeps at the end only."""

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "keep_checkpoints", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("seed", "z_weight", "ponder_weight", "settle_weight", "sweep_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be a number above 0")


class Trainer:
    """Trains one model on one source; `run` may be called in every process that `torchrun` starts."""

    def __init__(
        self,
        model: OpenMythos,
        source: BatchSource,
        depth: DepthPlan,
        config: TrainerConfig,
        *,
        ranks: Ranks | None = None,
        checkpoints: Path | None = None,
        sweep: Callable[[OpenMythos, bool], Rows] | None = None,
    ) -> None:
        """`checkpoints` is the folder to keep them in and resume from; `sweep(model, final)` measures held-out data."""
        self.model, self.source, self.depth, self.config = model, source, depth, config
        self.ranks = ranks or Ranks()
        self.device = next(model.parameters()).device
        self._sweep = sweep
        objective = Objective(
            model,
            with_z=config.z_weight > 0,
            with_movement=config.settle_weight > 0,
            recompute=config.recompute,
        )
        self._module: nn.Module = parallelize(objective, self.ranks, config.parallel, compiled=config.compiled)
        self.optimizers = build_optimizers(model, config.optim)
        self._checkpoints = (
            None if checkpoints is None else Checkpoints(checkpoints, self.ranks, config.keep_checkpoints)
        )
        self.first_step, self._notes = self._resume()
        wants_bfloat16 = config.precision == "bfloat16" or (
            config.precision == "auto" and has_fast_bfloat16(self.device)
        )
        self._autocast = torch.bfloat16 if wants_bfloat16 else None
        peak = peak_flops(self.device)
        peak = None if peak is None else peak * self.ranks.world
        self._meter = Meter(model.config, peak, source.bytes_per_token, with_movement=config.settle_weight > 0)
        self._observers: Sequence[Observer] = ()
        self._skipped = 0

    def _resume(self) -> tuple[int, list[str]]:
        if self._checkpoints is None:
            return 0, []
        progress, damaged = self._checkpoints.load_latest(self.model, self.optimizers)
        if progress.step:
            self.source.load_state_dict(progress.source)
        notes = [f"A damaged checkpoint was put aside: {one}." for one in damaged]
        if progress.step:
            notes.append(f"Resuming after step {progress.step}.")
        return progress.step, notes

    def run(self, observers: Sequence[Observer] = ()) -> None:
        """Train until `steps` steps are done, then leave the model in evaluation mode.

        Raises `NonFiniteLossError` with the step, the batch's position and the last good checkpoint.
        """
        self._observers = observers if self.ranks.is_main else ()
        self._tell(*self._notes)
        try:
            self._train()
        finally:  # a checkpoint that is being written is good, whatever has happened since
            if self._checkpoints is not None:
                self._checkpoints.finish()
            self.model.eval()

    def _train(self) -> None:
        pending: StepSums | None = None
        self._meter.restart()
        for step in range(self.first_step, self.config.steps):
            self.model.train()
            sums = self._step(step)
            self._report(pending)  # a step late, so that reading does not keep the device waiting
            pending = sums
            done = step + 1
            at_end = done == self.config.steps
            sweeps = at_end or (self.config.sweep_every and done % self.config.sweep_every == 0)
            saves = at_end or done % self.config.checkpoint_every == 0
            if sweeps or saves:
                self._report(pending)
                pending = None
            if saves:  # first: whatever goes wrong in a sweep must not cost a step
                self._save(done)
            if sweeps:
                self._run_sweep(done, at_end)
            if self._checkpoints is not None:
                self._checkpoints.poll()

    def _step(self, step: int) -> StepSums:
        config = self.config
        torch.manual_seed(number(config.seed, step, "torch", self.ranks.rank))
        batch = self.source.batch(step)
        asked = Asked(len(batch.ids), step / config.steps, batch.difficulty)
        plan = self.depth.draw(asked, generator(config.seed, step, "depth"))
        counted = max(1, int((batch.targets != IGNORED).sum()))
        total = self._accumulate(batch.ids, batch.targets, plan, counted)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        figures = torch.cat([self.ranks.sum(scalars(total)), norm.detach().reshape(1)])
        load = self.ranks.sum(total.load)
        rate = config.optim.learning_rate * config.schedule.factor(step, config.steps)
        skipped = config.non_finite == "skip" and not bool(figures.isfinite().all())
        if not skipped:
            self._update(rate, load)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        positions, seconds = batch.ids.numel(), self._meter.lap()
        sums = OnItsWay([figures, load, total.a])
        return StepSums(step, sums, counted, positions, plan, rate, seconds, skipped)

    def _accumulate(self, ids: Tensor, targets: Tensor, plan: LoopPlan, counted: int) -> Contribution:
        """Gradients of this rank's share of the batch, in micro-batches; returns their sums."""
        share = self.ranks.share(len(ids))
        own_ids, own_targets, own_loops = ids[share], targets[share], plan.n_loops[share]
        size = self.config.micro_batch or len(own_ids)
        starts = range(0, len(own_ids), size)
        total: Contribution | None = None
        for start in starts:
            part = slice(start, start + size)
            with nullcontext() if start == starts[-1] else without_sync(self._module):
                with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
                    sums = self._module(
                        self._there(own_ids[part]),
                        self._there(own_targets[part]),
                        LoopPlan(own_loops[part], plan.grad_loops),
                    )
                # Ranks average their gradients, hence `world`.
                loss = (sums.loss + self.config.z_weight * sums.z) / counted
                costs = self.config.ponder_weight * sums.ponder + self.config.settle_weight * sums.movement
                loss = loss + costs / ids.numel()
                (loss * self.ranks.world).backward()
            total = add(total, sums, plan)
        assert total is not None
        return total

    def _there(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; a GPU fetches it by itself from memory that is pinned."""
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def _update(self, rate: float, load: Tensor) -> None:
        set_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
        if load.shape[-1]:
            self.model.balance(load.sum(0))

    def _report(self, sums: StepSums | None) -> None:
        """Read a step's figures, stop the run if they are not finite, and tell the observers."""
        if sums is None:
            return
        record = self._meter.read(sums)
        self._skipped = self._skipped + 1 if record.skipped else 0
        if self._skipped > _MOST_SKIPPED or not (record.skipped or record.finite):
            self._stop(record)
        for observer in self._observers:
            observer.on_step(record)

    def _stop(self, record: StepRecord) -> None:
        saved: list[int] = []
        if self._checkpoints is not None:
            self._checkpoints.finish()  # one that is being written is good, and would be lost
            self.ranks.wait()
            saved = self._checkpoints.steps()
        kept = f"the last good checkpoint is of step {saved[-1]}" if saved else "no checkpoint has been written yet"
        raise NonFiniteLossError(
            f"the loss is {record.loss} and the norm of the gradients {record.grad_norm} at step {record.step} "
            f"({self.source.position(record.step)}); {kept}. A lower learning_rate than "
            f"{self.config.optim.learning_rate} may help, or non_finite 'skip'"
        )

    def _run_sweep(self, done: int, final: bool) -> None:
        if self._sweep is None:
            return
        with whole(self._module):
            rows = self._sweep(self.model, final)
        for observer in self._observers:
            observer.on_sweep(done, rows)
        self._meter.restart()

    def _save(self, done: int) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(self.model, self.optimizers, Progress(done, self.source.state_dict()))

    def _tell(self, *notes: str) -> None:
        for note in notes:
            for observer in self._observers:
                observer.on_message(note)
