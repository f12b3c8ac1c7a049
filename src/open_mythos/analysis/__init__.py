"""Measurements of a model; each is a function that returns plain data, and `plots` draws them."""

from open_mythos.analysis.depth_law import DepthLaw, fit_depth_law, fit_depth_laws
from open_mythos.analysis.depth_sweep import SweepRow, depth_sweep
from open_mythos.analysis.finite import NonFiniteError, check_finite, non_finite_weights
from open_mythos.analysis.halting import HaltingReport, halting_matrix, under_halting
from open_mythos.analysis.jacobian import jacobian_norm, jacobian_spectral_radius
from open_mythos.analysis.kv_memory import KVCacheComparison, compare_kv_cache, kv_cache_bytes
from open_mythos.analysis.memory_plan import MemoryPlan, plan_inference, plan_training
from open_mythos.analysis.routing import ExpertLoad, RoutingReport, expert_load
from open_mythos.analysis.stability import StabilityReport, spectrum, stability

__all__ = [
    "DepthLaw",
    "ExpertLoad",
    "HaltingReport",
    "KVCacheComparison",
    "MemoryPlan",
    "NonFiniteError",
    "RoutingReport",
    "StabilityReport",
    "SweepRow",
    "check_finite",
    "compare_kv_cache",
    "depth_sweep",
    "expert_load",
    "fit_depth_law",
    "fit_depth_laws",
    "halting_matrix",
    "jacobian_norm",
    "jacobian_spectral_radius",
    "kv_cache_bytes",
    "non_finite_weights",
    "plan_inference",
    "plan_training",
    "spectrum",
    "stability",
    "under_halting",
]
