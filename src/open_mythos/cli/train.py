"""Train a recurrent-depth model into a folder; the same command goes on where a run was stopped or killed.

WHAT is a recipe, which any field below and a file given with --config override, flags last. DIR gets `metrics.jsonl`,
`tensorboard/`, `checkpoints/`, `run.yaml`, and in the end the model. Start several processes with
`torchrun --nproc-per-node N -m open_mythos train ...`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
import yaml
from rich.console import Console

from open_mythos.cli.train_display import Display
from open_mythos.recipes.folder import read_yaml
from open_mythos.recipes.named import named_recipe, recipe_names
from open_mythos.recipes.run_config import RunConfig, TaskRun, TextRun, changed
from open_mythos.recipes.train import Prepared, train
from open_mythos.training.depth import DepthPlan, plan_from_dict, plan_to_dict
from open_mythos.training.records import Observer, TensorBoard


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    out: Annotated[Path, tyro.conf.arg(help="Folder of the run.")]
    config: Annotated[Path | None, tyro.conf.arg(help="YAML with fields that differ from the recipe's.")] = None
    device: Annotated[str, tyro.conf.arg(help='"cpu", "cuda", or "auto" for a GPU if there is one.')] = "auto"
    tensorboard: Annotated[bool, tyro.conf.arg(help="Also write TensorBoard files, if it is installed.")] = True


@dataclass(frozen=True, kw_only=True)
class TextArguments(_Arguments):
    """Where to write, and a run on text."""

    run: Annotated[TextRun, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TaskArguments(_Arguments):
    """Where to write, and a run on a task."""

    run: Annotated[TaskRun, tyro.conf.arg(name="")]


Arguments = TextArguments | TaskArguments


def parse(words: list[str]) -> Arguments:
    """The run that the words describe: the recipe, changed by --config, changed by flags."""
    if set(words) & {"-h", "--help"} and (words[0].startswith("-")):
        print(_help())
        raise SystemExit(0)
    if not words or words[0].startswith("-"):
        raise ValueError(f"WHAT is missing: mythos train WHAT --out DIR; it must be one of {', '.join(recipe_names())}")
    run = named_recipe(words[0])
    config = _value_of("--config", words)
    if config is not None:
        run = changed(run, read_yaml(Path(config)))
    return _with_flags(words[0], run, words[1:])


def run(arguments: Arguments) -> None:
    """Train, showing how it goes."""
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    device = _device(arguments.device)

    def observe(prepared: Prepared) -> Sequence[Observer]:
        boards = _tensorboard(arguments.out, prepared.first_step, console) if arguments.tensorboard else []
        return [Display(console, prepared), *boards]

    with console.status("reading the data") as status:

        def on_progress(documents: int) -> None:
            status.update(f"tokenising: {documents} documents")

        def ready(prepared: Prepared) -> Sequence[Observer]:
            status.stop()
            return observe(prepared)

        train(arguments.run, arguments.out, device, observe=ready, on_progress=on_progress)
    console.print(f"Model folder: [bold]{arguments.out}[/bold]. Turn its knob: mythos sweep {arguments.out}")


def _with_flags(what: str, run: RunConfig, words: list[str]) -> Arguments:
    kind: type[Any] = TextArguments if isinstance(run, TextRun) else TaskArguments
    return tyro.cli(  # type: ignore[no-any-return]
        kind,
        default=kind(out=tyro.MISSING, run=run),
        prog=f"mythos train {what}",
        args=words,
        description=__doc__,
        registry=_registry(),
        config=(tyro.conf.HelptextFromCommentsOff,),
    )


def _registry() -> tyro.constructors.ConstructorRegistry:
    """How a depth plan is written as one word: YAML, as in a recipe."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def depth(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if info.type is not DepthPlan:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="'{name: PLAN, ...}'",
            instance_from_str=lambda words: _plan(words[0]),
            is_instance=lambda value: hasattr(value, "draw"),
            str_from_instance=lambda plan: [_one_line(plan)],
        )

    return registry


def _plan(word: str) -> DepthPlan:
    try:
        return plan_from_dict(yaml.safe_load(word))
    except yaml.YAMLError as error:
        raise ValueError(f"depth is {word!r}, which is not YAML; it must be like {{name: fixed, loops: 4}}") from error


def _one_line(plan: DepthPlan) -> str:
    return yaml.safe_dump(plan_to_dict(plan), default_flow_style=True, sort_keys=False, width=1000).strip()


def _tensorboard(out: Path, first_step: int, console: Console) -> list[Observer]:
    try:
        return [TensorBoard(out, first_step)]
    except ImportError:
        console.print("[dim]No TensorBoard files: pip install 'open-mythos[train]' for them.[/dim]")
        return []


def _device(name: str) -> torch.device:
    """The device, on a machine with several GPUs the one of this process."""
    n_gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if n_gpus else "cpu"
    index = os.environ.get("LOCAL_RANK", "0") if name == "cuda" else name.removeprefix("cuda:")
    if name != "cpu" and not (name.startswith("cuda") and index.isdecimal() and int(index) < n_gpus):
        found = f"there are {n_gpus} GPUs that PyTorch can use" if n_gpus else "there is no GPU that PyTorch can use"
        raise ValueError(f"device is {name!r}, and {found}; it must be 'cpu', 'cuda', 'cuda:N' or 'auto'")
    if name == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(int(index))
    return torch.device("cuda", int(index))


def _value_of(flag: str, words: list[str]) -> str | None:
    """The value of a flag that must be known before the others can be."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _help() -> str:
    recipes = recipe_names()
    width = max(map(len, recipes))
    lines = "\n".join(f"  {name:<{width}}  {says}" for name, says in recipes.items())
    return (
        "usage: mythos train WHAT --out DIR [--config FILE] [--FIELD VALUE ...]\n\n"
        f"{__doc__}\n"
        f"recipes (WHAT):\n{lines}\n\n"
        "examples:\n"
        "  mythos train parity --out runs/parity --seed 1\n"
        "  mythos train text --data book.txt --tokenizer bpe:2000 --out runs/book --steps 5000\n"
        "  mythos train text --depth '{name: uniform, least: 1, most: 12}' --model.dim 384 --out runs/wide\n\n"
        "`mythos train WHAT --help` lists every field with the recipe's value."
    )
