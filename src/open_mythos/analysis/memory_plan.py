"""What a model needs in memory, from its config alone.

Main entries: `plan_inference`, `plan_training`. Weights, gradients, optimizer state and keys and values are exact;
activations are an estimate (activations.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.analysis.activations import saved_activations
from open_mythos.analysis.kv_memory import kv_cache_bytes
from open_mythos.config import MythosConfig
from open_mythos.model.cost import buffer_bytes, parameter_counts


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    """AdamW's two moments per parameter; its step counters, 4 bytes per tensor, are left out."""
    kv_cache: int
    activations: int
    """What autograd keeps for the backward pass; 0 without one."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.kv_cache + self.activations


def plan_inference(
    config: MythosConfig,
    *,
    batch: int = 1,
    seq_len: int | None = None,
    n_loops: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> MemoryPlan:
    """Serving `batch` sequences of `seq_len` tokens, every position running `n_loops` loops.

    None stands for `max_seq_len` and `max_loop_iters`. Positions that halt earlier need less:
    `kv_memory.kv_cache_bytes` takes their exit loops.
    """
    seq_len, n_loops = _sizes(config, batch, seq_len, n_loops)
    return MemoryPlan(
        weights=weight_bytes(config, dtype),
        gradients=0,
        optimizer=0,
        kv_cache=kv_cache_bytes(config, batch, seq_len, n_loops, dtype),
        activations=0,
    )


def plan_training(
    config: MythosConfig,
    *,
    batch: int = 1,
    seq_len: int | None = None,
    n_loops: int | None = None,
    dtype: torch.dtype = torch.float32,
    checkpoint_loops: bool = False,
) -> MemoryPlan:
    """One AdamW step on `batch` sequences of `seq_len` tokens with `n_loops` loops, everything in `dtype`.

    With `checkpoint_loops`, each loop keeps only its state and is computed again in the backward pass.
    """
    seq_len, n_loops = _sizes(config, batch, seq_len, n_loops)
    parameters = parameter_counts(config).total * dtype.itemsize
    saved = saved_activations(config, n_loops, checkpoint_loops=checkpoint_loops)
    return MemoryPlan(
        weights=weight_bytes(config, dtype),
        gradients=parameters,
        optimizer=2 * parameters,
        kv_cache=0,
        activations=saved * batch * seq_len * dtype.itemsize,
    )


def weight_bytes(config: MythosConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of all parameters and buffers of `OpenMythos(config).to(dtype)`."""
    return parameter_counts(config).total * dtype.itemsize + buffer_bytes(config, dtype.itemsize)


def _sizes(config: MythosConfig, batch: int, seq_len: int | None, n_loops: int | None) -> tuple[int, int]:
    seq_len = config.max_seq_len if seq_len is None else seq_len
    n_loops = config.max_loop_iters if n_loops is None else n_loops
    for name, value in (("batch", batch), ("n_loops", n_loops)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 1 <= seq_len <= config.max_seq_len:
        raise ValueError(f"seq_len is {seq_len}; it must be from 1 to max_seq_len ({config.max_seq_len})")
    return seq_len, n_loops
