"""What a model costs and what it does: parameters, FLOPs per token, memory plan; for a folder also what its weights do.

Examples:
  mythos inspect mythos_tutorial_mla
  mythos inspect mythos_100b --seq-len 131072 --batch 8 --dtype bfloat16
  mythos inspect runs/parity --loops 32 --json report.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from open_mythos.analysis.inspection import ConfigReport, ModelReport, as_data, inspect_config, inspect_model
from open_mythos.cli.inspect_tables import config_tables, model_tables
from open_mythos.config import MythosConfig
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import preset


@dataclass(frozen=True)
class Arguments:
    """Options of `mythos inspect`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR-OR-PRESET")]
    """A model folder, or the name of a preset; of a preset nothing is allocated, however large it is."""
    seq_len: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Tokens per sequence; the model's max_seq_len if not given."""
    batch: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Sequences at once."""
    loops: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Loops of the recurrent block; the model's max_loop_iters if not given."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What weights, cache and activations are planned in."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report to this file."""


def run(arguments: Arguments) -> None:
    """Print the report, and write it if asked to."""
    config, model = _find(arguments.model)
    costs = inspect_config(
        config,
        batch=arguments.batch,
        seq_len=arguments.seq_len,
        n_loops=arguments.loops,
        dtype=getattr(torch, arguments.dtype),
    )
    console = Console()
    for table in config_tables(arguments.model, costs):
        console.print(table)
    behaviour = None if model is None else inspect_model(model, arguments.loops)
    if behaviour is not None:
        for table in model_tables(behaviour):
            console.print(table)
    if arguments.json is not None:
        _write(arguments.json, config, costs, behaviour)
        console.print(f"written to {arguments.json}")


def _find(name: str) -> tuple[MythosConfig, OpenMythos | None]:
    """A folder's config and model, or a preset's config."""
    if Path(name).is_dir():
        model = OpenMythos.from_pretrained(name)
        return model.config, model
    try:
        return preset(name), None
    except ValueError as error:
        raise ValueError(f"there is no model folder {name!r}, and {error}") from error


def _write(path: Path, config: MythosConfig, costs: ConfigReport, behaviour: ModelReport | None) -> None:
    report = {"config": config.to_dict(), "costs": as_data(costs)}
    if behaviour is not None:
        report["behaviour"] = as_data(behaviour)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
