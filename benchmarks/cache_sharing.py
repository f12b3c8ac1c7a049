"""What sharing the cache over loops costs and saves, on a trained text model: python benchmarks/cache_sharing.py RUN.

Held-out texts are scored token by token through the engine: all but the first token of each is a given continuation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from open_mythos.analysis.kv_memory import bytes_per_position
from open_mythos.inference import Engine, EveryLoop, FirstLoops, Modulo, SamplingParams
from trained import model_and_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="Folder of a run of mythos train on text.")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--loops", type=int, nargs="+", default=[4, 8])
    options = parser.parse_args()
    model, texts = model_and_texts(options.run, options.texts)
    table = Table("loops", "cache", "bytes per token", "held-out loss", "difference", box=None)
    for n_loops in options.loops:
        exact = 0.0
        for sharing in (EveryLoop(), FirstLoops(0), FirstLoops(1), FirstLoops(2), Modulo(2), Modulo(3)):
            engine = Engine(model, cache_bytes=2**26, sharing=sharing, reuse_prefixes=False)
            params = [
                SamplingParams(
                    max_new_tokens=len(text) - 1, n_loops=n_loops, continuation=tuple(text[1:]), logprobs=True
                )
                for text in texts
            ]
            outputs = engine.generate([text[:1] for text in texts], params)
            scores = [score for output in outputs for score in output.logprobs or ()]
            loss = -sum(scores) / len(scores)
            exact = loss if sharing == EveryLoop() else exact
            size = bytes_per_position(model.config, n_loops, model.embed.weight.dtype, sharing)
            table.add_row(str(n_loops), str(sharing), str(size), f"{loss:.4f}", f"{loss - exact:+.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
