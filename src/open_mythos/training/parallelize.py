"""From a model on one device to a module that trains on all ranks.

Main entry: `parallelize`. Order: compile, then shard or replicate the whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Literal

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from open_mythos.model.block import Block
from open_mythos.model.mythos import OpenMythos
from open_mythos.training.objective import Objective
from open_mythos.training.ranks import Ranks

Parallel = Literal["auto", "ddp", "fsdp"]


def parallelize(objective: Objective, ranks: Ranks, parallel: Parallel, *, compiled: bool = False) -> nn.Module:
    """The module to call instead of `objective`; itself on a single rank.

    Sharded (FSDP2, Zhao et al. 2023, arXiv 2304.11277), the recurrent block is one unit that stays whole from its first
    loop to the end of its backward: one gathering of its weights per pass, however many loops.
    """
    model = objective.model
    if compiled:
        _compile(model)
    if ranks.world == 1:
        return objective
    if parallel == "ddp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a new name, which PyTorch 2.11 does not know, for the flag
            return DistributedDataParallel(objective, broadcast_buffers=False)
    # Said, because PyTorch would take a GPU that is there for the one that is meant.
    mesh = init_device_mesh(model.embed.weight.device.type, (ranks.world,))
    for block in (*model.prelude, *model.coda):
        fully_shard(block, mesh=mesh)
    fully_shard(model.recurrent, mesh=mesh, reshard_after_forward=False)
    fully_shard(objective, mesh=mesh, reshard_after_forward=False)
    return objective


def _compile(model: OpenMythos) -> None:
    """Compile the feed-forwards of the looped layers, where the elementwise work is.

    A whole layer asks a cache and a table of loads, and would be compiled anew for every loop.
    """
    config = model.config
    if config.n_experts > 2 * config.n_experts_per_tok and model.embed.weight.device.type == "cpu":
        raise ValueError(
            f"compiled is True and n_experts {config.n_experts}; PyTorch cannot compile grouped products in float32: "
            f"on a CPU, n_experts must be at most twice n_experts_per_tok ({config.n_experts_per_tok})"
        )
    for block in model.recurrent.blocks:
        assert isinstance(block, Block)
        block.ffn.compile()


def without_sync(module: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, backward passes add to this rank's gradients and send nothing."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()  # type: ignore[no-any-return]
    if isinstance(module, FSDPModule):
        return _unsynced(module)
    return nullcontext()


@contextmanager
def _unsynced(module: FSDPModule) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """While it lasts, every sharded parameter is there whole, for what does not go through `forward`."""
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    with ExitStack() as stack:
        for unit in units:
            unit.unshard()
            stack.callback(unit.reshard)
        yield
