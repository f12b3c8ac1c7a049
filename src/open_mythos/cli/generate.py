"""Text from a trained model, written as it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.model.mythos import OpenMythos


@dataclass(frozen=True)
class Arguments:
    """Which model, from what, how deep."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="A model folder with a tokenizer.")]
    prompt: Annotated[str, tyro.conf.arg(help="Text to go on from; at least one token.")] = "\n"
    loops: Annotated[
        str, tyro.conf.arg(help='How many loops; "auto" for the model\'s own, with halting where it has learned it.')
    ] = "auto"
    max_new_tokens: Annotated[int, tyro.conf.arg(help="How much text, at most.")] = 200
    temperature: Annotated[float, tyro.conf.arg(help="0 takes the most likely token.")] = 0.8
    top_k: Annotated[int | None, tyro.conf.arg(help="Choose among that many only.")] = None
    seed: Annotated[int, tyro.conf.arg(help="Equal seeds give equal text.")] = 0


def run(arguments: Arguments) -> None:
    """Print the prompt and what follows."""
    n_loops = _loops(arguments.loops)
    model = OpenMythos.from_pretrained(arguments.model)
    tokenizer = TextTokenizer.load(arguments.model)
    ids = torch.tensor([tokenizer.encode(arguments.prompt)], dtype=torch.int64)
    generator = torch.Generator().manual_seed(arguments.seed)
    stream = tokenizer.stream()
    print(arguments.prompt, end="", flush=True)
    for token in model.stream(
        ids,
        arguments.max_new_tokens,
        n_loops,
        arguments.temperature,
        arguments.top_k,
        generator=generator,
    ):
        if int(token) == tokenizer.end_of_text:
            break
        print(stream.push(int(token)), end="", flush=True)
    print(stream.finish(), flush=True)


def _loops(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f'loops is {text!r}; it must be an integer of at least 1, or "auto"')
    return int(text)
