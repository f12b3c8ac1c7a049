"""Checkpoints of a run: sharded, written in the background, whole or not there at all, checked before they are used.

Main entry: `Checkpoints`. They belong to the run that wrote them (PyTorch's format, with pickled metadata); what people
exchange is a model folder.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from open_mythos.training.ranks import Ranks

_META = "meta.json"

# PyTorch says so at every save and load of a single process, from a thread of its own.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


@dataclass(frozen=True)
class Progress:
    """How far a run was: steps done, and the state of its data source (JSON-able)."""

    step: int
    source: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder, `step-000100` and so on; `keep` of them stay.

    Whoever only reads changes nothing there, so that a run that is writing at the same time is not disturbed.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int = 2, *, read_only: bool = False) -> None:
        self.folder, self.ranks, self.keep, self.read_only = folder, ranks, keep, read_only
        self._committing: Future[None] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Saving in the background must not meet the training's own messages: it talks through a group of its own.
        self._group = dist.new_group(backend="gloo") if ranks.world > 1 else None
        if ranks.is_main and folder.is_dir() and not read_only:
            for partial in folder.glob("*.partial"):
                shutil.rmtree(partial)

    def steps(self) -> list[int]:
        """Steps of which a checkpoint is complete, in ascending order."""
        found = (path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir())
        return sorted(int(step) for step in found if step.isdigit())

    def save(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress) -> None:
        """Copy the state now and write it in the background, after the previous save has ended."""
        self.finish()
        partial = self._path(progress.step).with_suffix(".partial")
        if self.ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.ranks.wait()
        writing = async_save(
            _state(model, optimizers),
            storage_writer=FileSystemWriter(partial),
            process_group=self._group,
            no_dist=self.ranks.world == 1,
        )
        assert isinstance(writing, Future)
        self._committing = self._worker.submit(self._commit, writing, partial, progress)

    def poll(self) -> None:
        """Raise what went wrong with a save in the background, if anything has by now."""
        if self._committing is not None and self._committing.done():
            self.finish()

    def finish(self) -> None:
        """Return when the save in the background, if there is one, is complete."""
        if self._committing is not None:
            committing, self._committing = self._committing, None
            try:
                committing.result()
            except (Exception, CheckpointException) as error:  # PyTorch's own is no Exception
                last = max(self.steps(), default=None)
                kept = "there is no earlier one" if last is None else f"the last good one is of step {last}"
                what = f"a checkpoint could not be written to {self.folder} ({_cause(error)})"
                raise OSError(f"{what}; {kept}") from error

    def load_latest(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[Progress, list[str]]:
        """Restore the newest checkpoint that is whole, on any number of ranks; also say which ones were not.

        Damaged ones are put aside. Raises `ValueError` if all are damaged; with no checkpoint at all, step 0.
        """
        chosen, damaged = self.ranks.main_decides(self._choose)
        if chosen is None:
            if damaged:
                raise ValueError(f"every checkpoint in {self.folder} is damaged: {'; '.join(damaged)}")
            return Progress(0, {}), []
        path = self._path(chosen)
        state = _state(model, optimizers)
        reader = FileSystemReader(path)
        load(state, storage_reader=reader, process_group=self._group, no_dist=self.ranks.world == 1)
        set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizers"])
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        return Progress(meta["step"], meta["source"]), damaged

    def _choose(self) -> tuple[int | None, list[str]]:
        damaged: list[str] = []
        for step in reversed(self.steps()):
            wrong = _damage(self._path(step))
            if wrong is None:
                return step, damaged
            damaged.append(f"{self._path(step)}: {wrong}")
            if not self.read_only:
                aside = self._path(step).with_name(f"damaged-{step:06d}")
                shutil.rmtree(aside, ignore_errors=True)
                self._path(step).rename(aside)
        return None, damaged

    def _commit(self, writing: Future[Any], partial: Path, progress: Progress) -> None:
        writing.result()
        if not self.ranks.is_main:
            return
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        with (partial / _META).open("w", encoding="utf-8") as meta:
            json.dump({**asdict(progress), "files": files}, meta)
            meta.flush()
            os.fsync(meta.fileno())
        final = self._path(progress.step)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight and buffer of a model, sharded or not, whole and on the CPU of the main rank."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]


def _state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizers)
    return {"model": weights, "optimizers": moments}


def _cause(error: BaseException) -> BaseException:
    """What happened on the first rank that failed."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def _fingerprint(path: Path) -> list[int]:
    """Bytes and CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        for name, expected in meta["files"].items():
            if _fingerprint(path / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_META} or a file it lists cannot be read ({error})"
    return None
