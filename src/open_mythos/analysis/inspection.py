"""Everything that can be told about a config, or about a model with its weights, in one report.

Main entries: `inspect_config`, `inspect_model`; `as_data` turns either report into what JSON can hold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from open_mythos.analysis.finite import non_finite_weights
from open_mythos.analysis.jacobian import jacobian_spectral_radius
from open_mythos.analysis.memory_plan import MemoryPlan, plan_inference, plan_training
from open_mythos.analysis.routing import RoutingReport, expert_load
from open_mythos.analysis.stability import StabilityReport, stability
from open_mythos.config import MythosConfig
from open_mythos.model.cost import ForwardFlops, ParameterCounts, forward_flops, parameter_counts
from open_mythos.model.mythos import OpenMythos

# Enough tokens to see norms and loads; a Jacobian product costs three forward passes, and there are many of them.
_PROBE_TOKENS, _JACOBIAN_TOKENS, _JACOBIAN_ITERATIONS = 64, 16, 40


@dataclass(frozen=True)
class ConfigReport:
    """What the config alone decides."""

    parameters: ParameterCounts
    flops: ForwardFlops
    """Per token, in a forward pass over `seq_len` tokens."""
    plans: dict[str, MemoryPlan]
    """By use: inference, training, and training that computes each loop again in the backward pass."""
    batch: int
    seq_len: int
    n_loops: int
    dtype: str

    @property
    def flops_by_loops(self) -> dict[int, float]:
        """FLOPs of one token at 1, 2, 4, ... loops, up to `n_loops`."""
        depths = sorted({2**k for k in range(self.n_loops.bit_length())} | {self.n_loops})
        return {depth: self.flops.total(depth) for depth in depths}


@dataclass(frozen=True)
class ModelReport:
    """What the weights do on random tokens; nothing is measured while a weight is not finite."""

    non_finite: tuple[str, ...]
    """Names of the weights that hold NaN or infinity."""
    stability: StabilityReport | None
    jacobian_radius: float | None
    routing: RoutingReport | None
    """None without experts as well."""


def inspect_config(
    config: MythosConfig,
    *,
    batch: int = 1,
    seq_len: int | None = None,
    n_loops: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ConfigReport:
    """Parameters, FLOPs and memory plans, without building the model; None means `max_seq_len` and `max_loop_iters`."""
    seq_len = config.max_seq_len if seq_len is None else seq_len
    n_loops = config.max_loop_iters if n_loops is None else n_loops

    def training(checkpoint_loops: bool) -> MemoryPlan:
        return plan_training(
            config, batch=batch, seq_len=seq_len, n_loops=n_loops, dtype=dtype, checkpoint_loops=checkpoint_loops
        )

    return ConfigReport(
        plans={
            "inference": plan_inference(config, batch=batch, seq_len=seq_len, n_loops=n_loops, dtype=dtype),
            "training": training(checkpoint_loops=False),
            "training, loops recomputed": training(checkpoint_loops=True),
        },
        parameters=parameter_counts(config),
        flops=forward_flops(config, seq_len),
        batch=batch,
        seq_len=seq_len,
        n_loops=n_loops,
        dtype=str(dtype).removeprefix("torch."),
    )


def inspect_model(model: OpenMythos, n_loops: int | None = None, seed: int = 0) -> ModelReport:
    """Stability and routing on one random sequence of at most 64 tokens, the Jacobian's radius on its first 16."""
    broken = tuple(non_finite_weights(model))
    if broken:
        return ModelReport(broken, None, None, None)
    config = model.config
    shape = (1, min(_PROBE_TOKENS, config.max_seq_len))
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    ids = ids.to(model.embed.weight.device)
    head = ids[:, :_JACOBIAN_TOKENS]
    return ModelReport(
        non_finite=(),
        stability=stability(model, ids, n_loops),
        jacobian_radius=jacobian_spectral_radius(model, head, n_loops, iterations=_JACOBIAN_ITERATIONS, seed=seed),
        routing=expert_load(model, ids, n_loops) if config.n_experts else None,
    )


def as_data(report: ConfigReport | ModelReport) -> dict[str, Any]:
    """The report's fields, and the figures derived from them, as dicts, lists, numbers and strings."""
    data = asdict(report)
    if isinstance(report, ConfigReport):
        data["parameters"] |= {"total": report.parameters.total, "active": report.parameters.active}
        data["flops_by_loops"] = report.flops_by_loops
        for name, plan in report.plans.items():
            data["plans"][name]["total"] = plan.total
        return data
    if report.stability is not None:
        data["stability"]["rho"] = report.stability.spectrum.rho
    if report.routing is not None:
        data["routing"] = [
            [{"shares": load.shares, "imbalance": load.imbalance, "busiest": load.busiest} for load in loop]
            for loop in report.routing.loops
        ]
    return data
