"""Teaching a trained model when to stop.

Main entry: `fit_halting`. The rest of the model is frozen, so nothing that it learned about depth can be lost: only the
linear layer of `ACTHalting` learns to tell states whose answer has settled from states whose answer has not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.model.mythos import OpenMythos


@dataclass(frozen=True, kw_only=True)
class HaltingFitConfig:
    """How to train the halting head."""

    steps: int
    learning_rate: float
    extra_loops: int
    """Loops run beyond a batch's own, so that settled states are seen as well."""


def fit_halting(
    model: OpenMythos,
    draw: Callable[[int], tuple[Tensor, int]],
    config: HaltingFitConfig,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train `model.recurrent.act` on the ids (batch, seq) and loops of `draw(step)`; leaves the model in evaluation mode.

    The target of a position at a loop is 1 if its most likely token there is already that of the deepest loop, and stays
    so (the self-supervised form of Ouro's second stage, arXiv 2510.25741). `on_step` gets the step and the loss.

    Raises `ValueError` if the model was built without halting.
    """
    act = model.recurrent.act
    if act is None:
        raise ValueError(f"halting is {model.config.halting!r}; it must be 'act' for a halting head to be trained")
    optimizer = torch.optim.AdamW(act.parameters(), lr=config.learning_rate, weight_decay=0.0)
    model.eval()
    for step in range(config.steps):
        ids, n_loops = draw(step)
        states, settled = _settled_states(model, ids, n_loops + config.extra_loops)
        loss = F.binary_cross_entropy(act(states), settled)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step, float(loss.detach()))


@torch.no_grad()
def _settled_states(model: OpenMythos, ids: Tensor, n_loops: int) -> tuple[Tensor, Tensor]:
    """States of all loops, one after the other in the batch, and whether each one's answer is the final one for good."""
    context = model.context(ids.shape[1])
    e = model.encode(ids, context)
    h = model.recurrent.initial_state(e)
    states, answers = [], []
    for t in range(n_loops):
        h = model.loop_step(h, e, t, context)
        states.append(h)
        answers.append(model.decode(h, context).argmax(-1))
    same = torch.stack(answers) == answers[-1]
    settled = same.flip(0).cumprod(0).flip(0)
    return torch.cat(states), settled.flatten(0, 1).to(h.dtype)
