"""The processes of one run: which one this is, and what they tell each other.

Main entries: `Ranks`, `joined`. Without `torchrun` there is one rank, and nothing is sent. Over gloo, a rank that waits
for one that has failed learns of it; over NCCL it waits until the launcher ends it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

_LEAVE_TOGETHER = 5.0
"""Seconds that the first rank, which may keep what ranks tell each other of their end, waits for theirs: its own error
comes so much later where another was killed, or waits for ever."""


class FailedElsewhere(SystemExit):
    """Another rank has failed, and says why; left uncaught, this process ends without a word.

    With exit code 0, so that the launcher takes neither this rank for the culprit nor its end for a reason to end the
    one that is about to speak.
    """


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, batch_size: int) -> slice:
        """The sequences of a batch that are this rank's; `ValueError` where ranks would have unequal shares."""
        if batch_size % self.world:
            raise ValueError(
                f"batch_size is {batch_size}; it must be a multiple of the number of ranks ({self.world}), which share "
                "it equally"
            )
        each = batch_size // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            dist.barrier()

    def main_decides(self, decide: Callable[[], T]) -> T:
        """What `decide` returns on the main rank, the only one that calls it, everywhere."""
        box: list[Any] = [decide() if self.is_main else None]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks that `torchrun` started, able to talk while the context lasts; otherwise a single one.

    Of an error that ends several ranks, or ends one and then those that wait for it, the first rank's is raised there;
    the others raise `FailedElsewhere`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    store, rank, world = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    ranks = Ranks(rank, world)
    try:
        # One that left before the others had met all would look to them like a crash, which PyTorch reports by itself.
        dist.all_reduce(torch.zeros(1))
        yield ranks
    except BaseException as error:
        if _is_first_to_fail(store):
            raise
        raise FailedElsewhere(0) from error
    finally:
        dist.destroy_process_group()
        _leave(store, ranks)


def _is_first_to_fail(store: Store) -> bool:
    try:
        return store.add("open_mythos/failed", 1) == 1
    except RuntimeError:  # the process that keeps the store has gone, so it failed before
        return False


def _leave(store: Store, ranks: Ranks) -> None:
    """Let the rank go, the first last: it may keep the store, and PyTorch reports whoever asks one that is gone."""
    end = time.monotonic() + _LEAVE_TOGETHER
    with suppress(RuntimeError):
        gone = store.add("open_mythos/gone", 1)
        while ranks.is_main and gone < ranks.world and time.monotonic() < end:
            time.sleep(0.01)
            gone = store.add("open_mythos/gone", 0)
