"""Which modules are computed by something else in a pass over few positions, and by what.

Main entry: `FewRows`. On a CPU, such a pass is bound by how many operations it makes, not by their size.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

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
from open_mythos.model.rows import as_array

if TYPE_CHECKING:
    from open_mythos.model.few_rows.compiled import Threads
    from open_mythos.model.few_rows.layers import Layer
    from open_mythos.model.few_rows.token import FewRowsToken
    from open_mythos.model.mythos import OpenMythos

_KNOWN = {
    *(RecurrentBlock, LTIInjection, LoopEmbedding, DepthAdapter, ACTHalting),
    *(Block, GQAttention, MLAttention, MoEFFN, SwiGLU, RMSNorm),
    *(nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList),
}

# What asks for its stand-in where it computes, so that its own hooks run as ever.
_ASKS_ITSELF = (Block, RecurrentBlock)
_STOOD_IN_FOR = (*_ASKS_ITSELF, RMSNorm, ACTHalting)
_HEADS = (nn.Linear, nn.Embedding)

# Above so many positions arithmetic outweighs the number of operations; above so many keys, or pairs of a position and
# a key that it sees where positions are few, PyTorch's attention is faster.
_MOST, _MOST_KEYS, _MOST_PAIRS = 512, 128, 4096


class FewRows:
    """What stands in for a model's parts in passes over few positions."""

    def __init__(self, model: nn.Module) -> None:
        """Made for the model's modules, hooks and weights as they are now; weights may change in place."""
        self._model = model
        plain: list[nn.Module] = []
        parts = [part for part in model._modules.values() if part is not None]
        all_known = [_collect(part, plain) for part in parts]
        self._whole = all(all_known) and not _is_patched(model)  # and nothing looks at what goes on in it
        plain += [part for part, known in zip(parts, all_known, strict=True) if known and isinstance(part, _HEADS)]
        self._threads: Threads | None = None
        self._layers: dict[nn.Module, Layer] = {}
        self._found: dict[nn.Module, StandIn] = {}
        if plain and not _has_global_hooks() and _compiles():
            from open_mythos.model.few_rows.compiled import Threads

            self._threads = Threads()
            self._layers = _layers(plain)
            self._found = _stand_ins(plain, self._layers, self._threads)

    def stand_ins(self, n_positions: int, longest: int) -> dict[nn.Module, StandIn]:
        """By module, for a pass over so many positions that see at most `longest` keys: nothing if these are not few.

        Nor for modules that are not known fully: not float32, not on a CPU, wrapped, replaced, hooked or patched; nor
        under autocast, or where a process has left its threads behind in forking. Otherwise the calling thread's
        number of Numba's threads becomes that of PyTorch's.
        """
        if self._threads is None or n_positions > _MOST or longest > max(_MOST_KEYS, _MOST_PAIRS // n_positions):
            return {}
        if torch.is_autocast_enabled("cpu") or not self._threads.use():
            return {}
        return self._found

    def token(self) -> FewRowsToken | None:
        """A pass over one position of the model, an `OpenMythos`; None if not all of it is known."""
        model: OpenMythos = self._model  # type: ignore[assignment]
        threads = self._threads
        if threads is None or not self._whole or model.config.halting == "settled":
            return None
        act, head = model.recurrent.act, model.head or model.embed
        parts = (*model.prelude, model.prelude_norm, model.recurrent, *model.coda, model.norm, head)
        if not all(part in self._found for part in parts):
            return None
        from open_mythos.model.few_rows.block import FewRowsBlocks
        from open_mythos.model.few_rows.token import FewRowsToken

        stages = [[self._layers[block] for block in blocks] for blocks in (model.prelude, model.coda)]
        if not all(_is_uniform(stage) for stage in stages):
            return None
        prelude, coda = (FewRowsBlocks(stage, threads) if stage else None for stage in stages)
        found: dict[nn.Module, Any] = self._found
        return FewRowsToken(
            config=model.config,
            embedding=as_array(model.embed.weight),
            prelude=prelude,
            prelude_norm=found[model.prelude_norm],
            loop=found[model.recurrent],
            halting=None if act is None else found[act],
            coda=coda,
            norm=found[model.norm],
            head=found[head],
        )


def _layers(modules: list[nn.Module]) -> dict[nn.Module, Layer]:
    from open_mythos.model.few_rows.layers import Layer

    return {module: Layer(module) for module in modules if isinstance(module, Block)}


def _is_uniform(stage: list[Layer]) -> bool:
    """Whether all layers of a stage see the same keys, as they do unless somebody changed them."""
    return len({layer.window for layer in stage}) <= 1


def _stand_ins(modules: list[nn.Module], layers: dict[nn.Module, Layer], threads: Threads) -> dict[nn.Module, StandIn]:
    from open_mythos.model.few_rows import loop as few_rows_loop
    from open_mythos.model.few_rows.block import FewRowsBlocks

    found: dict[nn.Module, StandIn] = {block: FewRowsBlocks([layer], threads) for block, layer in layers.items()}
    for module in modules:
        match module:
            case RecurrentBlock():
                stage = [layers[block] for block in module.blocks]
                if _is_uniform(stage):
                    found[module] = few_rows_loop.FewRowsLoop(module, FewRowsBlocks(stage, threads))
            case RMSNorm():
                found[module] = few_rows_loop.FewRowsNorm(module)
            case ACTHalting():
                found[module] = few_rows_loop.FewRowsHalting(module)
            case nn.Linear() | nn.Embedding():
                found[module] = few_rows_loop.FewRowsHead(module, threads)
    return found


def _collect(module: nn.Module, plain: list[nn.Module]) -> bool:
    """Add to `plain` the module and its parts where all in them is known; whether the module is, and has no hooks."""
    parts = [_collect(part, plain) for part in module._modules.values() if part is not None]
    known = all(parts) and _is_known(module)
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    if known and isinstance(module, _STOOD_IN_FOR) and (not hooked or isinstance(module, _ASKS_ITSELF)):
        plain.append(module)
    return known and not hooked


def _is_known(module: nn.Module) -> bool:
    """Whether the module, leaving its parts aside, is what its class says, and its weights are plain arrays."""
    if type(module) not in _KNOWN or _is_patched(module) or module._compiled_call_impl is not None:
        return False
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return False
    if type(module) is not ACTHalting:
        for part in module._modules.values():
            if part is not None and part._parameters.get("bias") is not None:
                return False
    if isinstance(module, MoEFFN) and not _is_plain(module.router_bias, Tensor):
        return False
    return all(_is_plain(weight, nn.Parameter) for weight in module._parameters.values() if weight is not None)


def _is_plain(weight: Tensor, kind: type[Tensor]) -> bool:
    on_cpu = weight.is_cpu and weight.dtype == torch.float32
    return on_cpu and type(weight) is kind and weight.is_contiguous()


def _is_patched(module: nn.Module) -> bool:
    """Whether the module has methods of its own in place of its class's."""
    return not _methods(type(module)).isdisjoint(vars(module))  # type: ignore[arg-type]


@cache
def _methods(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))


def _has_global_hooks() -> bool:
    hooks = nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def _compiles() -> bool:
    """Whether Numba, which this imports, compiles: in half a second."""
    from numba import config

    return not config.DISABLE_JIT  # type: ignore[attr-defined]
