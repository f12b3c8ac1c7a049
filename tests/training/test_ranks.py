"""Several ranks are one run: the losses, router biases and checkpoints of one process, one log, one error.

Ranks are processes that talk over gloo. What they compute is compared with what this process computes alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos import OpenMythos
from open_mythos.cli.main import main
from open_mythos.data.batch import IGNORED, Batch
from open_mythos.recipes.folder import locked
from open_mythos.training.depth import Asked, DepthPlan, Fixed, LoopPlan, Uniform
from open_mythos.training.optim import OptimConfig
from open_mythos.training.ranks import Ranks, joined
from open_mythos.training.records import read_metrics
from open_mythos.training.trainer import Trainer, TrainerConfig
from training.forked import Finished, on_ranks
from training.runs import Recorder, small_model, small_source

CLOSE = 1e-5
HALF = 3
"""Steps after which the runs that are to be resumed have a checkpoint; they have twice as many."""


class _Uneven:
    """Parity in which the first rank's sequences count two targets each, and those of the last one all of them."""

    vocab_size, bytes_per_token = 3, None

    def __init__(self) -> None:
        self._source = small_source()

    def batch(self, step: int) -> Batch:
        ids, targets, _ = self._source.batch(step)
        targets[:4, 2:] = IGNORED
        return Batch(ids, targets)

    def position(self, step: int) -> str:
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class _Uneasy:
    """One loop for all sequences of the first of two ranks, whose halting head then decides nothing; more for others.

    Ranks add up the gradients that there are, so all of them must have one for the same parameters.
    """

    name: ClassVar[str] = "uneasy"
    typical: ClassVar[float] = 2.0

    def draw(self, asked: Asked, random: torch.Generator) -> LoopPlan:
        return LoopPlan(torch.tensor([1, 1, 1, 1, 4, 2, 3, 1], dtype=torch.int32), 3)


@dataclass(frozen=True)
class Case:
    """A small run: mixture of experts, halting, loops drawn per sequence, the last two of them with gradients."""

    steps: int
    training: dict[str, Any] = field(default_factory=dict)
    uneven: bool = False
    folder: Path | None = None

    def run(self, ranks: Ranks) -> tuple[list[float], torch.Tensor]:
        """Losses, and the router biases at the end."""
        depth: DepthPlan = _Uneasy() if self.uneven else Uniform(least=1, most=4, grad_loops=2)
        trainer = Trainer(
            small_model(lora_rank=2, loop_embedding=True),
            _Uneven() if self.uneven else small_source(),
            depth,
            TrainerConfig(steps=self.steps, checkpoint_every=HALF, **self.training),
            ranks=ranks,
            checkpoints=self.folder,
        )
        told = Recorder()
        trainer.run([told])
        return told.losses, trainer.model.recurrent.block.ffn.router_bias


def _run_all(cases: dict[str, Case]) -> dict[str, tuple[list[float], torch.Tensor]]:
    with joined(torch.device("cpu")) as ranks:
        return {name: case.run(ranks) for name, case in cases.items()}


class _Gathers(TorchDispatchMode):
    """Counts the times that weights are gathered."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in func.name()
        return func(*args, **(kwargs or {}))


def _gathers(n_loops: int, ranks: Ranks) -> int:
    """In a step of so many loops on sharded weights."""
    config = TrainerConfig(steps=1, parallel="fsdp")
    trainer = Trainer(small_model(), small_source(), Fixed(loops=n_loops), config, ranks=ranks)
    with _Gathers() as gathers:
        trainer.run()
    return gathers.count


def _all_gathers(loops: list[int]) -> list[int]:
    with joined(torch.device("cpu")) as ranks:
        return [_gathers(n_loops, ranks) for n_loops in loops]


SETTLING = {"settle_weight": 0.1}
ALIKE = {
    "fsdp": Case(20, {"parallel": "fsdp", "micro_batch": 2}),
    "ddp": Case(20, {"parallel": "ddp", "micro_batch": 2}),
    "fsdp, uneven": Case(4, {"parallel": "fsdp", **SETTLING}, uneven=True),
    "ddp, uneven": Case(4, {"parallel": "ddp", **SETTLING}, uneven=True),
}
OPTIMIZERS = ["adamw", "muon"]


def _halves(folder: Path) -> dict[str, Case]:
    return {kind: Case(2 * HALF, {"optim": OptimConfig(kind=kind)}, folder=folder / kind) for kind in OPTIMIZERS}


def _at_half(folder: Path, copy: Path) -> Path:
    """A copy of the runs in a folder as they were half way."""
    for kind in OPTIMIZERS:
        shutil.copytree(folder / kind / f"step-{HALF:06d}", copy / kind / f"step-{HALF:06d}")
    return copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[list[float], torch.Tensor]]]:
    """Every run by the number of ranks; the resumed ones as "from so many to so many"."""
    at = tmp_path_factory.mktemp("runs")

    def ranks(world: int, cases: dict[str, Case]) -> dict[str, tuple[list[float], torch.Tensor]]:
        ended = on_ranks(world, at / "ranks", _run_all, cases)
        assert [one.stderr for one in ended] == [""] * world
        assert all(not one.result[name][0] for one in ended[1:] for name in cases), "figures are the main rank's"
        for name in cases:
            assert all(torch.equal(one.result[name][1], ended[0].result[name][1]) for one in ended), name
        return ended[0].result

    once = {"fsdp": Case(20), "fsdp, uneven": Case(4, SETTLING, uneven=True)}
    one = _run_all({**once, **_halves(at / "1")})
    resumed = {f"1 to 2, {kind}": case for kind, case in _halves(_at_half(at / "1", at / "1 to 2")).items()}
    two = ranks(2, {**ALIKE, **_halves(at / "2"), **resumed})
    return {
        "1": one,
        "2": two,
        "1 to 2": {kind: two[f"1 to 2, {kind}"] for kind in OPTIMIZERS},
        "2 to 1": _run_all(_halves(_at_half(at / "2", at / "2 to 1"))),
        "2 to 4": ranks(4, _halves(_at_half(at / "2", at / "2 to 4"))),
    }


@pytest.mark.parametrize("name", ALIKE)
def test_two_ranks_are_one_process(runs, name: str) -> None:
    """Sharded and copied, micro-batches on, and with targets and loops that differ between ranks."""
    losses, biases = runs["1"][name.replace("ddp", "fsdp")]
    assert len(losses) == ALIKE[name].steps
    assert runs["2"][name][0] == pytest.approx(losses, abs=CLOSE)
    torch.testing.assert_close(runs["2"][name][1], biases, atol=1e-6, rtol=0)
    assert biases.any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("change", ["2", "2 to 1", "2 to 4", "1 to 2"])
def test_a_checkpoint_goes_on_with_any_number_of_ranks(runs, change: str, kind: str) -> None:
    losses, biases = runs["1"][kind]
    following = losses if change == "2" else losses[HALF:]
    assert runs[change][kind][0] == pytest.approx(following, abs=CLOSE)
    torch.testing.assert_close(runs[change][kind][1], biases, atol=1e-6, rtol=0)


def test_weights_are_gathered_as_often_for_many_loops_as_for_few(tmp_path: Path) -> None:
    """Prelude and coda block on both ways, recurrent block and root once."""
    counts = on_ranks(2, tmp_path, _all_gathers, [1, 2, 8])[0].result
    assert counts == [6, 6, 6]


SMALL = "--batch-size 8 --model.dim 32 --longest 8 --sweep-lengths 8 --sweep-loops 1 2 --sweep-problems 8 --device cpu"


def _words(out: Path, more: str = "") -> list[str]:
    return ["train", "parity", "--out", str(out), *SMALL.split(), *more.split()]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return OpenMythos.from_pretrained(folder).state_dict()


def test_torchrun_leaves_what_one_process_leaves(tmp_path: Path) -> None:
    out, logs, one = tmp_path / "run", tmp_path / "logs", tmp_path / "one"
    # The recipe's noise as first state, and what it drops, are each rank's own.
    more = "--steps 6 --checkpoint-every 4 --sweep-every 3 --model.state-init input --model.dropout 0"
    command = [*["-m", "torch.distributed.run", "--nproc-per-node", "2", "--redirects", "3", "--log-dir"], str(logs)]
    command += ["--standalone", "-m", "open_mythos", *_words(out, more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FORCE_COLOR": "1"}  # as on a terminal: spinners turn
    subprocess.run([sys.executable, *command], env=environment, check=True, timeout=300)
    said = {f"{path.parent.name} {path.stem}": path.read_text() for path in logs.rglob("std*.log")}
    assert said.pop("0 stdout")
    assert len(said) == 3
    assert not any(said.values())
    assert main(_words(one, more)) == 0
    lines, expected = read_metrics(out), read_metrics(one)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [0, 1, 2, 3, 3, 4, 5, 6]
    for line, other in zip(lines, expected, strict=True):
        assert line.get("loss") == pytest.approx(other.get("loss"), abs=CLOSE)
        for row, other_row in zip(line.get("sweep", []), other.get("sweep", []), strict=True):
            assert row == pytest.approx(other_row, abs=1e-4)
    assert main(["export", str(out), "--out", str(tmp_path / "export")]) == 0
    for name, tensor in _weights(one).items():
        torch.testing.assert_close(_weights(out)[name], tensor, atol=1e-4, rtol=0, msg=name)
        assert torch.equal(_weights(tmp_path / "export")[name], _weights(out)[name]), name


def _main(words: list[str]) -> None:
    raise SystemExit(main(words))


def _told_once(ended: list[Finished]) -> str:
    """The only line of all ranks, which one of them ended with."""
    assert sorted(one.exit_code for one in ended)[-2:] == [0, 2]
    lines = "".join(one.stderr for one in ended).splitlines()
    assert len(lines) == 1, lines
    assert not any(one.stdout for one in ended)
    return lines[0]


def test_a_batch_that_ranks_cannot_share_equally_is_refused(tmp_path: Path) -> None:
    line = _told_once(on_ranks(3, tmp_path / "ranks", _main, _words(tmp_path / "run")))
    assert line.startswith("mythos: batch_size is 8; it must be a multiple of the number of ranks (3)")
    assert not (tmp_path / "run").exists()


def _meet_late(met: Path) -> bool:
    init = dist.init_process_group

    def slow(*args: Any, **kwargs: Any) -> None:
        init(*args, **kwargs)
        time.sleep(1)
        met.touch()

    if os.environ["RANK"] == "1":
        dist.init_process_group = slow
    with joined(torch.device("cpu")):
        return met.exists()


def test_no_rank_goes_on_before_all_have_met(tmp_path: Path) -> None:
    """One that failed at once left others in the middle of connecting, and PyTorch reported that as a crash."""
    assert [one.result for one in on_ranks(2, tmp_path / "ranks", _meet_late, tmp_path / "met")] == [True, True]


def test_what_is_wrong_on_the_main_rank_ends_all_and_is_told_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with locked(out):
        line = _told_once(on_ranks(2, tmp_path / "ranks", _main, _words(out)))
    assert "is in use by another run" in line
    assert main(_words(out, "--steps 1")) == 0
    line = _told_once(on_ranks(2, tmp_path / "ranks", _main, _words(out, "--steps 1 --seed 7")))
    assert "training.seed is 7" in line


def _out_of_memory_on(rank: int) -> None:
    with joined(torch.device("cpu")) as ranks:
        if ranks.rank == rank:
            raise MemoryError("not enough")
        ranks.wait()


def _fail_late_on(rank: int) -> None:
    with joined(torch.device("cpu")) as ranks:
        if ranks.rank == rank:
            time.sleep(1)
        raise ValueError("the same everywhere")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_late_says_nothing(tmp_path: Path, rank: int) -> None:
    """Where the first rank had gone by then, PyTorch reported that what it had kept was no longer to be had."""
    ended = on_ranks(2, tmp_path, _fail_late_on, rank)
    assert [one.exit_code for one in ended] == [int(one != rank) for one in range(2)]
    assert ended[rank].stderr == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_those_that_wait_for_it(tmp_path: Path, rank: int) -> None:
    ended = on_ranks(2, tmp_path, _out_of_memory_on, rank)
    assert [one.exit_code for one in ended] == [int(one == rank) for one in range(2)]
    assert ended[rank].stderr.endswith("MemoryError: not enough\n")
    assert ended[1 - rank].stderr == ""


class _Endless:
    """Parity, on which the loss is no number from step HALF on."""

    def __init__(self, model: OpenMythos) -> None:
        self._model, self._source = model, small_source()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def batch(self, step: int) -> Batch:
        if step == HALF:
            self._model.norm.register_forward_hook(lambda module, args, out: out * float("nan"))
        return self._source.batch(step)


def _stop_while_saving(folder: Path) -> None:
    write = FileSystemWriter.write_data

    def slow(*args: Any) -> Any:
        time.sleep(1)
        return write(*args)

    FileSystemWriter.write_data = slow  # type: ignore[method-assign]
    with joined(torch.device("cpu")) as ranks:
        model, config = small_model(), TrainerConfig(steps=2 * HALF, checkpoint_every=HALF)
        Trainer(model, _Endless(model), Fixed(loops=2), config, ranks=ranks, checkpoints=folder).run()


def test_a_loss_that_is_not_finite_is_told_once_and_loses_no_checkpoint(tmp_path: Path) -> None:
    """It ended the processes' connections while a checkpoint was still being written, which then never was."""
    ended = on_ranks(2, tmp_path / "ranks", _stop_while_saving, tmp_path / "checkpoints")
    assert sorted(one.exit_code for one in ended) == [0, 1]
    told = "".join(one.stderr for one in ended)
    assert told.count("NonFiniteLossError: ") == 1
    assert f"at step {HALF} " in told
    assert f"the last good checkpoint is of step {HALF}" in told
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{HALF:06d}"]
