"""Text from a trained model, written as it is made; or the texts of many prompts at once.

examples:
  mythos generate runs/book --prompt "Once upon a time"
  mythos generate runs/book --prompt "Once" --loops 16 --exit state:0.05 --show-exits
  mythos generate runs/book --prompt "Q: why?" --stop "Q:" --temperature 0
  mythos generate runs/book --prompts questions.jsonl --out answers.jsonl

where it ends:
  at the model's end of text, before a --stop string, or after --max-new-tokens
  text longer than the model's context goes on from the second half of what is there
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from open_mythos.cli.generate_batch import encode, engine_for, read_prompts, write_texts
from open_mythos.cli.generate_display import Display
from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.inference.exit import ExitRule, PredictionChange, StableArgmax, StateChange
from open_mythos.inference.long_text import stream_long
from open_mythos.inference.sampling import SamplingParams
from open_mythos.model.mythos import OpenMythos


@dataclass(frozen=True)
class Arguments:
    """Which model, from what, how deep, how chosen."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="A model folder with a tokenizer.")]
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help="Text to go on from; by default, a new line.")] = (
        None
    )
    prompts: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FILE",
            help='Many prompts, served together: one on each line, or {"prompt": TEXT} where the name ends in .jsonl. '
            "The texts come as JSON lines, in that order. Prompt N is sampled with the seed + N - 1.",
        ),
    ] = None
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help="Write the texts of --prompts there, not on the screen.")
    ] = None
    loops: Annotated[
        str,
        tyro.conf.arg(
            metavar="N|auto",
            help='The most loops that a token may take; "auto" is the model\'s max_loop_iters. A model trained to halt '
            "stops earlier where it has learned to, and --exit where the rule says so; a model without halting takes "
            "all of them for every token unless there is --exit.",
        ),
    ] = "auto"
    exit: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="RULE",
            help="Stop looping early, token by token. state:0.05, where the state moves less than 0.05 of its size in "
            "a loop; prediction:0.02, where the prediction changes by less than 0.02 nats; argmax:3, where the most "
            "likely token has been the same for 3 loops. Larger tolerances are quicker and less exact.",
        ),
    ] = None
    show_exits: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Colour every token by the loops that it took.")
    ] = False
    max_new_tokens: Annotated[
        int, tyro.conf.arg(metavar="N", help="How much text, at most; longer than the context if you like.")
    ] = 200
    temperature: Annotated[
        float, tyro.conf.arg(metavar="T", help="Below 1 more predictable, above 1 more varied; 0 is the likeliest.")
    ] = 0.8
    top_k: Annotated[int | None, tyro.conf.arg(metavar="K", help="Choose among the K likeliest tokens only.")] = None
    top_p: Annotated[
        float, tyro.conf.arg(metavar="P", help="Choose among the likeliest tokens that make up P together.")
    ] = 1.0
    min_p: Annotated[
        float, tyro.conf.arg(metavar="P", help="Leave out tokens less likely than P times the likeliest.")
    ] = 0.0
    repetition_penalty: Annotated[
        float, tyro.conf.arg(metavar="R", help="Above 1, tokens that are there already become less likely.")
    ] = 1.0
    stop: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="TEXT", help="End before this text; may be given several times."),
    ] = ()
    seed: Annotated[int, tyro.conf.arg(metavar="N", help="Equal seeds give equal text.")] = 0


def parse(words: list[str]) -> Arguments:
    """The words, with a help that shows examples."""
    return tyro.cli(Arguments, prog="mythos generate", args=words, description=__doc__)


def run(arguments: Arguments) -> None:
    """Write one text, or those of a file of prompts."""
    _check(arguments)
    wishes = _wishes(arguments)
    prompts = ["\n" if arguments.prompt is None else arguments.prompt]
    if arguments.prompts is not None:
        prompts = read_prompts(arguments.prompts)
    model = OpenMythos.from_pretrained(arguments.model)
    tokenizer = TextTokenizer.load(arguments.model)
    wishes = replace(wishes, stop_tokens=(tokenizer.end_of_text,))
    if arguments.prompts is not None:
        write_texts(model, tokenizer, prompts, wishes, arguments.out)
    else:
        _write(model, tokenizer, prompts[0], wishes, arguments.show_exits)


def _write(model: OpenMythos, tokenizer: TextTokenizer, prompt: str, wishes: SamplingParams, show_exits: bool) -> None:
    ids = encode(tokenizer, prompt, model.config.max_seq_len)
    engine = engine_for(model, tokenizer, [ids], wishes)
    events = stream_long(engine, [ids], [wishes])
    with Console(stderr=True).status("Reading the prompt. On a CPU, the first run of all compiles for some seconds."):
        first = next(events)  # whatever is wrong is said before anything is printed
    if first.error is not None:
        raise ValueError(first.error)
    display = Display(tokenizer, wishes.most_loops(model.config), show_exits)
    display.begin(prompt)
    for event in chain([first], events):
        display.show(event)
    display.end(engine.stats())


def _check(arguments: Arguments) -> None:
    if arguments.prompts is None and arguments.out is not None:
        raise ValueError("out is for the texts of --prompts; the text of one prompt goes to the screen, or into a pipe")
    if arguments.prompts is not None and (arguments.prompt is not None or arguments.show_exits):
        other = "--show-exits" if arguments.prompt is None else "--prompt"
        raise ValueError(f"prompts is {arguments.prompts}; it cannot be given together with {other}")
    if "" in arguments.stop:
        raise ValueError("stop is ''; it must be a text that is not empty")


def _wishes(arguments: Arguments) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        n_loops=_loops(arguments.loops),
        exit_rule=None if arguments.exit is None else _exit_rule(arguments.exit),
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        stop_strings=arguments.stop,
        seed=arguments.seed,
    )


def _loops(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f'loops is {text!r}; it must be an integer of at least 1, or "auto"')
    return int(text)


def _exit_rule(text: str) -> ExitRule:
    name, _, value = text.partition(":")
    try:
        if name == "state":
            return StateChange(float(value))
        if name == "prediction":
            return PredictionChange(float(value))
        if name == "argmax":
            return StableArgmax(int(value))
    except ValueError:
        pass
    accepted = "state:TOLERANCE or prediction:TOLERANCE with a number above 0, or argmax:LOOPS with an integer above 0"
    raise ValueError(f"exit is {text!r}; it must be {accepted}")
