"""Thousands of random requests through one engine, and what they leave behind: python benchmarks/soak.py.

Sizes, depths, exit rules, stop strings and cancellations are random; some requests cannot be served, some callbacks
raise, some streams are left. Exits with 1 if a page, a reservation, a request or memory is not given back. Memory is
compared with that after the first 500 requests.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from open_mythos import MythosConfig, OpenMythos
from open_mythos.data.tokenizer_spec import char_tokenizer
from open_mythos.inference import (
    Engine,
    Event,
    PredictionChange,
    SamplingParams,
    StableArgmax,
    StateChange,
    stream_long,
)

WARM_UP = 500
"""Requests before memory is first read."""
TOLERANCE = 4 * 2**20
"""Bytes by which memory may then have grown: the heap takes 3.7 MiB more until request 1,500 and then hardly any; a
kilobyte kept of each of 10,000 requests would add 9.3 MiB."""
LETTERS = "abcdefghijklmno"
RULES = (None, None, StateChange(0.3), PredictionChange(0.05), StableArgmax(2))


@dataclass
class Report:
    """What came of it all."""

    endings: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    seconds: float = 0.0
    memory_after_warm_up: int = 0
    memory: int = 0
    pages_held: int = 0
    pages_reserved: int = 0
    requests_left: int = 0

    @property
    def leaks(self) -> list[str]:
        """What was not given back, in words."""
        grown = self.memory - self.memory_after_warm_up
        found = {"pages held": self.pages_held, "pages reserved": self.pages_reserved, "requests": self.requests_left}
        leaks = [f"{count} {name} left" for name, count in found.items() if count]
        return [*leaks, f"memory grew by {grown / 2**20:.1f} MiB"] if grown > TOLERANCE else leaks


def soak(requests: int, seed: int = 0, advance: Callable[[int], None] = lambda done: None) -> Report:
    """So many requests in random rounds; `advance` is told how many are done."""
    random, engine, report = Random(seed), _engine(seed), Report()
    begin, done, read, rounds = time.perf_counter(), 0, False, cycle(ROUNDS)
    while done < requests:
        prompts = [_prompt(random) for _ in range(min(random.randint(1, 24), requests - done))]
        params = [_wishes(random) for _ in prompts]
        report.endings.update(next(rounds)(random, engine, prompts, params))
        done += len(prompts)
        advance(done)
        if done >= WARM_UP and not read:
            report.memory_after_warm_up, read = _memory(), True
    report.seconds, report.tokens = time.perf_counter() - begin, engine.stats().tokens
    report.memory = _memory()
    engine.forget_prefixes()
    report.memory_after_warm_up = report.memory_after_warm_up if read else report.memory
    report.pages_held = engine.cache.pages.n_pages - engine.cache.pages.n_free
    report.pages_reserved, report.requests_left = engine.scheduler.reserved, len(engine.scheduler)
    return report


def _engine(seed: int) -> Engine:
    """A model whose positions halt at different loops, and a cache that not all requests fit into at once."""
    torch.manual_seed(seed)
    sizes = {"dim": 16, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 24, "max_seq_len": 48, "max_loop_iters": 4}
    model = OpenMythos(MythosConfig(vocab_size=len(LETTERS) + 1, window=None, outer_window=None, **sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return Engine(model, tokenizer=char_tokenizer([LETTERS]), max_batch_tokens=64, cache_bytes=2**18)


def _prompt(random: Random) -> list[int]:
    """Mostly tokens; sometimes none, too many, or one that does not exist."""
    length = random.choice([0, 60] if random.random() < 0.04 else range(1, 24))
    unknown = [len(LETTERS) + 1] if random.random() < 0.02 else []
    return [random.randrange(len(LETTERS)) for _ in range(length)] + unknown


def _wishes(random: Random) -> SamplingParams:
    letters = random.sample(LETTERS, 2)
    return SamplingParams(
        max_new_tokens=random.randint(1, 8),
        n_loops=random.choice(["auto", 1, 2, 6, 10**6 if random.random() < 0.05 else 3]),
        exit_rule=random.choice(RULES),
        temperature=random.choice([0.0, 1.0]),
        stop_tokens=(len(LETTERS),),
        stop_strings=random.choice([(), ("".join(letters),), tuple(letters)]),
        seed=random.randrange(1000),
        logprobs=random.random() < 0.2,
    )


def _generated(random: Random, engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[str]:
    """All at once, with callbacks of which some raise."""

    def on_event(event: Event) -> None:
        if random.random() < 0.01:
            raise RuntimeError("nobody listens")

    return [str(output.finish_reason) for output in engine.generate(prompts, params, on_event)]


def _cancelled(random: Random, engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[str]:
    """Step by step, some cancelled at a random moment."""
    requests = [engine.submit(*both) for both in zip(prompts, params, strict=True)]
    while engine.busy:
        engine.step()
        if random.random() < 0.2:
            engine.cancel(random.choice(requests).index)
    return [str(request.output.finish_reason) for request in requests]


def _left(random: Random, engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[str]:
    """As streams of text longer than the context, some left before their end."""
    longer = [one if random.random() < 0.9 else replace(one, max_new_tokens=60) for one in params]
    stream, endings = stream_long(engine, prompts, longer), ["stream left"] * len(prompts)
    patience = random.choice([10**9, random.randint(1, 20)])
    for number, event in enumerate(stream, start=1):
        if event.finish_reason is not None:
            endings[event.request] = event.finish_reason
        if number == patience:
            break
    stream.close()
    return endings


ROUNDS = (_generated, _cancelled, _left)


def _memory() -> int:
    """Resident bytes of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console, notes = Console(highlight=False), Console(stderr=True)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, disable=not notes.is_terminal) as progress:
        bar = progress.add_task("", total=options.requests)
        report = soak(options.requests, options.seed, lambda done: progress.update(bar, completed=done))
    console.print(_table(report))
    for leak in report.leaks:
        console.print(f"LEAK: {leak}", style="bold red")
    if not report.leaks:
        console.print("Nothing was left behind.", style="green")
    return 1 if report.leaks else 0


def _table(report: Report) -> Table:
    table = Table("what", "figure", box=None, padding=(0, 2), header_style="bold")
    table.columns[1].justify = "right"
    for ending, count in report.endings.most_common():
        table.add_row(f"requests: {ending}", f"{count:,}")
    table.add_row("new tokens", f"{report.tokens:,}")
    table.add_row("seconds", f"{report.seconds:,.0f}")
    table.add_row("pages held, pages reserved", f"{report.pages_held}, {report.pages_reserved}")
    table.add_row("requests left in the engine", f"{report.requests_left}")
    table.add_row(f"memory after {WARM_UP} requests", f"{report.memory_after_warm_up / 2**20:.1f} MiB")
    table.add_row("memory at the end", f"{report.memory / 2**20:.1f} MiB")
    grown = (report.memory - report.memory_after_warm_up) / 2**20
    table.add_row(f"grown (allowed: {TOLERANCE / 2**20:.0f} MiB)", f"{grown:+.1f} MiB")
    return table


if __name__ == "__main__":
    sys.exit(main())
