"""Is the loop stable? The spectrum of A, and the proved bound on the state beside what the state does.

Main entries: `spectrum`, `state_bound`, `stability`. The bound holds in evaluation mode, up to rounding.

One loop is `h' = u + F(u)` with `u = A h + B e + l_t` (l the loop embedding), A diagonal with entries a in (0, 1) and
`|F|` at most M per channel (branch_bound.py proves it). So `|h'| <= a |h| + c` with `c = |B e| + max|l| + M`, and by
induction after t loops

    |h_t| <= a^t |h_0| + (1 - a^t) / (1 - a) * c    per channel, which tends to  c / (1 - a).

The state that the coda reads is a mean of such states with ACT's weights, so the largest of these bounds it too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.branch_bound import branch_bound
from open_mythos.model.evaluation import evaluating
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.recurrent import RecurrentBlock


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of A, which is diagonal: its entries."""

    values: tuple[float, ...]
    """Ascending, one per channel."""

    @property
    def rho(self) -> float:
        """Spectral radius; all entries are positive, so it is the largest."""
        return self.values[-1]

    @property
    def smallest(self) -> float:
        return self.values[0]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


@dataclass(frozen=True)
class LoopNorm:
    """The state after `loop` loops, 0 being the initial state: l2 norms over channels, and the bound."""

    loop: int
    mean: float
    """Mean over positions."""
    largest: float
    """Over positions."""
    bound: float
    """No position's norm can exceed it, given the largest `|B e|` of each channel in this input."""
    tightness: float
    """The largest `|h| / bound` of any single channel and position; at most 1."""


@dataclass(frozen=True)
class StabilityReport:
    """What `stability` found."""

    spectrum: Spectrum
    loops: tuple[LoopNorm, ...]
    """From the initial state to the last loop."""
    limit: float
    """The bound's l2 norm after infinitely many loops."""


def spectrum(model: OpenMythos) -> Spectrum:
    """The entries of A."""
    return Spectrum(tuple(sorted(model.recurrent.injection.get_A().detach().double().tolist())))


@torch.no_grad()
def state_bound(model: OpenMythos, e: Tensor, h: Tensor, n_loops: int) -> Tensor:
    """Bounds (n_loops + 1, dim) in float64 on the state after 0, 1, ... loops from h; h and e are (batch, seq, dim)."""
    a = model.recurrent.injection.get_A().double()
    drive = _drive(model, e)
    power = a ** torch.arange(n_loops + 1, device=a.device).unsqueeze(-1)
    return power * _largest(h) + (1 - power) / (1 - a) * drive


@torch.no_grad()
def stability(model: OpenMythos, ids: Tensor, n_loops: int | None = None) -> StabilityReport:
    """Run `n_loops` loops, by default `max_loop_iters`, on ids (batch, seq) without halting: norms beside bounds."""
    n_loops = model.config.max_loop_iters if n_loops is None else n_loops
    if n_loops < 1:
        raise ValueError(f"n_loops is {n_loops}; it must be at least 1")
    with evaluating(model.modules()):
        context = model.context(ids.shape[1])
        e = model.encode(ids, context)
        h = model.recurrent.initial_state(e)
        bounds = state_bound(model, e, h, n_loops)
        loops = [_loop_norm(0, h, bounds[0])]
        for t in range(n_loops):
            h = model.loop_step(h, e, t, context)
            loops.append(_loop_norm(t + 1, h, bounds[t + 1]))
    limit = _drive(model, e) / (1 - model.recurrent.injection.get_A().double())
    return StabilityReport(spectrum(model), tuple(loops), float(torch.linalg.vector_norm(limit)))


def _drive(model: OpenMythos, e: Tensor) -> Tensor:
    """c, (dim,): what one loop adds at most to a channel beside `a |h|`."""
    injected = _largest(model.recurrent.injection.B * e)
    return injected + _embedding_bound(model.recurrent) + branch_bound(model.recurrent)


def _embedding_bound(recurrent: RecurrentBlock) -> Tensor | float:
    """max |l_t| over all t, (dim,): its decays lie in (0, 1), so their powers never exceed 1."""
    return 0.0 if recurrent.loop_embedding is None else recurrent.loop_embedding.weight.double().abs().sum(0)


def _largest(x: Tensor) -> Tensor:
    """Of each channel's magnitudes in x (batch, seq, dim); (dim,) in float64."""
    return x.double().abs().amax((0, 1))


def _loop_norm(loop: int, h: Tensor, bound: Tensor) -> LoopNorm:
    norms = torch.linalg.vector_norm(h.double(), dim=-1)
    channels = _largest(h)
    ratio = torch.where(channels > 0, channels / bound, 0.0)
    return LoopNorm(
        loop=loop,
        mean=float(norms.mean()),
        largest=float(norms.max()),
        bound=float(torch.linalg.vector_norm(bound)),
        tightness=float(ratio.max()),
    )
