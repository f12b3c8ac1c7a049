"""The paged cache's memory: zeros of the model's type, which the system gives when they are written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from open_mythos.inference.cache import CacheLayout, PagedCache
from open_mythos.model.cache_sharing import EveryLoop
from tiny import tiny_config

_STATM = Path("/proc/self/statm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_entries_are_zeros_of_the_models_type(attn_type: str, dtype: torch.dtype) -> None:
    config, like = tiny_config(attn_type), torch.empty(0, dtype=dtype)
    layout = CacheLayout(config, like.element_size(), EveryLoop())
    cache = PagedCache(layout, 5 * layout.page_bytes, like)
    assert set(cache._entries) == set(config.cache_widths)
    for name, entries in cache._entries.items():
        *heads, width = config.cache_widths[name]
        assert entries.shape[:-2] == tuple(heads)
        assert (entries.shape[-1], entries.dtype) == (width, dtype)
        assert entries.shape[-2] >= 5 * layout.page_rows
        assert not entries.any()
        assert entries.data_ptr() % 64 == 0
        entries.fill_(1)
        assert entries.all()


@pytest.mark.skipif(not _STATM.exists(), reason="the system does not say how much memory is in use")
def test_a_cache_takes_no_memory_before_it_is_written() -> None:
    layout = CacheLayout(tiny_config(), 4, EveryLoop())
    before = _resident_bytes()
    cache = PagedCache(layout, 2**29, torch.empty(0))
    assert _resident_bytes() - before < 2**26
    assert cache.pages.n_pages == 2**29 // layout.page_bytes


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
