"""Text from a trained model, written as it is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
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
    max_new_tokens: Annotated[
        int, tyro.conf.arg(help="How much text, at most; longer than the context if you like.")
    ] = 200
    temperature: Annotated[float, tyro.conf.arg(help="0 takes the most likely token.")] = 0.8
    top_k: Annotated[int | None, tyro.conf.arg(help="Choose among that many only.")] = None
    seed: Annotated[int, tyro.conf.arg(help="Equal seeds give equal text.")] = 0


def run(arguments: Arguments) -> None:
    """Print the prompt and what follows."""
    n_loops = _loops(arguments.loops)
    if arguments.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {arguments.max_new_tokens}; it must be at least 1")
    model = OpenMythos.from_pretrained(arguments.model)
    tokenizer = TextTokenizer.load(arguments.model)
    prompt = tokenizer.encode(arguments.prompt)
    if not 1 <= len(prompt) < model.config.max_seq_len:
        limit = model.config.max_seq_len - 1
        raise ValueError(f"prompt has {len(prompt)} tokens; it must have 1 to max_seq_len - 1 ({limit})")
    stream = tokenizer.stream()
    tokens = _tokens(model, prompt, n_loops, arguments)
    first = next(tokens)  # whatever is wrong is said before anything is printed
    print(arguments.prompt, end="", flush=True)
    for token in chain([first], tokens):
        if token == tokenizer.end_of_text:
            break
        print(stream.push(token), end="", flush=True)
    print(stream.finish(), flush=True)


def _tokens(model: OpenMythos, prompt: list[int], n_loops: int | None, arguments: Arguments) -> Iterator[int]:
    """New tokens; where the context is full, the model goes on from its second half."""
    generator = torch.Generator().manual_seed(arguments.seed)
    context, left = prompt, arguments.max_new_tokens
    while left:
        ids = torch.tensor([context], dtype=torch.int64).reshape(1, -1)
        room = min(left, max(1, model.config.max_seq_len - len(context)), model.config.max_output_tokens)
        for new in model.stream(ids, room, n_loops, arguments.temperature, arguments.top_k, generator=generator):
            context = [*context, int(new)]
            yield context[-1]
        left -= room
        if len(context) >= model.config.max_seq_len:
            context = context[-(model.config.max_seq_len // 2) :]


def _loops(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f'loops is {text!r}; it must be an integer of at least 1, or "auto"')
    return int(text)
