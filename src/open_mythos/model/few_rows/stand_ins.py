"""Which modules are computed by something else in a pass over few positions, and by what.

Main entry: `FewRows`. On a CPU, a pass over very few is bound by how many operations it makes, not by their size.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from open_mythos.model.block import Block
from open_mythos.model.context import StandIn
from open_mythos.model.few_rows.known import WHOLES, collect, compiles, has_global_hooks, is_patched
from open_mythos.model.halting import ACTHalting
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.rows import as_array

if TYPE_CHECKING:
    from open_mythos.model.arithmetic.compiled import Threads
    from open_mythos.model.few_rows.ends import FewRowsEnds
    from open_mythos.model.few_rows.layers import Layer
    from open_mythos.model.few_rows.token import FewRowsToken
    from open_mythos.model.mythos import OpenMythos

# Above so many keys, or pairs of a position and a key that it sees where positions are few, PyTorch's attention over
# blocks of queries is faster (docs/experiments.md).
_MOST, _MOST_KEYS, _MOST_PAIRS = 2048, 2048, 2**20


class FewRows:
    """What stands in for a model's parts in passes over few positions."""

    def __init__(self, model: nn.Module, *, whole: bool = False) -> None:
        """Made for the model's modules, hooks and weights as they are now; weights may change in place.

        `whole` if the model's own methods, those of an `OpenMythos`, may be computed by something else, too.
        """
        self._model = model
        plain: list[nn.Module] = []
        parts = [part for part in model._modules.values() if part is not None]
        all_known = [collect(part, plain) for part in parts]
        self._whole = whole and all(all_known) and not is_patched(model)  # and nothing looks at what goes on in it
        plain += [part for part, known in zip(parts, all_known, strict=True) if known and isinstance(part, WHOLES)]
        self._threads: Threads | None = None
        self._found: dict[nn.Module, StandIn] = {}
        if plain and not has_global_hooks() and compiles():
            from open_mythos.model.arithmetic.compiled import Threads

            self._threads = Threads()
            self._found = _stand_ins(plain, _layers(plain), self._threads)

    def stand_ins(self, n_positions: int, longest: int) -> dict[nn.Module, StandIn]:
        """By module, for a pass over so many positions that see at most `longest` keys: nothing if these are not few.

        Nor for modules that are not known fully: not float32, not on a CPU, wrapped, replaced, hooked or patched; nor
        under autocast, or where a process has left its threads behind in forking. Otherwise the calling thread's
        number of Numba's threads becomes that of PyTorch's.
        """
        if self._threads is None or n_positions > _MOST or longest > max(_MOST_KEYS, _MOST_PAIRS // n_positions):
            return {}
        if torch.is_autocast_enabled("cpu") or not self._threads.use("few_rows"):
            return {}
        return self._found

    @cached_property
    def ends(self) -> FewRowsEnds | None:
        """`encode` and `decode` of the model; None if not all of it is known."""
        model: OpenMythos = self._model  # type: ignore[assignment]
        if self._threads is None or not self._whole:
            return None
        head = model.head or model.embed
        parts = (model.prelude, model.prelude_norm, model.recurrent, model.coda, model.norm, head)
        if not all(part in self._found for part in parts):
            return None
        from open_mythos.model.few_rows.ends import FewRowsEnds

        found: dict[nn.Module, Any] = self._found
        return FewRowsEnds(
            config=model.config,
            embedding=as_array(model.embed.weight),
            prelude=found[model.prelude],
            prelude_norm=found[model.prelude_norm],
            coda=found[model.coda],
            norm=found[model.norm],
            head=found[head],
        )

    def token(self) -> FewRowsToken | None:
        """A pass over one position of the model; None if not all of it is known, or if it halts when settled."""
        if self.ends is None or self.ends.config.halting == "settled":
            return None
        from open_mythos.model.few_rows.token import FewRowsToken

        model: OpenMythos = self._model  # type: ignore[assignment]
        loop: Any = self._found[model.recurrent]
        return FewRowsToken(self.ends, loop)


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
            case nn.ModuleList() if all(block in layers for block in module):
                stage = [layers[block] for block in module]
                if _is_uniform(stage):
                    found[module] = FewRowsBlocks(stage, threads)
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
