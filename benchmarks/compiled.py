"""Tokens per second of the engine, plain and with compiled waves: python benchmarks/compiled.py.

Untrained weights, prompts of 8 tokens, 16 new ones each, 4 loops, greedy. Seconds are those of this process, with which
other work on the machine interferes less; compiling, a part of the first call alone, is timed by the clock.
"""

from __future__ import annotations

import argparse
import time
from random import Random

import torch
from rich.console import Console
from rich.table import Table

from open_mythos import MythosConfig, OpenMythos
from open_mythos.bench.cases import SIZES
from open_mythos.bench.timing import median
from open_mythos.inference import Engine, SamplingParams

_PROMPT, _NEW_TOKENS = 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tutorial-gqa", "small-gqa", "small-mla"])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = Table("size", "requests", "plain tok/s", "compiled tok/s", "ratio", "first call s", box=None)
    for size in options.sizes:
        torch.manual_seed(0)
        model = OpenMythos(MythosConfig(**SIZES[size])).eval()
        for n_requests in options.requests:
            plain, compiled, first = _race(model, n_requests, options.rounds)
            figures = [f"{plain:.0f}", f"{compiled:.0f}", f"{compiled / plain:.2f}", f"{first:.0f}"]
            table.add_row(size, str(n_requests), *figures)
    Console().print(table)


def _race(model: OpenMythos, n_requests: int, rounds: int) -> tuple[float, float, float]:
    """Tokens per second of both, and seconds of the compiled one's first call."""
    random = Random(0)
    prompts = [[random.randrange(model.config.vocab_size) for _ in range(_PROMPT)] for _ in range(n_requests)]
    params = SamplingParams(max_new_tokens=_NEW_TOKENS, n_loops=4, temperature=0.0)
    engines = [Engine(model, cache_bytes=2**26, reuse_prefixes=False, compiled=compiled) for compiled in (False, True)]
    expected = engines[0].generate(prompts, params)
    begin = time.perf_counter()
    outputs = engines[1].generate(prompts, params)
    first = time.perf_counter() - begin
    same = sum(one.token_ids == other.token_ids for one, other in zip(outputs, expected, strict=True))
    assert same >= 0.9 * n_requests, f"{same} of {n_requests} texts are the same"
    times = [[_seconds(engine, prompts, params) for engine in engines] for _ in range(rounds)]
    plain, compiled = (n_requests * _NEW_TOKENS / median(each) for each in zip(*times, strict=True))
    return plain, compiled, first


def _seconds(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> float:
    begin = time.process_time()
    engine.generate(prompts, params)
    return time.process_time() - begin


if __name__ == "__main__":
    main()
