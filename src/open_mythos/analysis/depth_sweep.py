"""Quality as a function of `n_loops`.

Main entry: `depth_sweep`. One pass of the deepest sweep answers for every depth, `states_by_loop`: the states of
shallower runs are on its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.data.batch import IGNORED, Batch
from open_mythos.model.context import ForwardContext
from open_mythos.model.evaluation import evaluating
from open_mythos.model.mythos import OpenMythos

Pair = Batch | tuple[Tensor, Tensor]
"""Ids and targets, both (batch, seq); targets of `IGNORED` do not count."""


class SweepRow(TypedDict):
    """Quality at one depth on sequences of one length; None where nothing was counted."""

    length: int
    n_loops: int
    loss: float | None
    """Mean cross-entropy over counted positions, in nats."""
    accuracy: float | None
    """Share of counted positions whose most likely token is the target."""
    exact_match: float | None
    """Share of sequences in which every counted position is right."""


@torch.no_grad()
def depth_sweep(
    model: OpenMythos,
    batches: Pair | Iterable[Pair],
    loops: Sequence[int],
    *,
    exact_match: bool = True,
) -> list[SweepRow]:
    """One row per sequence length and depth, in ascending order.

    `batches` is one pair, or several, of ids and targets (batch, seq); targets of -100 are ignored. Without
    `exact_match`, that column is None: in free text a whole sequence is never right.
    """
    depths = sorted(set(loops))
    if not depths or depths[0] < 1:
        raise ValueError(f"loops is {list(loops)}; it must hold integers of at least 1")
    tallies: dict[tuple[int, int], _Tally] = {}
    with evaluating(model.modules()):
        for ids, targets in _pairs(batches, model.embed.weight.device):
            if ids.shape != targets.shape:
                raise ValueError(
                    f"targets has shape {tuple(targets.shape)}; it must be that of ids, {tuple(ids.shape)}"
                )
            context = model.context(ids.shape[1])
            for depth, state in states_by_loop(model, ids, depths, context):
                tally = tallies.setdefault((ids.shape[1], depth), _Tally())
                tally.add(model.decode(state, context), targets)
    return [tally.row(length, depth, exact_match) for (length, depth), tally in sorted(tallies.items())]


def states_by_loop(
    model: OpenMythos, ids: Tensor, depths: Sequence[int], context: ForwardContext
) -> Iterator[tuple[int, Tensor]]:
    """For each of the ascending `depths`, what `decode` would be given if `n_loops` were that; (batch, seq, dim).

    With halting, a position still active at depth d gives the d-th state all the weight that ACT has not yet spent.
    """
    e = model.encode(ids, context)
    h = model.recurrent.initial_state(e)
    halting = model.recurrent.accumulator(torch.full((ids.shape[0],), depths[-1], dtype=torch.int32), e)
    for t in range(depths[-1]):
        if not halting.finished:
            h = model.loop_step(h, e, t, context, halting.active(t))
            halting.update(h, model.recurrent.halting_probabilities(h, context), t)
        if t + 1 in depths:
            yield t + 1, halting.output_if_ended(h)


@dataclass
class _Tally:
    """Sums over batches."""

    loss: float = 0.0
    right: int = 0
    counted: int = 0
    whole: int = 0
    sequences: int = 0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits (batch, seq, vocab), targets (batch, seq)."""
        counts = targets != IGNORED
        self.loss += float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
        right = (logits.argmax(-1) == targets) | ~counts
        asked = counts.any(-1)
        self.right += int((right & counts).sum())
        self.counted += int(counts.sum())
        self.whole += int((right.all(-1) & asked).sum())
        self.sequences += int(asked.sum())

    def row(self, length: int, n_loops: int, exact_match: bool) -> SweepRow:
        """The quotients."""
        none = self.counted == 0
        return SweepRow(
            length=length,
            n_loops=n_loops,
            loss=None if none else self.loss / self.counted,
            accuracy=None if none else self.right / self.counted,
            exact_match=None if none or not exact_match else self.whole / self.sequences,
        )


def _pairs(batches: Pair | Iterable[Pair], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and targets of the batches one by one, on the device; a single pair of tensors is one batch."""
    if isinstance(batches, tuple) and isinstance(batches[0], Tensor):
        batches = [(batches[0], batches[1])]
    for batch in batches:
        assert not isinstance(batch, Tensor | None)
        yield batch[0].to(device), batch[1].to(device)
