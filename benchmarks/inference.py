"""Tokens per second of the engine beside open-mythos 0.5.0, one request at a time: python benchmarks/inference.py.

Small size, 4 loops, greedy, prompts of 8 to 64 tokens, untrained weights: every position runs all its loops. The
engine, which knows no prompt from before, the model by itself and the peer take turns; rates are those of the medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table

from open_mythos import MythosConfig, OpenMythos
from open_mythos.bench.cases import SIZES
from open_mythos.bench.peer import PEER, load_peer
from open_mythos.bench.timing import median, race
from open_mythos.inference import Engine, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--peer-requests", type=int, default=4, help="The peer's rate does not depend on how many.")
    parser.add_argument("--seconds", type=float, default=20.0, help="Of each size; at least five turns.")
    parser.add_argument("--peer-dir", type=Path, default=Path(".bench/peer"))
    options = parser.parse_args()
    peer = load_peer(options.peer_dir)
    random = Random(0)
    prompts = [[random.randrange(4096) for _ in range(random.randint(8, 64))] for _ in range(options.requests)]
    params = SamplingParams(max_new_tokens=options.new_tokens, n_loops=4, temperature=0.0)
    table = Table(
        "size", "engine tok/s", "alone tok/s", f"{PEER} tok/s", "engine / peer", "requests per call", box=None
    )
    for size in ("small-gqa", "small-mla"):
        torch.manual_seed(0)
        model = OpenMythos(MythosConfig(**SIZES[size])).eval()
        rival = peer.OpenMythos(peer.MythosConfig(**SIZES[size])).eval()
        few = [torch.tensor([prompt]) for prompt in prompts[: options.peer_requests]]
        engine = Engine(model)
        times = race(
            {
                "engine": partial(_serve, engine, prompts, params),
                "alone": partial(_one_by_one, partial(model.generate, temperature=0.0), few, options.new_tokens),
                "peer": partial(_one_by_one, partial(rival.generate, top_k=1), few, options.new_tokens),
            },
            options.seconds,
            warmup=1,
        )
        ours = len(prompts) * options.new_tokens / median(times["engine"])
        alone, theirs = (len(few) * options.new_tokens / median(times[name]) for name in ("alone", "peer"))
        rates = [ours, alone, theirs, ours / theirs, engine.stats().occupancy]
        table.add_row(size, *(f"{rate:.1f}" for rate in rates))
    Console().print(table)


def _serve(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> None:
    engine.generate(prompts, params)
    engine.forget_prefixes()


def _one_by_one(generate: Callable[..., object], prompts: list[torch.Tensor], new_tokens: int) -> None:
    for prompt in prompts:
        generate(prompt, new_tokens, n_loops=4)


if __name__ == "__main__":
    main()
