"""Waves of single positions through compiled functions of fixed shapes.

Main entry: `CompiledWaves`. Lanes, and keys per lane, are padded to a few sizes; each pair of them is compiled once per
stage, at its first use. Waves with several positions of a request are the `WaveContext`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.inference.cache import PagedCache
from open_mythos.inference.wave import Lane
from open_mythos.model.cache import CacheAddress, Entries
from open_mythos.model.context import ForwardContext, Visible
from open_mythos.model.mask import OwnMasks
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.rope import RotaryTable

Stage = Callable[..., Tensor]
"""What a wave computes, of the model, a context, and tensors (1, lanes, ...); returns (1, lanes, ...)."""

_FEWEST_KEYS = 64


class StaticContext(ForwardContext):
    """A `ForwardContext` over single positions that a table describes, in operations on tensors alone.

    The table (lanes, 2 + keys) has each lane's position, how many keys it sees, and where their rows begin: they end
    with its own, and begin with as many that are not looked at as it takes.
    """

    def __init__(self, config: MythosConfig, cache: PagedCache, table: Tensor, dtype: torch.dtype) -> None:
        super().__init__(config, table.shape[0], table.device, dtype)
        positions, counts, rows = table[:, 0], table[:, 1:2], table[:, 2:]
        self._cache, self._rows = cache, rows
        self._rotary = self._rotary_at(
            positions
        )  # now: Python 3.11's cached_property takes a lock, which is not traced
        n_keys = rows.shape[1]
        seen = torch.arange(n_keys, device=self.device) >= n_keys - counts
        self._mask = OwnMasks.of(seen.unsqueeze(1), dtype)

    @property
    def rotary(self) -> RotaryTable | None:
        """Rotations of every lane's position."""
        return self._rotary

    def attend(
        self,
        address: CacheAddress,
        queries: tuple[Tensor, ...],
        new: Entries,
        active: Tensor | None,
        window: int | None,
        over: Visible,
    ) -> Tensor:
        """Store what is new, then let every lane attend to what it may see."""
        self._cache.write(address, self._rows[:, -1], {name: tensor[0] for name, tensor in new.items()})
        own = tuple(q.transpose(0, 1) for q in queries)
        return over(own, self._cache.read(address, self._rows), self._mask).transpose(0, 1)


class CompiledWaves:
    """Compiled functions, one for each stage, number of lanes and number of keys.

    Numbers of lanes are powers of two; those of keys too, from 64 on, or the window or context if that is smaller.
    """

    def __init__(self, model: OpenMythos, cache: PagedCache, backend: str | Callable[..., Any] = "inductor") -> None:
        """`backend` is `torch.compile`'s."""
        self._model, self._cache, self._backend = model, cache, backend
        self._device = model.embed.weight.device
        self._functions: dict[tuple[Stage, int, int], Stage] = {}

    def __call__(self, stage: Stage, lanes: Sequence[Lane], inputs: Sequence[Tensor | int]) -> Tensor:
        """What `stage` makes of the inputs (1, lanes, ...) of lanes of one position each, whose rows are placed."""
        table = self._table(lanes)
        key = (stage, *table.shape)
        if key not in self._functions:
            self._functions[key] = self._compiled(stage)
        padded = [self._padded(x, len(table) - len(lanes)) for x in inputs]
        return self._functions[key](torch.from_numpy(table).to(self._device), *padded)[:, : len(lanes)]

    def _padded(self, x: Tensor | int, missing: int) -> Tensor:
        """With zeros for lanes that are not there."""
        if isinstance(x, int):  # of the only lane; as it is, every value would be compiled anew
            return torch.full((1, 1, 1), x, device=self._device)
        return F.pad(x, (*(0, 0) * (x.dim() - 2), 0, missing)) if missing else x

    def _table(self, lanes: Sequence[Lane]) -> np.ndarray:
        """The `StaticContext`'s table; lanes that are not there write to the spare row, and read it."""
        config = self._model.config
        window = config.outer_reach if lanes[0].loop is None else config.loop_reach
        ends = [int(lane.positions) + 1 for lane in lanes]
        counts = [end if window is None else min(end, window) for end in ends]
        limit = config.max_seq_len if window is None else min(window, config.max_seq_len)
        n_keys = min(_bucket(max(*counts, _FEWEST_KEYS)), limit)
        table = np.full((_bucket(len(lanes)), 2 + n_keys), self._cache.spare_row, np.int64)
        table[:, :2] = 0, 1
        for line, lane, end, count in zip(table, lanes, ends, counts, strict=False):
            seen = lane.table.seen(lane.loop)
            line[0], line[1], line[2:] = end - 1, count, seen[end - 1]
            line[-count:] = seen[end - count : end]
        return table

    def _compiled(self, stage: Stage) -> Stage:
        model, cache, dtype = self._model, self._cache, self._model.embed.weight.dtype

        def run(table: Tensor, *inputs: Tensor) -> Tensor:
            return stage(model, StaticContext(model.config, cache, table, dtype), *inputs)

        # PyTorch keeps what it compiled with the code object, at most 8 times, and looks through all in every call.
        own = FunctionType(run.__code__.replace(), run.__globals__, stage.__name__, None, run.__closure__)
        return torch.compile(own, fullgraph=True, dynamic=False, backend=self._backend)


def _bucket(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
