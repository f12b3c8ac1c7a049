"""Which layers compiled code computes in a pass over whole sequences.

Main entry: `ManyRows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from open_mythos.model.block import Block
from open_mythos.model.cache import PassStore
from open_mythos.model.context import ForwardContext, StandIn
from open_mythos.model.derivatives import elementary_only
from open_mythos.model.few_rows.known import collect, compiles, has_global_hooks

if TYPE_CHECKING:
    from open_mythos.model.arithmetic.compiled import Threads


class ManyRows:
    """For one pass: the layers' stand-ins, found when first asked for; weights may change between passes only."""

    def __init__(self) -> None:
        self._found: dict[nn.Module, StandIn | None] = {}
        self._threads: Threads | None = None

    def layer(self, block: Block, x: Tensor, context: ForwardContext) -> StandIn | None:
        """What computes a block's output for x, its entries and its experts' load; None if the block has to.

        It has to where it is not known fully: not float32, not on a CPU, hooked or patched inside; where it drops out;
        under autocast; where it is traced or another than a first reverse derivative is wanted; where there is a cache;
        and where x does not fit, to say so.
        """
        if torch.compiler.is_compiling() or elementary_only() or forward_ad._current_level >= 0:
            return None
        if x.dtype != torch.float32 or not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return None
        expected = (context.n_new, block.attn_norm.weight.shape[0])
        if x.dim() != 3 or x.shape[1:] != expected or not x.numel() or _drops_out(block):
            return None
        if type(context) is not ForwardContext or type(context.store) is not PassStore:
            return None
        if block not in self._found:
            self._found[block] = self._find(block)
        return self._found[block]

    def _find(self, block: Block) -> StandIn | None:
        known: list[nn.Module] = []
        collect(block, known)
        if block not in known or has_global_hooks() or not compiles():
            return None
        from open_mythos.model.arithmetic.compiled import Threads
        from open_mythos.model.many_rows.function import WholeLayer

        if self._threads is None:
            self._threads = Threads()
        return WholeLayer(block, self._threads) if self._threads.use() else None


def _drops_out(block: Block) -> bool:
    between, within = block.dropout, block.attn
    return (between.training and between.p > 0) or (within.training and within.config.dropout > 0)
