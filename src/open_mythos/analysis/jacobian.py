"""How one whole loop stretches a small change of the state, at a given input.

Main entries: `jacobian_spectral_radius`, `jacobian_norm`. The Jacobian dh'/dh has (batch * seq * dim) rows and is never
built: power iteration needs only its products with vectors, which `torch.func.jvp` gives.
A spectral radius below 1 means that the loop contracts towards a fixed point near this state, which is more than
rho(A) < 1 says: that speaks of the linear part alone.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_mythos.model.evaluation import evaluating
from open_mythos.model.mythos import OpenMythos

# The first half of the iterations only turns the random start towards the dominant directions.
_BURN_IN = 0.5


def jacobian_spectral_radius(
    model: OpenMythos, ids: Tensor, n_loops: int | None = None, *, iterations: int = 100, seed: int = 0
) -> float:
    """Largest |eigenvalue| of dh'/dh at the state that ids (batch, seq) lead to after `n_loops` loops.

    The Jacobian is real, so its dominant eigenvalues may be a complex pair, on which a vector's growth oscillates for
    ever. Hence the geometric mean of the growth over the last half of the iterations; its error shrinks like
    1 / iterations, and faster where one real eigenvalue dominates. `n_loops` is `max_loop_iters` by default.
    """
    with evaluating(model.modules()), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        step, state = _loop_at(model, ids, n_loops)
        return _mean_growth(lambda v: jvp(step, (state,), (v,))[1], _direction(state, seed), iterations)


def jacobian_norm(
    model: OpenMythos, ids: Tensor, n_loops: int | None = None, *, iterations: int = 30, seed: int = 0
) -> float:
    """Largest singular value of the same Jacobian: the most that any small change of the state grows in one loop.

    Power iteration on `J^T J`, whose eigenvalues are real: the estimate rises towards the true value from below.
    """
    with evaluating(model.modules()), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        step, state = _loop_at(model, ids, n_loops)
        pull_back = vjp(step, state)[1]
        growth = _mean_growth(lambda v: pull_back(jvp(step, (state,), (v,))[1])[0], _direction(state, seed), iterations)
        return sqrt(growth)


def _loop_at(model: OpenMythos, ids: Tensor, n_loops: int | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The next loop as a function of the state, and the state after `n_loops` loops without halting."""
    n_loops = model.config.max_loop_iters if n_loops is None else n_loops
    if n_loops < 0:
        raise ValueError(f"n_loops is {n_loops}; it must be at least 0")
    e = model.encode(ids)
    h = model.recurrent.initial_state(e)
    for t in range(n_loops):
        h = model.loop_step(h, e, t)
    return lambda state: model.loop_step(state, e, n_loops), h


def _direction(state: Tensor, seed: int) -> Tensor:
    """A random unit vector of the state's shape; drawn on the CPU so that every device starts alike."""
    v = torch.randn(state.shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(state)
    return F.normalize(v.flatten(), dim=0).view_as(v)


def _mean_growth(apply: Callable[[Tensor], Tensor], v: Tensor, iterations: int) -> float:
    """Geometric mean of the factors by which a linear map lengthens v, after the burn-in."""
    if iterations < 2:
        raise ValueError(f"iterations is {iterations}; it must be at least 2")
    logs: list[float] = []
    for _ in range(iterations):
        v = apply(v)
        norm = float(torch.linalg.vector_norm(v))
        if norm == 0:
            return 0.0
        logs.append(log(norm))
        v = v / norm
    kept = logs[int(_BURN_IN * iterations) :]
    return exp(sum(kept) / len(kept))
