"""Memory and overhead of training, measured: python benchmarks/training.py [loss | recompute | overhead] [--json FILE].

Memory is the peak of the resident set over its level before the step, each case in a process of its own. Times of the
trainer and of a bare loop alternate in one process, and their ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from open_mythos import MythosConfig, OpenMythos
from open_mythos.bench.cases import SIZES
from open_mythos.data.batch import Batch
from open_mythos.training.depth import Fixed, LoopPlan
from open_mythos.training.loss import cross_entropy
from open_mythos.training.objective import Objective
from open_mythos.training.records import JsonLines, TensorBoard
from open_mythos.training.trainer import Trainer, TrainerConfig

MIB = 2**20


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_of(prepare: Callable[..., Callable[[], object]], *arguments: object) -> int:
    """Bytes by which the peak of `prepare(*arguments)()` exceeds what was held before, in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (prepare, arguments))


def _peak(prepare: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> int:
    step = prepare(*arguments)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return peak - before


def loss_step(chunked: bool) -> Callable[[], object]:
    """Loss, z-loss and gradients of 8x512 tokens with a vocabulary of 32,768 at width 384."""
    torch.manual_seed(0)
    features, head = torch.randn(4096, 384, requires_grad=True), torch.randn(32768, 384, requires_grad=True)
    targets = torch.randint(0, 32768, (4096,))

    def step() -> None:
        if chunked:
            cross_entropy(features, head, targets).loss.backward()
        else:
            F.cross_entropy(F.linear(features, head), targets, reduction="sum").backward()

    return step


def loop_step(n_loops: int, recompute: bool) -> Callable[[], object]:
    """Forward and backward of the small size on 4x256 tokens; gradients are there before, so they do not count."""
    torch.manual_seed(0)
    model = OpenMythos(MythosConfig(**SIZES["small-gqa"])).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    objective = Objective(model, recompute=recompute)
    ids = torch.randint(0, 4096, (4, 256))
    plan = LoopPlan(torch.full((4,), n_loops, dtype=torch.int32))
    return lambda: objective(ids, ids, plan).loss.backward()


class RandomText:
    """Batches of 4x256 random tokens."""

    vocab_size, bytes_per_token = 4096, 4.0

    def batch(self, step: int) -> Batch:
        ids = torch.randint(0, 4096, (4, 257), generator=torch.Generator().manual_seed(step))
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def position(self, step: int) -> str:
        return f"step {step}"

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        pass


def overhead(rounds: int, steps: int) -> list[dict[str, object]]:
    """Seconds per step of the trainer, with its log, TensorBoard and a checkpoint per round, and of a bare loop."""
    torch.manual_seed(0)
    config = MythosConfig(**SIZES["small-gqa"], deeper_rate=0)  # as the trainer has it
    bare = OpenMythos(config).train()
    adamw = torch.optim.AdamW(bare.parameters(), lr=1e-4)
    times: dict[str, list[float]] = {"bare": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        trained = OpenMythos(config)
        log, board = JsonLines(path, 0), TensorBoard(path, 0)
        for done in range(rounds):
            begin = time.perf_counter()
            for step in range(steps):
                batch = RandomText().batch(done * steps + step)
                loss = F.cross_entropy(bare(batch.ids, 4).flatten(0, 1), batch.targets.flatten())
                adamw.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
                adamw.step()
            times["bare"].append((time.perf_counter() - begin) / steps)
            settings = TrainerConfig(steps=(done + 1) * steps, checkpoint_every=steps)
            trainer = Trainer(trained, RandomText(), Fixed(loops=4), settings, checkpoints=path / "checkpoints")
            begin = time.perf_counter()
            trainer.run([log, board])
            times["trainer"].append((time.perf_counter() - begin) / steps)
        log.close()
        board.close()
    each = {name: statistics.median(values[1:]) for name, values in times.items()}
    row = {"what": "trainer's step beside a bare one, small size", **each, "ratio": each["trainer"] / each["bare"]}
    return [row]


def memory(what: str, ours: int, other: int, accepted: float) -> dict[str, object]:
    """A row of the table."""
    return {"what": what, "MiB": ours / MIB, "beside MiB": other / MIB, "ratio": ours / other, "accepted": accepted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="?", choices=["loss", "recompute", "overhead"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    if options.only in (None, "loss"):
        rows.append(memory("chunked loss / plain", peak_of(loss_step, True), peak_of(loss_step, False), 0.4))
    if options.only in (None, "recompute"):
        shallow, deep = peak_of(loop_step, 2, True), peak_of(loop_step, 16, True)
        rows.append(memory("recompute, 16 loops / 2 loops", deep, shallow, 1.5))
        rows.append(memory("16 loops, recompute / kept", deep, peak_of(loop_step, 16, False), 1.0))
    if options.only in (None, "overhead"):
        rows += overhead(options.rounds, options.steps)
    console = Console()
    for row in rows:
        table = Table(*row, box=None, padding=(0, 2))
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
