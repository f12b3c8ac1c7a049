"""How many bytes of keys and values a sequence leaves in the cache.

Main entries: `kv_cache_bytes` plans them from a config, `measured_cache_bytes` counts them in a cache, and
`compare_kv_cache` does both for a GQA and an MLA model; `bytes_per_position` is what serving stores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.cache import PlainCache
from open_mythos.model.cache_sharing import CacheSharing, EveryLoop
from open_mythos.model.evaluation import evaluating
from open_mythos.model.mythos import OpenMythos

_INT32, _INT64 = torch.int32.itemsize, torch.int64.itemsize


@dataclass(frozen=True)
class KVCacheSize:
    """Bytes of one model's cache, as counted after a forward pass and as planned from the config."""

    measured: int
    planned: int
    layer_keys: int
    """How many entries the cache has: one per layer, and per loop in the recurrent block, beside the header."""


@dataclass(frozen=True)
class KVCacheComparison:
    """The caches of two models that have read the same number of tokens in the same number of loops."""

    gqa: KVCacheSize
    mla: KVCacheSize
    seq_len: int
    n_loops: int

    @property
    def ratio(self) -> float:
        """How many times larger the measured GQA cache is."""
        return self.gqa.measured / self.mla.measured


def compare_kv_cache(
    model_gqa: OpenMythos, model_mla: OpenMythos, seq_len: int = 64, n_loops: int = 4
) -> KVCacheComparison:
    """Fill both models' caches with one sequence of `seq_len` tokens and count the bytes."""
    for name, model, attn_type in (("model_gqa", model_gqa, "gqa"), ("model_mla", model_mla, "mla")):
        if model.config.attn_type != attn_type:
            raise ValueError(f"{name} has attn_type {model.config.attn_type!r}; it must be {attn_type!r}")
    sizes = [_cache_size(model, seq_len, n_loops) for model in (model_gqa, model_mla)]
    return KVCacheComparison(gqa=sizes[0], mla=sizes[1], seq_len=seq_len, n_loops=n_loops)


def kv_cache_bytes(
    config: MythosConfig,
    batch: int,
    seq_len: int,
    n_loops: int,
    dtype: torch.dtype = torch.float32,
    exit_loops: Tensor | None = None,
) -> int:
    """Bytes of the dict that `OpenMythos.forward` fills with `seq_len` positions of `batch` sequences.

    `exit_loops` (batch, seq_len) says how many loops each position ran, at most `n_loops`, which is what None stands
    for. Exact: it counts every tensor in the dict, the header and the record of exit loops included.
    """
    for name, value in (("batch", batch), ("seq_len", seq_len), ("n_loops", n_loops)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if exit_loops is not None:
        _check_exit_loops(exit_loops, batch, seq_len, n_loops)
    positions = batch * seq_len
    exits = [n_loops] * positions if exit_loops is None else exit_loops.flatten().tolist()
    stored = sum(bytes_per_position(config, loops, dtype) * exits.count(loops) for loops in set(exits))
    header = _INT64 + batch * _INT32
    stopped_early = sum(exits) < positions * n_loops
    return stored + header + (positions * _INT32 if stopped_early else 0)


def bytes_per_position(
    config: MythosConfig, n_loops: int, dtype: torch.dtype = torch.float32, sharing: CacheSharing | None = None
) -> int:
    """Keys and values of one position that has run `n_loops` loops, all layers, where loops share as `sharing` says.

    None stands for `EveryLoop`, the only one that changes no numbers.
    """
    slots = (sharing or EveryLoop()).slots(n_loops)
    rows = config.prelude_layers + config.coda_layers + config.recurrent_layers * slots
    return rows * config.cached_numbers * dtype.itemsize


def measured_cache_bytes(cache: PlainCache) -> int:
    """Bytes of all tensors in a cache."""
    return sum(tensor.numel() * tensor.element_size() for entries in cache.values() for tensor in entries.values())


def _cache_size(model: OpenMythos, seq_len: int, n_loops: int) -> KVCacheSize:
    weight = model.embed.weight
    cache: PlainCache = {}
    ids = torch.arange(seq_len, device=weight.device).unsqueeze(0) % model.config.vocab_size
    with evaluating(model.modules()), torch.no_grad():
        output = model(ids, n_loops, cache, full_output=True)
    return KVCacheSize(
        measured=measured_cache_bytes(cache),
        planned=kv_cache_bytes(model.config, 1, seq_len, n_loops, weight.dtype, output.exit_loops),
        layer_keys=sum(not key.startswith(("header", "halting")) for key in cache),
    )


def _check_exit_loops(exit_loops: Tensor, batch: int, seq_len: int, n_loops: int) -> None:
    if exit_loops.shape != (batch, seq_len):
        raise ValueError(f"exit_loops has shape {tuple(exit_loops.shape)}; it must be {(batch, seq_len)}")
    low, high = (int(value) for value in torch.aminmax(exit_loops))
    if low < 1 or high > n_loops:
        raise ValueError(f"exit_loops holds {low if low < 1 else high}; it must be from 1 to n_loops ({n_loops})")
