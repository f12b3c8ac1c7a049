"""Nothing is lost: runs that are stopped, killed or damaged go on to the same losses, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch

from open_mythos.training.checkpoint import Checkpoints
from open_mythos.training.optim import OptimConfig
from open_mythos.training.ranks import Ranks
from open_mythos.training.records import JsonLines, read_metrics
from training.runs import small_model, small_source, trained

STEPS = 20


def test_a_run_in_two_parts_is_one_run(tmp_path: Path) -> None:
    """With Muon, dropout and noise as first state: optimizer state, weights and random numbers all come back."""
    kind = {"optim": OptimConfig(kind="muon"), "checkpoint_every": 4}
    model = {"dropout": 0.2, "state_init": "noise"}
    whole, told = trained(model=small_model(**model), steps=9, **kind)
    trained(model=small_model(**model), steps=9, checkpoints=tmp_path, **kind)
    (tmp_path / "step-000009").rename(tmp_path / "gone")
    parts, told_rest = trained(model=small_model(**model), steps=9, checkpoints=tmp_path, **kind)
    assert told_rest.messages == ["Resuming after step 8."]
    assert told_rest.losses == told.losses[8:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], tensor), name


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    trained(steps=3, checkpoints=tmp_path)
    _, told = trained(steps=3, checkpoints=tmp_path)
    assert told.records == []


def test_only_so_many_checkpoints_stay(tmp_path: Path) -> None:
    trained(steps=9, checkpoints=tmp_path, checkpoint_every=2, keep_checkpoints=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006", "step-000008", "step-000009"]


def _damage_payload(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _damage_payload,
        lambda path: next(path.glob("*.distcp")).unlink(),
        lambda path: (path / "meta.json").unlink(),
        lambda path: (path / "meta.json").write_text("{"),
        lambda path: (path / ".metadata").write_bytes(b""),
    ],
    ids=["one bit", "file gone", "no meta", "meta cut", "index empty"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path, damage) -> None:
    _, told = trained(steps=6)
    trained(steps=6, checkpoints=tmp_path, checkpoint_every=3)
    damage(tmp_path / "step-000006")
    _, told_again = trained(steps=6, checkpoints=tmp_path)
    assert str(tmp_path / "step-000006") in told_again.messages[0]
    assert told_again.messages[1] == "Resuming after step 3."
    assert told_again.losses == told.losses[3:]
    assert (tmp_path / "damaged-000006").is_dir()


def test_with_every_checkpoint_damaged_nothing_is_started_over_in_silence(tmp_path: Path) -> None:
    trained(steps=6, checkpoints=tmp_path, checkpoint_every=3)
    for path in tmp_path.glob("step-*"):
        _damage_payload(path)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged: .*step-000006.*step-000003"):
        trained(steps=6, checkpoints=tmp_path)


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    trainer, _ = trained(steps=6, checkpoints=tmp_path, checkpoint_every=3)
    _damage_payload(tmp_path / "step-000006")
    (tmp_path / "step-000009.partial").mkdir()
    reader = Checkpoints(tmp_path, Ranks(), read_only=True)
    progress, damaged = reader.load_latest(trainer.model, trainer.optimizers)
    assert (progress.step, len(damaged)) == (3, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000006", "step-000009.partial"]


def test_a_full_disk_stops_the_run_with_the_last_good_checkpoint_kept(tmp_path: Path, monkeypatch) -> None:
    trained(steps=3, checkpoints=tmp_path, checkpoint_every=3)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("open_mythos.training.checkpoint.FileSystemWriter.write_data", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left on device.*last good one is of step 3"):
        trained(steps=6, checkpoints=tmp_path, checkpoint_every=6)
    monkeypatch.undo()
    _, told = trained(steps=6)
    _, told_again = trained(steps=6, checkpoints=tmp_path)
    assert told_again.losses == told.losses[3:]
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_saved_in_the_background_is_the_state_of_its_step(tmp_path: Path) -> None:
    """The weights go on changing while they are being written."""
    trainer, _ = trained(steps=2)
    checkpoints = Checkpoints(tmp_path, Ranks())
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    from open_mythos.training.checkpoint import Progress

    checkpoints.save(trainer.model, trainer.optimizers, Progress(2, {"any": [1, "thing"]}))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    checkpoints.finish()
    progress, _ = checkpoints.load_latest(trainer.model, trainer.optimizers)
    assert progress == Progress(2, {"any": [1, "thing"]})
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_log_of_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    def run(steps: int) -> None:
        trainer, _ = trained(steps=1)
        log = JsonLines(tmp_path, trainer.first_step + first)
        _, told = trained(steps=steps)
        for record in told.records[first:]:
            log.on_step(record)
        log.close()

    first = 0
    run(5)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 0.1')  # the process was killed while it wrote
    first = 3
    run(6)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(6))


DRIVER = """
import os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from open_mythos.training.records import JsonLines
from open_mythos.training.trainer import Trainer, TrainerConfig
from open_mythos.training.depth import Uniform
from training.runs import small_model, small_source

def child(folder, slow_save):
    if slow_save:
        write = FileSystemWriter.write_data
        def slow(self, *args):
            (folder / "saving").touch()
            time.sleep(0.3)
            return write(self, *args)
        FileSystemWriter.write_data = slow
    config = TrainerConfig(steps=STEPS, checkpoint_every=5)
    depth = Uniform(least=1, most=4, grad_loops=2)
    trainer = Trainer(small_model(dropout=0.1), small_source(), depth, config, checkpoints=folder / "checkpoints")
    log = JsonLines(folder, trainer.first_step)
    (folder / "running").touch()
    trainer.run([log])
    log.close()

for line in sys.stdin:  # fork: PyTorch is imported once for all the runs that are to be killed
    folder, slow_save = line.split()
    pid = os.fork()
    if not pid:
        child(Path(folder), slow_save == "slow")
        os._exit(0)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(status, flush=True)
""".replace("STEPS", str(STEPS))


def _driver() -> subprocess.Popen[str]:
    tests = Path(__file__).parent.parent
    paths = os.pathsep.join([str(tests), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def _lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def _run(driver: subprocess.Popen[str], folder: Path, moment: Callable[[], bool] | None, *, slow: bool = False) -> bool:
    """One run in the folder, killed as soon as `moment` is true. Returns whether it came to its end."""
    for name in ("running", "saving"):
        (folder / name).unlink(missing_ok=True)
    driver.stdin.write(f"{folder} {'slow' if slow else 'fast'}\n")
    driver.stdin.flush()
    pid = int(driver.stdout.readline())
    if moment is not None:
        _wait_until((folder / "running").exists)
        _wait_until(lambda: moment() or _lines(folder) == STEPS)
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(pid, signal.SIGKILL)
    return int(driver.stdout.readline()) == 0


@pytest.mark.slow
def test_runs_killed_at_twenty_random_moments_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """Three of the kills are inside a save. Losses are compared bit for bit, through JSON, which keeps every bit."""
    random = Random(0)
    with _driver() as driver:
        (tmp_path / "calm").mkdir()
        assert _run(driver, tmp_path / "calm", None)
        expected = [line["loss"] for line in read_metrics(tmp_path / "calm")]
        assert len(expected) == STEPS
        kills = saves = attempt = 0
        while kills < 20:
            folder = tmp_path / f"run{attempt}"
            folder.mkdir()
            ended = False
            while not ended:
                in_a_save = kills in (3, 9, 15)
                first = _lines(folder) // 5 * 5  # a resumed run goes back to its checkpoint, every 5 steps
                target, delay = min(random.randint(first, first + 12), STEPS), random.uniform(0, 0.02)
                if kills >= 20:
                    moment = None
                elif in_a_save:
                    moment = (folder / "saving").exists
                else:
                    moment = _delayed(lambda folder=folder, target=target: _lines(folder) >= target, delay)
                ended = _run(driver, folder, moment, slow=in_a_save)
                kills += not ended
                saves += in_a_save and not ended
            assert [line["loss"] for line in read_metrics(folder)] == expected
            attempt += 1
        driver.stdin.close()
    assert kills == 20
    assert saves == 3


def _delayed(moment: Callable[[], bool], delay: float) -> Callable[[], bool]:
    def later() -> bool:
        if moment():
            time.sleep(delay)
            return True
        return False

    return later


def test_the_state_of_the_data_comes_back(tmp_path: Path) -> None:
    """A source that counts its batches, as a stream would."""

    class Counting:
        vocab_size, bytes_per_token = 3, None

        def __init__(self) -> None:
            self.next = 0

        def batch(self, step: int):
            assert step == self.next
            self.next += 1
            return small_source().batch(step)

        def position(self, step: int) -> str:
            return ""

        def state_dict(self) -> dict:
            return {"next": self.next}

        def load_state_dict(self, state: dict) -> None:
            self.next = state["next"]

    trained(source=Counting(), steps=7, checkpoints=tmp_path, checkpoint_every=3)
    (tmp_path / "step-000007").rename(tmp_path / "gone")
    _, told = trained(source=Counting(), steps=7, checkpoints=tmp_path)
    assert [record.step for record in told.records] == [6]
    meta = json.loads((tmp_path / "step-000006" / "meta.json").read_text())
    assert meta["source"] == {"next": 6}


def test_a_stream_goes_on_where_the_run_was(tmp_path: Path) -> None:
    """The real thing: documents that are streamed, shuffled, tokenised and packed, through a run in two parts."""
    datasets = pytest.importorskip("datasets")
    from open_mythos.data.streaming import StreamedRows
    from open_mythos.data.tokenizer_spec import byte_tokenizer

    texts = [{"text": f"Document {number} says {number * number}. " * (1 + number % 3)} for number in range(40)]

    def source() -> StreamedRows:
        stream = datasets.Dataset.from_list(texts).to_iterable_dataset()
        return StreamedRows(stream, byte_tokenizer(), seq_len=12, batch_size=4, shuffle_buffer=7)

    def run(checkpoints: Path | None) -> list[float]:
        model = small_model(vocab_size=257)
        return trained(model=model, source=source(), steps=9, checkpoints=checkpoints, checkpoint_every=4)[1].losses

    whole = run(None)
    assert run(tmp_path) == whole
    (tmp_path / "step-000009").rename(tmp_path / "gone")
    assert run(tmp_path) == whole[8:]


def test_a_sweep_that_fails_costs_no_step(tmp_path: Path) -> None:
    def broken(model: object, final: bool) -> list:
        raise RuntimeError("no such data")

    with pytest.raises(RuntimeError, match="no such data"):
        trained(steps=4, checkpoints=tmp_path, sweep=broken)
    assert trained(steps=4, checkpoints=tmp_path)[1].records == []
