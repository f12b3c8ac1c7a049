"""The command line: `mythos VERB`.

Main entry: `main`. A verb is a module with a dataclass `Arguments`, which tyro fills, and a function `run`. It is
imported only when it is called, so that help costs no more than Python's own start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from open_mythos import __version__

_BAD_INPUT = 2
_INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """One subcommand: where it lives, and what help says about it."""

    module: str
    summary: str
    example: str


VERBS = {
    "demo": Verb(
        module="open_mythos.cli.demo",
        summary="the guided tour: train a small model, turn its loop knob, see every promise measured",
        example="mythos demo --out mythos_tour",
    ),
    "train": Verb(
        module="open_mythos.cli.train",
        summary="train a task with known answers, or text, into a model folder; resumes by itself",
        example="mythos train text --data book.txt --out runs/book",
    ),
    "sweep": Verb(
        module="open_mythos.cli.sweep",
        summary="quality of a trained model at several depths, on held-out data",
        example="mythos sweep runs/book --loops 1,2,4,8,16",
    ),
    "generate": Verb(
        module="open_mythos.cli.generate",
        summary="text from a trained model",
        example='mythos generate runs/book --prompt "Once" --loops 8',
    ),
    "export": Verb(
        module="open_mythos.cli.export",
        summary="a model folder from the newest checkpoint of a run, finished or not",
        example="mythos export runs/book --out my-model",
    ),
    "inspect": Verb(
        module="open_mythos.cli.inspect",
        summary="parameters, FLOPs, memory plan, stability and routing of a model folder or a preset",
        example="mythos inspect mythos_1b --seq-len 4096 --dtype bfloat16",
    ),
    "bench": Verb(
        module="open_mythos.cli.bench",
        summary="speed beside open-mythos 0.5.0 and the hardware's floor, side by side in one run",
        example="mythos bench --only decode",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for what cannot be done as asked, told in one line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else _BAD_INPUT
    if words[0] in ("-V", "--version"):
        print(f"mythos {__version__}")
        return 0
    try:
        _run(words[0], words[1:])
    except (ValueError, OSError, ImportError) as error:  # ImportError: a verb's optional package is missing
        print(f"mythos: {error}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print("mythos: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _run(name: str, words: list[str]) -> None:
    if name not in VERBS:
        close = get_close_matches(name, VERBS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"verb is {name!r}; it must be one of {', '.join(VERBS)}{hint}")
    import_module(VERBS[name].module).run(parse(name, words))


def parse(name: str, words: list[str]) -> Any:
    """What the words after the verb mean; prints help and leaves if that is what they ask for.

    A verb whose options depend on its words has a function `parse` of its own.
    """
    module = import_module(VERBS[name].module)
    if hasattr(module, "parse"):
        return module.parse(words)
    import tyro

    return tyro.cli(module.Arguments, prog=f"mythos {name}", args=words, description=module.__doc__)


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    examples = "\n".join(f"  {verb.example}" for verb in VERBS.values())
    return (
        "usage: mythos VERB [options]\n\n"
        "Recurrent-depth transformers: train them, turn the depth knob, look inside.\n\n"
        f"verbs:\n{verbs}\n\n"
        f"examples:\n{examples}\n\n"
        "`mythos VERB --help` lists a verb's options; `mythos --version` prints the version."
    )
