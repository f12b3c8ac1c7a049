"""Carry out a run: from its description to a model folder.

Main entries: `train`, `export`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from open_mythos.model.mythos import OpenMythos
from open_mythos.recipes.folder import RunFolder, locked
from open_mythos.recipes.material import Material, located, open_material, sweep_loops, sweep_rows
from open_mythos.recipes.run_config import RunConfig
from open_mythos.training.checkpoint import Checkpoints, whole_weights
from open_mythos.training.optim import build_optimizers
from open_mythos.training.ranks import Ranks, joined
from open_mythos.training.records import JsonLines, Observer, Rows
from open_mythos.training.trainer import Trainer


class Prepared(NamedTuple):
    """What observers may want to know before the first step."""

    run: RunConfig
    model: OpenMythos
    material: Material
    first_step: int


def train(
    run: RunConfig,
    out: Path,
    device: torch.device,
    *,
    observe: Callable[[Prepared], Sequence[Observer]] = lambda prepared: (),
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Train in the folder `out`, or go on there, and leave a model folder; call it in every process of `torchrun`.

    `observe` gives the main process its observers; the figures go to `metrics.jsonl` in any case. `on_progress` is
    called with the number of documents tokenised. Raises `ValueError` where the run, the data or the folder do not
    allow it, before anything is changed.
    """
    run, folder = located(run), RunFolder(out)
    with joined(device) as ranks, ExitStack() as stack:
        ranks.share(run.batch_size)
        if ranks.is_main:
            stack.enter_context(locked(out))
            folder.check(run)
            material = open_material(run, folder.data, on_progress, pinned=folder.description.is_file())
        ranks.wait()
        if not ranks.is_main:
            material = open_material(run, folder.data, pinned=True)
        model = build_model(run, material, device)
        trainer = Trainer(
            model,
            material.source,
            run.depth,
            run.training,
            ranks=ranks,
            checkpoints=folder.checkpoints,
            sweep=_sweep(run, material),
        )
        if trainer.first_step > run.training.steps:
            done = f"what the run in {out} has done, {trainer.first_step}"
            raise ValueError(f"steps is {run.training.steps}; it must be at least {done}")
        observers: list[Observer] = []
        if ranks.is_main:
            folder.claim(run)
            prepared = Prepared(run, model, material, trainer.first_step)
            observers = [JsonLines(out, trainer.first_step), *observe(prepared)]
            for observer in observers:
                stack.callback(observer.close)
        trainer.run(observers)
        _write(model, material, out, ranks)


class Trained(NamedTuple):
    """A model as its run has it so far, and what the run learns from."""

    run: RunConfig
    model: OpenMythos
    material: Material
    step: int
    damaged: list[str]
    """Newer checkpoints that could not be used."""


def newest(run_folder: Path) -> Trained:
    """The model of a run's newest whole checkpoint, whatever number of ranks wrote it."""
    folder = RunFolder(run_folder)
    run = folder.read()
    material = open_material(run, folder.data, pinned=True)
    model = build_model(run, material, torch.device("cpu"))
    checkpoints = Checkpoints(folder.checkpoints, Ranks(), read_only=True)
    progress, damaged = checkpoints.load_latest(model, build_optimizers(model, run.training.optim))
    if not progress.step:
        raise ValueError(f"{folder.checkpoints} has no checkpoint yet; it must have one")
    return Trained(run, model.eval(), material, progress.step, damaged)


def export(run_folder: Path, out: Path) -> Trained:
    """Write the model folder of a run's newest checkpoint."""
    trained = newest(run_folder)
    _write(trained.model, trained.material, out, Ranks())
    return trained


def build_model(run: RunConfig, material: Material, device: torch.device) -> OpenMythos:
    """A new model of the run, with the vocabulary of its data, from its seed."""
    torch.manual_seed(run.training.seed)
    return OpenMythos(run.model.replace(vocab_size=material.source.vocab_size)).to(device)


def _sweep(run: RunConfig, material: Material) -> Callable[[OpenMythos, bool], Rows]:
    return lambda model, final: material.sweep(model, sweep_loops(run), sweep_rows(run, final=final))


def _write(model: OpenMythos, material: Material, out: Path, ranks: Ranks) -> None:
    """The model folder; of a model in shards, its weights put together."""
    weights = None if ranks.world == 1 else whole_weights(model)
    if ranks.is_main:
        whole = model
        if weights is not None:
            whole = OpenMythos(model.config)
            whole.load_state_dict(weights)
        whole.save_pretrained(out)
        if material.tokenizer is not None:
            material.tokenizer.save(out)
    ranks.wait()
