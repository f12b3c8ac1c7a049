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

_CONFIDENT = 0.9


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
    """Train `model.recurrent.act` on the ids (batch, seq) and loops of `draw(step)`.

    A position's answer is settled from the loop on from which the deepest loop's most likely token never falls below a
    probability of 0.9 (in the spirit of Ouro's second stage, arXiv 2510.25741, but without labels). The target is 1
    from the loop after that: the keys of a position's last loop come from the state before it, so one more loop is
    needed for the settled state to reach the positions that depend on it. `on_step` gets the step and the loss.
    Leaves the model in evaluation mode.

    Raises `ValueError` if the model was built without halting.
    """
    act = model.recurrent.act
    if act is None:
        raise ValueError(f"halting is {model.config.halting!r}; it must be 'act' for a halting head to be trained")
    optimizer = torch.optim.AdamW(act.parameters(), lr=config.learning_rate, weight_decay=0.0)
    model.eval()
    for step in range(config.steps):
        ids, n_loops = draw(step)
        states, targets = _states_and_targets(model, ids, n_loops + config.extra_loops)
        loss = F.binary_cross_entropy(act(states), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step, float(loss.detach()))


@torch.no_grad()
def _states_and_targets(model: OpenMythos, ids: Tensor, n_loops: int) -> tuple[Tensor, Tensor]:
    """States of all loops, one after the other in the batch, and the halting target of each."""
    context = model.context(ids.shape[1])
    e = model.encode(ids, context)
    h = model.recurrent.initial_state(e)
    states, predictions = [], []
    for t in range(n_loops):
        h = model.loop_step(h, e, t, context)
        states.append(h)
        predictions.append(model.decode(h, context).softmax(-1))
    answers = predictions[-1].argmax(-1, keepdim=True)
    confident = torch.stack([prediction.gather(-1, answers).squeeze(-1) >= _CONFIDENT for prediction in predictions])
    settled = confident.to(h.dtype).flip(0).cumprod(0).flip(0)
    targets = torch.cat([torch.zeros_like(settled[:1]), settled[:-1]])
    return torch.cat(states), targets.flatten(0, 1)
