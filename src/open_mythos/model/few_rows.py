"""Which modules are computed by something else in a pass over few positions, and by what.

Main entry: `FewRows`. On a CPU, such a pass is bound by how many operations it makes, not by their size.
"""

from __future__ import annotations

import torch
from torch import nn

from open_mythos.model.attention import GQAttention
from open_mythos.model.block import Block
from open_mythos.model.context import StandIn
from open_mythos.model.depth_adapter import DepthAdapter, LoopEmbedding
from open_mythos.model.experts import MoEFFN
from open_mythos.model.feed_forward import SwiGLU
from open_mythos.model.halting import ACTHalting
from open_mythos.model.injection import LTIInjection
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.rows import Scratch

_KNOWN = {
    *(RecurrentBlock, LTIInjection, LoopEmbedding, DepthAdapter, ACTHalting),
    *(Block, GQAttention, MLAttention, MoEFFN, SwiGLU, RMSNorm),
    *(nn.Linear, nn.Dropout, nn.ModuleList),
}

# What asks for its stand-in where it is called, by when its own hooks have run.
_ASKS_ITSELF = (Block, RecurrentBlock)

# Above so many positions, arithmetic outweighs the number of operations (docs/experiments.md).
_MOST = 64


class FewRows:
    """What stands in for a model's parts in passes over few positions."""

    def __init__(self, model: nn.Module) -> None:
        """Made for the model's modules and weights as they are now; weights may change in place."""
        plain: list[nn.Module] = []
        _collect(model, plain)
        self._layers = _stand_ins(plain) if plain else {}

    def layers(self, n_positions: int) -> dict[nn.Module, StandIn]:
        """By module, for a pass over so many positions: nothing if these are not few.

        Nor for modules that are not known fully: not float32, not on a CPU, wrapped, replaced, hooked or patched.
        """
        return self._layers if n_positions <= _MOST else {}


def _stand_ins(modules: list[nn.Module]) -> dict[nn.Module, StandIn]:
    from open_mythos.model import few_rows_block, few_rows_loop  # imports Numba: half a second

    scratch = Scratch(_MOST)
    blocks: dict[nn.Module, few_rows_block.FewRowsBlock] = {}
    blocks |= {part: few_rows_block.FewRowsBlock(part, scratch) for part in modules if isinstance(part, Block)}
    layers: dict[nn.Module, StandIn] = {**blocks}
    for module in modules:
        match module:
            case RecurrentBlock():
                layers[module] = few_rows_loop.FewRowsLoop(module, [blocks[block] for block in module.blocks])
            case RMSNorm():
                layers[module] = few_rows_loop.FewRowsNorm(module)
            case ACTHalting():
                layers[module] = few_rows_loop.FewRowsHalting(module)
    return layers


def _collect(module: nn.Module, plain: list[nn.Module]) -> bool:
    """Add to `plain` the module and its parts where all in them is known; whether the module is, and has no hooks."""
    parts = [_collect(part, plain) for part in module.children()]
    known = type(module) in _KNOWN and "forward" not in vars(module) and all(parts)
    known = known and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in module.parameters(recurse=False))
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    if known and (not hooked or isinstance(module, _ASKS_ITSELF)):
        plain.append(module)
    return known and not hooked
