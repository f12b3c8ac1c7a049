"""The texts of many prompts, served together, as JSON lines in the order of the prompts.

Main entries: `read_prompts`, `write_texts`; and what a single prompt needs too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from open_mythos.cli.generate_display import summary
from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.inference.cache import cache_bytes_needed
from open_mythos.inference.engine import Engine, Event
from open_mythos.inference.long_text import stream_long
from open_mythos.inference.sampling import SamplingParams
from open_mythos.model.mythos import OpenMythos

_CACHE_BYTES = 2**28
"""Of many requests at once; a single one may need more, and gets it."""


@dataclass
class _Row:
    """A line of the output."""

    prompt: str
    text: str = ""
    tokens: int = 0
    exit_loops: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    def take(self, event: Event) -> None:
        self.text += event.text or ""
        self.finish_reason, self.error = event.finish_reason, event.error
        if event.exit_loops is not None:
            self.tokens += 1
            self.exit_loops.append(event.exit_loops)


def read_prompts(path: Path) -> list[str]:
    """One from each line that is not empty, or its "prompt" where the file's name ends in .jsonl."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts is {path}, which is not UTF-8: {error}") from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"prompts is {path}, which has no prompt; it must have one on each line")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(f"{path}, line {number},", line) for number, line in numbered]


def _prompt_of(where: str, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.keys() != {"prompt"} or not isinstance(found["prompt"], str):
        raise ValueError(f'{where} is {line[:60]}; it must be {{"prompt": TEXT}} and nothing else')
    return found["prompt"]


def encode(tokenizer: TextTokenizer, prompt: str, max_seq_len: int) -> list[int]:
    """The prompt's ids; `ValueError` if they leave no room for a token."""
    ids = tokenizer.encode(prompt)
    if not 1 <= len(ids) < max_seq_len:
        raise ValueError(f"prompt has {len(ids)} tokens; it must have 1 to max_seq_len - 1 ({max_seq_len - 1})")
    return ids


def engine_for(
    model: OpenMythos, tokenizer: TextTokenizer, prompts: Sequence[list[int]], wishes: SamplingParams
) -> Engine:
    """An engine with a cache for all of them at once, or for as many as go into a quarter of a gigabyte."""
    lengths = [min(len(ids) + wishes.max_new_tokens, model.config.max_seq_len) for ids in prompts] or [1]
    needed = [cache_bytes_needed(model, length, wishes.most_loops(model.config)) for length in lengths]
    return Engine(model, tokenizer=tokenizer, cache_bytes=max(*needed, min(sum(needed), _CACHE_BYTES)))


def write_texts(
    model: OpenMythos, tokenizer: TextTokenizer, prompts: Sequence[str], wishes: SamplingParams, out: Path | None
) -> None:
    """Write a row for every prompt, into a file or to standard output; `ValueError` at the end if some failed."""
    rows, served = [_Row(prompt) for prompt in prompts], dict[int, list[int]]()
    for place, row in enumerate(rows):
        try:
            served[place] = encode(tokenizer, row.prompt, model.config.max_seq_len)
        except ValueError as error:
            row.finish_reason, row.error = "error", str(error)
    notes = Console(stderr=True)
    if out is None:
        _serve(model, tokenizer, rows, served, wishes, sys.stdout, notes)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8") as file:
            _serve(model, tokenizer, rows, served, wishes, file, notes)
    failed = sum(row.finish_reason == "error" for row in rows)
    if failed:
        raise ValueError(f"{failed} of {len(rows)} prompts failed; their rows say why")


def _serve(
    model: OpenMythos,
    tokenizer: TextTokenizer,
    rows: Sequence[_Row],
    served: dict[int, list[int]],
    wishes: SamplingParams,
    file: TextIO,
    notes: Console,
) -> None:
    """Rows are written as soon as all before them are."""
    places, written = list(served), 0
    params = [replace(wishes, seed=wishes.seed + place) for place in places]
    columns = (TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    engine = engine_for(model, tokenizer, list(served.values()), wishes)
    with Progress(*columns, console=notes, disable=file.isatty() or not notes.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=len(rows))
        for event in (None, *stream_long(engine, list(served.values()), params)):
            if event is not None:
                rows[places[event.request]].take(event)
            while written < len(rows) and rows[written].finish_reason is not None:
                print(json.dumps(asdict(rows[written]), ensure_ascii=False), file=file, flush=True)
                written += 1
            progress.update(bar, completed=sum(row.finish_reason is not None for row in rows))
    if notes.is_terminal:
        notes.print(summary(engine.stats(), [loops for row in rows for loops in row.exit_loops]))
