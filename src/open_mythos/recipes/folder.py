"""The folder of a run: what is in it, and that only one process group writes to it at a time.

Main entries: `RunFolder`, `locked`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from open_mythos.recipes.run_config import RunConfig, run_from_dict, run_to_dict

# What a resumed run may change: none of it alters a step that has been done already. `steps` alters the schedule of
# those to come only if that is level where the run stopped; prolonging is the user's to decide.
_FREE = {
    "training.steps",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.sweep_every",
    "training.non_finite",
    "training.micro_batch",
    "training.recompute",
    "training.compiled",
    "training.parallel",
    "sweep_loops",
    "sweep_rows",
    "sweep_lengths",
    "sweep_problems",
}


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder; the folder itself becomes a model folder when the run ends."""

    path: Path

    @property
    def description(self) -> Path:
        """The run as YAML."""
        return self.path / "run.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def data(self) -> Path:
        """The tokenised text."""
        return self.path / "data"

    def read(self) -> RunConfig:
        """The run that the folder belongs to."""
        if not self.description.is_file():
            raise ValueError(
                f"{self.path} has no {self.description.name}; it must be the folder of a run of `mythos train`"
            )
        return read_run(self.description)

    def check(self, run: RunConfig) -> None:
        """`ValueError` names what differs if the folder belongs to another run."""
        if not self.description.is_file():
            return
        before, now = _flat(run_to_dict(self.read())), _flat(run_to_dict(run))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and key not in _FREE:
                raise ValueError(
                    f"{key} is {now.get(key)!r}; the run in {self.path} has {before.get(key)!r}, and resuming must "
                    "not change it: take another folder"
                )

    def claim(self, run: RunConfig) -> None:
        """Write the run's description, once it is certain that the run can begin."""
        partial = self.description.with_suffix(".partial")
        partial.write_text(to_yaml(run), encoding="utf-8")
        partial.replace(self.description)


def to_yaml(run: RunConfig) -> str:
    """A run as YAML, every field spelled out."""
    return yaml.safe_dump(run_to_dict(run), sort_keys=False, width=100)


def read_run(path: Path) -> RunConfig:
    """The run that a YAML file describes."""
    data = read_yaml(path)
    try:
        return run_from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_yaml(path: Path) -> Any:
    """What a YAML file holds."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({error})") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder; `ValueError` if another process does. The system lets go of it however this process ends."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"out is {path}, which is a file; it must be a folder")
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(
                f"{path} is in use by another run (process {holder}); wait for it, or take another folder"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
