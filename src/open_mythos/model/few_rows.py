"""Which modules are computed by something else in a pass over few positions, and by what.

Main entry: `FewRows`. On a CPU, such a pass is bound by how many operations it makes, not by their size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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

# What asks for its stand-in where it computes, so that its own hooks run as ever.
_ASKS_ITSELF = (Block, RecurrentBlock)
_STOOD_IN_FOR = (*_ASKS_ITSELF, RMSNorm, ACTHalting)

# Above so many positions, or pairs of a position and a key that it sees, arithmetic outweighs the number of operations.
_MOST, _MOST_PAIRS = 64, 4096


class FewRows:
    """What stands in for a model's parts in passes over few positions."""

    def __init__(self, model: nn.Module) -> None:
        """Made for the model's modules and weights as they are now; weights may change in place."""
        plain: list[nn.Module] = []
        _collect(model, plain)
        self._found = _stand_ins(plain) if plain else {}

    def stand_ins(self, n_positions: int, longest: int) -> dict[nn.Module, StandIn]:
        """By module, for a pass over so many positions that see at most `longest` keys: nothing if these are not few.

        Nor for modules that are not known fully: not float32, not on a CPU, wrapped, replaced, hooked or patched.
        """
        return self._found if n_positions <= _MOST and n_positions * longest <= _MOST_PAIRS else {}


def _stand_ins(modules: list[nn.Module]) -> dict[nn.Module, StandIn]:
    from open_mythos.model import few_rows_block, few_rows_loop  # imports Numba: half a second

    scratch = Scratch(_MOST)
    blocks: dict[nn.Module, few_rows_block.FewRowsBlock] = {
        module: few_rows_block.FewRowsBlock(module, scratch) for module in modules if isinstance(module, Block)
    }
    found: dict[nn.Module, StandIn] = {**blocks}
    for module in modules:
        match module:
            case RecurrentBlock():
                found[module] = few_rows_loop.FewRowsLoop(module, [blocks[block] for block in module.blocks])
            case RMSNorm():
                found[module] = few_rows_loop.FewRowsNorm(module)
            case ACTHalting():
                found[module] = few_rows_loop.FewRowsHalting(module)
    return found


def _collect(module: nn.Module, plain: list[nn.Module]) -> bool:
    """Add to `plain` the module and its parts where all in them is known; whether the module is, and has no hooks."""
    parts = [_collect(part, plain) for part in module.children()]
    known = all(parts) and _is_known(module)
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    if known and isinstance(module, _STOOD_IN_FOR) and (not hooked or isinstance(module, _ASKS_ITSELF)):
        plain.append(module)
    return known and not hooked


def _is_known(module: nn.Module) -> bool:
    """Whether the module, leaving its parts aside, is what its class says."""
    if type(module) not in _KNOWN or "forward" in vars(module) or module._compiled_call_impl is not None:
        return False
    if not isinstance(module, ACTHalting) and any(
        getattr(part, "bias", None) is not None for part in module.children()
    ):
        return False
    own = list(module.parameters(recurse=False))
    return all(type(p.data) is Tensor and p.dtype == torch.float32 and p.device.type == "cpu" for p in own)
