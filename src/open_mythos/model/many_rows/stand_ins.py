"""Which layers and loops compiled code computes in a pass over whole sequences.

Main entry: `ManyRows`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from open_mythos.model.block import Block
from open_mythos.model.cache import PassStore
from open_mythos.model.context import ForwardContext, StandIn
from open_mythos.model.derivatives import elementary_only
from open_mythos.model.few_rows.known import collect, compiles, has_global_hooks
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock

if TYPE_CHECKING:
    from open_mythos.model.arithmetic.compiled import Threads


class ManyRows:
    """For one pass: the stand-ins, found when first asked for; weights may change between passes only."""

    def __init__(self) -> None:
        self._found: dict[tuple[nn.Module, ...], StandIn | None] = {}
        self._threads: Threads | None = None

    def layer(self, block: Block, x: Tensor, context: ForwardContext) -> StandIn | None:
        """What computes a block's output for x, its entries and its experts' load; None if the block has to.

        It has to where it is not known fully: not float32, not on a CPU, hooked or patched inside; under autocast;
        where it is traced or another than a first reverse derivative is wanted; where there is a cache; and where x
        does not fit, to say so.
        """
        if not _serves([block], [x], context):
            return None
        if (block,) not in self._found:
            from open_mythos.model.many_rows.function import WholeStage

            threads = self._threads_for(_is_known(block))
            self._found[block,] = None if threads is None else WholeStage(block, [block], threads)
        return self._found[block,]

    def stage(self, blocks: nn.ModuleList, norm: RMSNorm, x: Tensor, context: ForwardContext) -> StandIn | None:
        """What computes blocks and a norm after them; None as for a layer, or if anybody looks at one of them."""
        if not len(blocks) or not _serves(blocks, [x], context):
            return None
        if (blocks, norm) not in self._found:
            from open_mythos.model.many_rows.function import WholeStage

            known = type(norm) is RMSNorm and norm.weight.shape == x.shape[-1:]
            threads = self._threads_for(known and collect(blocks, []) and collect(norm, []))
            self._found[blocks, norm] = None if threads is None else WholeStage(blocks, blocks, threads, norm)
        return self._found[blocks, norm]

    def loop(self, recurrent: RecurrentBlock, h: Tensor, e: Tensor, context: ForwardContext) -> StandIn | None:
        """What computes a loop, its entries, its experts' loads and who halts by what; None as for a layer."""
        if not len(recurrent.blocks) or not _serves(recurrent.blocks, [h, e], context):
            return None
        if (recurrent,) not in self._found:
            from open_mythos.model.many_rows.function import WholeLoop

            threads = self._threads_for(_is_known(recurrent) and _has_sizes(recurrent, h.shape[-1]))
            self._found[recurrent,] = None if threads is None else WholeLoop(recurrent, threads)
        return self._found[recurrent,]

    def _threads_for(self, known: bool) -> Threads | None:
        """What a stand-in runs on for something that is `known` or not; None where it must not have one."""
        if not known or has_global_hooks() or not compiles():
            return None
        from open_mythos.model.arithmetic.compiled import Threads

        if self._threads is None:
            self._threads = Threads()
        return self._threads if self._threads.use("many_rows") else None


def _is_known(module: nn.Module) -> bool:
    """Of one that asks for its stand-in itself, and so may have hooks."""
    known: list[nn.Module] = []
    collect(module, known)
    return module in known


def _has_sizes(recurrent: RecurrentBlock, dim: int) -> bool:
    """Whether what stands around the layers has the sizes that it is made with: others PyTorch may broadcast."""
    injection, embedding, adapter = recurrent.injection, recurrent.loop_embedding, recurrent.adapter
    expected: list[tuple[Tensor | None, tuple[int, ...]]]
    expected = [(injection.log_a, (dim,)), (injection.log_dt, (dim,)), (injection.B, (dim,))]
    if embedding is not None:
        expected.append((embedding.weight, (len(embedding.decays), dim)))
    if adapter is not None:
        rank = len(adapter.down.weight)
        expected += [(adapter.down.weight, (rank, dim)), (adapter.up.weight, (dim, rank))]
        expected += [(weight, (rank,)) for weight in (adapter.settled, adapter.transient, adapter.decay_logit)]
    if recurrent.act is not None:
        expected += [(recurrent.act.halt.weight, (1, dim)), (recurrent.act.halt.bias, (1,))]
    return all(weight is not None and weight.shape == shape for weight, shape in expected)


def _serves(blocks: Iterable[nn.Module], streams: Sequence[Tensor], context: ForwardContext) -> bool:
    """Whether compiled code may compute what these blocks would make of such streams, if it knows them."""
    if torch.compiler.is_compiling() or elementary_only() or forward_ad._current_level >= 0:
        return False
    if type(context) is not ForwardContext or type(context.store) is not PassStore or torch.is_autocast_enabled("cpu"):
        return False
    batch = streams[0].shape[:1]
    for block in blocks:
        if type(block) is not Block:
            return False
        expected = (*batch, context.n_new, block.attn_norm.weight.shape[0])
        if not all(x.shape == expected and x.numel() for x in streams):
            return False
    return all(x.dtype == torch.float32 and x.is_cpu for x in streams)
