"""Speculation across depth on a trained text model, one request at a time: python benchmarks/speculation.py RUN.

Greedy, 16 loops, half of the context given and half generated. Same tokens, or it fails. Each setting takes its turn on
every text; seconds are summed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from open_mythos.inference import Engine, SamplingParams, Speculation
from trained import model_and_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="Folder of a run of mythos train on text.")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--loops", type=int, default=16)
    options = parser.parse_args()
    model, texts = model_and_texts(options.run, options.texts)
    half = model.config.max_seq_len // 2
    settings: dict[str, Speculation | None] = {"plain": None}
    settings |= {f"{n} loops, at most {most}": Speculation(n, most) for n in (1, 2, 3, 4) for most in (4, 8)}
    engines = {name: Engine(model, reuse_prefixes=False, cache_bytes=2**24) for name in settings}
    alone = 0.0
    for number, text in enumerate([texts[0], *texts]):
        tokens = {}
        for name, speculation in settings.items():
            params = SamplingParams(
                max_new_tokens=half, n_loops=options.loops, temperature=0.0, speculation=speculation
            )
            if number == 1:  # the first round warmed up
                engines[name] = Engine(model, reuse_prefixes=False, cache_bytes=2**24)
            (output,) = engines[name].generate([text[:half]], params)
            tokens[name] = output.token_ids
        begin = time.perf_counter()
        model.generate(torch.tensor([text[:half]]), half, options.loops, 0.0)
        alone = alone + time.perf_counter() - begin if number else 0.0
        assert all(found == tokens["plain"] for found in tokens.values()), "speculation changed a token"
    table = Table("guess after", "tok/s", "times plain", "guesses right", "calls of the block per token", box=None)
    plain = engines["plain"].stats().tokens_per_second
    for name, engine in engines.items():
        stats = engine.stats()
        right = f"{stats.accepted / stats.drafted:.0%}" if stats.drafted else "-"
        rate = stats.tokens_per_second
        table.add_row(name, f"{rate:.1f}", f"{rate / plain:.2f}", right, f"{stats.waves / stats.tokens:.1f}")
    rate = len(texts) * half / alone
    table.add_row("model.generate, no engine", f"{rate:.1f}", f"{rate / plain:.2f}", "-", "-")
    Console().print(table)


if __name__ == "__main__":
    main()
