"""Speculation across depth on a trained text model, one request at a time: python benchmarks/speculation.py RUN.

Greedy, 16 loops, half of the context given and half generated. Same tokens, or it fails. Each setting takes its turn on
every text; seconds are summed. Further tokens are those after the first, which waits for the prompt: no guess helps it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from open_mythos import OpenMythos
from open_mythos.inference import Engine, SamplingParams, Speculation
from trained import model_and_texts


@dataclass
class Contestant:
    """A setting, and the seconds that it took so far."""

    name: str
    speculation: Speculation | None
    engine: Engine
    seconds: float = 0.0
    further: float = 0.0
    """Of these, after the first token."""

    def generate(self, prompt: list[int], n_new: int, n_loops: int) -> list[int]:
        """The new tokens."""
        params = SamplingParams(max_new_tokens=n_new, n_loops=n_loops, temperature=0.0, speculation=self.speculation)
        came: list[float] = []
        begin = time.perf_counter()
        (output,) = self.engine.generate([prompt], params, lambda _: came.append(time.perf_counter()))
        self.seconds, self.further = self.seconds + came[-1] - begin, self.further + came[-1] - came[0]
        return output.token_ids


def contestants(model: OpenMythos) -> list[Contestant]:
    """Without guesses, then with."""
    settings: list[Speculation | None] = [None]
    settings += [Speculation(n, most) for n in (1, 2, 3, 4) for most in (4, 8)]
    names = ["plain" if s is None else f"{s.loops} loops, at most {s.most}" for s in settings]
    return [
        Contestant(name, speculation, Engine(model, reuse_prefixes=False, cache_bytes=2**24))
        for name, speculation in zip(names, settings, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="Folder of a run of mythos train on text.")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--loops", type=int, default=16)
    options = parser.parse_args()
    model, texts = model_and_texts(options.run, options.texts)
    half = model.config.max_seq_len // 2
    for one in contestants(model):  # to warm up
        one.generate(texts[0][:half], half, options.loops)
    model.generate(torch.tensor([texts[0][:half]]), half, options.loops, 0.0)
    racing, alone = contestants(model), 0.0
    for text in texts:
        tokens = [one.generate(text[:half], half, options.loops) for one in racing]
        begin = time.perf_counter()
        model.generate(torch.tensor([text[:half]]), half, options.loops, 0.0)
        alone += time.perf_counter() - begin
        assert all(found == tokens[0] for found in tokens), "speculation changed a token"
    table = Table(
        *("guess after", "tok/s", "times plain", "further tok/s", "further, times plain", "guesses right"),
        "calls of the block per token",
        box=None,
    )
    plain, n = racing[0], len(texts) * half
    for one in racing:
        stats = one.engine.stats()
        right = f"{stats.accepted / stats.drafted:.0%}" if stats.drafted else "-"
        rates = f"{n / one.seconds:.0f}", f"{plain.seconds / one.seconds:.2f}"
        further = f"{(n - len(texts)) / one.further:.0f}", f"{plain.further / one.further:.2f}"
        table.add_row(one.name, *rates, *further, right, f"{stats.waves / stats.tokens:.1f}")
    table.add_row("model.generate, no engine", f"{n / alone:.0f}", f"{plain.seconds / alone:.2f}", *["-"] * 4)
    Console().print(table)


if __name__ == "__main__":
    main()
