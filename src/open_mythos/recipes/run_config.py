"""A training run as data: what to learn from, the model, its depths, and how to train.

Main entries: `TaskRun`, `TextRun`, `run_from_dict`, `run_to_dict`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from open_mythos.config import MythosConfig
from open_mythos.data.tasks import TASKS
from open_mythos.training.depth import DepthPlan, Difficulty, LogNormalPoisson, plan_from_dict, plan_to_dict
from open_mythos.training.trainer import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class _Run:
    model: MythosConfig = field(default_factory=MythosConfig)
    """The model; its vocabulary is the data's."""
    training: Annotated[TrainerConfig, tyro.conf.arg(name="")] = field(default_factory=TrainerConfig)
    """Flags leave this prefix out."""
    batch_size: int = 16
    """Sequences per optimizer step, over all ranks."""
    sweep_loops: tuple[int, ...] | None = None
    """Depths of the sweeps on held-out data; by default up to four times the mean of training."""


@dataclass(frozen=True, kw_only=True)
class TextRun(_Run):
    """A run on text."""

    data: str = "stdlib"
    """A text file, a folder of text or source files, JSON lines or Parquet with a column `text`, `hf:NAME[:CONFIG]` for
    a dataset of the Hugging Face hub; or "stdlib", the source code of this Python's standard library."""
    tokenizer: str = "bytes"
    """"bytes", "chars", "bpe:N" for N entries learned from the data, or a Hugging Face tokenizer by folder or name."""
    seq_len: int = 256
    """Tokens per row."""
    holdout: float = 0.1
    """Share of the documents that is held out; of a single document, its end."""
    sweep_rows: int = 128
    """Held-out rows that a sweep in training measures; the one at the end takes four times as many."""
    depth: DepthPlan = field(default_factory=lambda: LogNormalPoisson(mean=6, grad_loops=4))

    def __post_init__(self) -> None:
        _check_length(self, "seq_len", self.seq_len, self.seq_len)
        _check_counts(self, "batch_size", "seq_len", "sweep_rows")
        _check_list(self, "sweep_loops")


@dataclass(frozen=True, kw_only=True)
class TaskRun(_Run):
    """A run on a task whose answers are known."""

    task: str = "parity"
    shortest: int = 1
    """Length of the shortest problems."""
    longest: int = 16
    """Length of the longest problems in training."""
    growth: float = 0.5
    """Share of the steps over which the longest problems grow to that length."""
    sweep_lengths: tuple[int, ...] | None = None
    """Lengths that sweeps measure; by default the longest of training and its double, if that fits the context."""
    sweep_problems: int = 128
    depth: DepthPlan = field(default_factory=Difficulty)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; it must be one of {', '.join(TASKS)}")
        _check_counts(self, "batch_size", "longest", "sweep_problems")
        _check_list(self, "sweep_loops")
        _check_list(self, "sweep_lengths")
        _check_length(self, "longest", self.longest, TASKS[self.task]().positions(self.longest))
        for length in self.sweep_lengths or ():
            _check_length(self, "sweep_lengths", length, TASKS[self.task]().positions(length))

    @property
    def lengths_swept(self) -> tuple[int, ...]:
        """Lengths that a sweep measures unless it is told others."""
        return self.sweep_lengths or (self.longest, *filter(self._fits, [2 * self.longest]))

    def _fits(self, length: int) -> bool:
        """Whether the task has such problems, and the context room for them."""
        try:
            return TASKS[self.task]().positions(length) <= self.model.max_seq_len
        except ValueError:
            return False


RunConfig = TextRun | TaskRun
_KINDS: dict[str, type[TextRun] | type[TaskRun]] = {"text": TextRun, "task": TaskRun}


def run_to_dict(run: RunConfig) -> dict[str, Any]:
    """Plain data, ready for YAML or JSON."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(run, cls))
    return {"kind": kind, **_to_plain(run)}


def run_from_dict(data: dict[str, Any]) -> RunConfig:
    """The inverse of `run_to_dict`; fields left out take their defaults, `ValueError` names what does not belong."""
    if not isinstance(data, dict) or data.get("kind") not in _KINDS:
        found = data.get("kind") if isinstance(data, dict) else data
        raise ValueError(f"kind is {found!r}; a run must be of kind {' or '.join(map(repr, _KINDS))}")
    values = {key: value for key, value in data.items() if key != "kind"}
    run = _to_dataclass(_KINDS[data["kind"]], values, "")
    assert isinstance(run, TextRun | TaskRun)
    return run


def changed(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The run with some fields changed: nested mappings change what they name and leave the rest."""
    if not isinstance(changes, dict):
        raise ValueError(f"the changes are {changes!r}; they must be a mapping of fields to values")
    return run_from_dict(_merged(run_to_dict(run), changes))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A depth plan is replaced as a whole: its fields belong to its name."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict) and "name" not in value
        result[key] = _merged(base[key], value) if nested else value
    return result


def _check_length(run: _Run, name: str, length: int, positions: int) -> None:
    if positions > run.model.max_seq_len:
        verb = "is" if length == getattr(run, name) else "has"
        takes = "" if positions == length else f" and takes {positions} positions"
        raise ValueError(
            f"{name} {verb} {length}{takes}; it must be at most model.max_seq_len ({run.model.max_seq_len})"
        )


def _check_list(run: _Run, name: str) -> None:
    values = getattr(run, name)
    if values is not None and (not values or min(values) < 1):
        raise ValueError(f"{name} is {list(values)}; it must be integers of at least 1")


def _check_counts(run: _Run, *names: str) -> None:
    for name in names:
        if getattr(run, name) < 1:
            raise ValueError(f"{name} is {getattr(run, name)}; it must be at least 1")


def _to_plain(value: Any) -> Any:
    if hasattr(value, "draw"):
        return plan_to_dict(value)
    if dataclasses.is_dataclass(value):
        return {each.name: _to_plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _to_dataclass(kind: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the run'} is {data!r}; it must be a mapping of fields to values")
    hints = get_type_hints(kind)
    known = [each.name for each in dataclasses.fields(kind)]
    for key in data:
        if key not in known:
            raise ValueError(f"{where}{'.' if where else ''}{key} is no field; there are {', '.join(sorted(known))}")
    prefix = f"{where}." if where else ""
    return kind(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type hint has it; YAML gives lists for tuples, and text for numbers such as 1e-3."""
    if hint is DepthPlan:
        return plan_from_dict(value)
    if dataclasses.is_dataclass(hint):
        return _to_dataclass(hint, value, where)  # type: ignore[arg-type]
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in options:
            return None
        return _first_fit([option for option in options if option is not NoneType], value, where)
    if origin is Literal:
        return _checked(value in options, value, where, f"one of {', '.join(map(repr, options))}")
    if origin is tuple:
        _checked(isinstance(value, list | tuple), value, where, "a list")
        return tuple(_convert(options[0], item, where) for item in value)
    return _convert_plain(hint, value, where)


def _convert_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return _checked(False, value, where, "a number")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float:
        return float(_checked(is_number, value, where, "a number"))
    if hint is int:
        return _checked(is_number and isinstance(value, int), value, where, "an integer")
    return _checked(isinstance(value, hint), value, where, {bool: "true or false", str: "text"}.get(hint, str(hint)))


def _first_fit(options: list[Any], value: Any, where: str) -> Any:
    for option in options[:-1]:
        try:
            return _convert(option, value, where)
        except ValueError:
            continue
    return _convert(options[-1], value, where)


def _checked(ok: bool, value: Any, where: str, accepted: str) -> Any:
    if not ok:
        raise ValueError(f"{where} is {value!r}; it must be {accepted}")
    return value
