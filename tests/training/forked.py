"""Groups of ranks for tests, forked from a server that has imported PyTorch once.

Main entries: `on_ranks`, `Finished`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any

import torch

_SERVER = multiprocessing.get_context("forkserver")
_LIMIT = 120


@dataclass(frozen=True)
class Finished:
    """How one rank ended."""

    result: Any
    """What the job returned; None if it raised."""
    exit_code: int
    stdout: str
    stderr: str


def on_ranks(world: int, folder: Path, job: Callable[..., Any], *args: Any) -> list[Finished]:
    """Call `job(*args)` in `world` processes, as `torchrun` would start them; a function that a module names.

    A group that takes longer than any of these jobs could is ended, with `TimeoutError`.
    """
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    _SERVER.set_forkserver_preload([job.__module__, "open_mythos.cli.train"])
    port = _free_port()
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [
        _SERVER.Process(target=_rank, args=(job, args, rank, world, port, folder), daemon=True) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + _LIMIT
    for process in ranks:
        process.join(max(0, deadline - time.monotonic()))
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
    if late:
        raise TimeoutError(f"{len(late)} of {world} ranks did not end; see {folder}")
    return [_finished(folder, rank, process.exitcode) for rank, process in enumerate(ranks)]


def _free_port() -> int:
    """One below those that the system gives to whoever asks for any: until it is used, nobody is given it."""
    while True:
        port = SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _rank(job: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, port: int, folder: Path) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    result = job(*args)
    torch.save(result, folder / f"result-{rank}")


def _finished(folder: Path, rank: int, exit_code: int) -> Finished:
    path = folder / f"result-{rank}"
    result = torch.load(path, weights_only=False) if path.exists() else None
    path.unlink(missing_ok=True)
    return Finished(result, exit_code, *((folder / f"{name}-{rank}").read_text() for name in ("stdout", "stderr")))
