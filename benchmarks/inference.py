"""Tokens per second of the engine beside open-mythos 0.5.0, one request at a time: python benchmarks/inference.py.

Small size, 4 loops, greedy, prompts of 8 to 64 tokens, untrained weights: every position runs all its loops.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table

from open_mythos import MythosConfig, OpenMythos
from open_mythos.bench.cases import SIZES
from open_mythos.bench.peer import PEER, load_peer
from open_mythos.inference import Engine, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--peer-requests", type=int, default=4, help="The peer's rate does not depend on how many.")
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
        engine.generate(prompts[:2], params)
        engine = Engine(model)
        engine.generate(prompts, params)
        stats = engine.stats()
        theirs = _rate(
            lambda ids, rival=rival: rival.generate(ids, options.new_tokens, n_loops=4, top_k=1), few, options
        )
        alone = _rate(lambda ids, model=model: model.generate(ids, options.new_tokens, 4, 0.0), few, options)
        rates = [stats.tokens_per_second, alone, theirs, stats.tokens_per_second / theirs, stats.occupancy]
        table.add_row(size, *(f"{rate:.1f}" for rate in rates))
    Console().print(table)


def _rate(generate, prompts: list[torch.Tensor], options: argparse.Namespace) -> float:
    generate(prompts[0])
    begin = time.perf_counter()
    for prompt in prompts:
        generate(prompt)
    return len(prompts) * options.new_tokens / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
