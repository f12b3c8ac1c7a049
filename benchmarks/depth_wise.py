"""Depth-wise batching beside static batching of the same engine: python benchmarks/depth_wise.py RUN.

A trained text model whose positions exit by a rule, 32 requests of mixed prompt and output lengths, greedy. In a static
batch nobody gets the next token before the deepest has halted, and nobody begins before all have ended; "in step" only
the first of these. All compute active positions only.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from open_mythos.inference import Engine, PredictionChange, SamplingParams, StableArgmax, StateChange
from open_mythos.inference.scheduler import Job, Scheduler
from trained import model_and_texts


class InStep(Scheduler):
    """Next tokens for all, once all have halted."""

    def takes_turn(self, due: int, others: int) -> bool:
        return others == 0


class Static(InStep):
    """A batch is filled once, and the next begins when it has ended."""

    filling = True

    def has_room(self, job: Job, in_flight: int) -> bool:
        self.filling = self.filling or not self._running
        return self.filling and super().has_room(job, in_flight)

    def takes_turn(self, due: int, others: int) -> bool:
        self.filling = False
        return super().takes_turn(due, others)


SCHEDULERS = {"depth-wise": Scheduler, "in step": InStep, "static": Static}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="Folder of a run of mythos train on text.")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--loops", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, texts = model_and_texts(options.run, options.requests)
    random, context = Random(0), model.config.max_seq_len
    prompts = [text[: random.randint(4, context // 4)] for text in texts]
    lengths = [random.randint(8, 3 * context // 4) for _ in texts]
    ratios_of = ("static", "in step")
    headings = ("loops per token", *SCHEDULERS, *(f"times {name}" for name in ratios_of))
    table = Table("exit rule", *headings, title="Tokens per second", box=None, padding=(0, 2, 0, 0))
    for rule in (None, StateChange(0.05), PredictionChange(0.005), StableArgmax(2)):
        params = [
            SamplingParams(max_new_tokens=n, n_loops=options.loops, exit_rule=rule, temperature=0.0) for n in lengths
        ]
        rates: dict[str, list[float]] = {name: [] for name in SCHEDULERS}
        outputs, loops = {}, 0.0
        for _ in range(options.rounds):
            for name, kind in SCHEDULERS.items():
                engine = Engine(model, max_batch_tokens=options.batch_tokens, cache_bytes=2**26, reuse_prefixes=False)
                engine.scheduler = kind(options.batch_tokens, engine.cache.pages.n_pages)
                found = engine.generate(prompts, params)
                outputs[name] = [(output.token_ids, output.exit_loops) for output in found]
                rates[name].append(engine.stats().tokens_per_second)
                loops = engine.stats().loops_per_token
        assert outputs["depth-wise"] == outputs["in step"] == outputs["static"], "the schedule changed a token"
        middle = {name: statistics.median(values) for name, values in rates.items()}
        ratios = [middle["depth-wise"] / middle[name] for name in ratios_of]
        cells = [f"{rate:.0f}" for rate in middle.values()] + [f"{ratio:.2f}" for ratio in ratios]
        table.add_row("all loops" if rule is None else str(rule), f"{loops:.1f}", *cells)
    Console(width=112).print(table)


if __name__ == "__main__":
    main()
