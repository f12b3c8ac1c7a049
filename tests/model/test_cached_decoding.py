"""Decoding with a cache gives the numbers of one full forward pass, at every step and however the sequence is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.cache import PlainCache
from open_mythos.model.mythos import OpenMythos
from tiny import random_ids, tiny_config, tiny_model

SEQ = 9
CUTS = {"token by token": [1] * SEQ, "chunks": [4, 4, 1], "mixed": [3, 1, 1, 4]}
DEPTHS: list[int | list[int]] = [1, 2, 3, 4, 5, 6, [5, 2, 6]]


@torch.no_grad()
def assert_cached_equals_full(
    model: OpenMythos, ids: Tensor, n_loops: int | Tensor, cuts: list[int]
) -> tuple[Tensor, PlainCache]:
    """Feed `ids` in pieces and compare each with the full pass; returns the full pass's exit loops and the cache."""
    full = model(ids, n_loops, full_output=True)
    cache: PlainCache = {}
    start = 0
    for size in cuts:
        piece = model(ids[:, start : start + size], n_loops, cache, full_output=True)
        there = slice(start, start + size)
        torch.testing.assert_close(piece.logits, full.logits[:, there], atol=1e-4, rtol=0)
        assert torch.equal(piece.exit_loops, full.exit_loops[:, there])
        start += size
    return full.exit_loops, cache


def assert_halting_is_tested(exit_loops: Tensor, n_loops: int | Tensor) -> None:
    assert bool((exit_loops < torch.as_tensor(n_loops).view(-1, 1)).any()), "some positions must stop early"
    assert exit_loops.unique().numel() >= 3, "positions must exit at different loops"


@pytest.mark.parametrize("window", [None, 3], ids=["full attention", "window"])
@pytest.mark.parametrize("halting", ["act", "settled", "none"])
@pytest.mark.parametrize("depth", DEPTHS, ids=str)
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_every_step_equals_the_full_forward(
    attn_type: str, depth: int | list[int], halting: str, window: int | None
) -> None:
    config = tiny_config(attn_type, halting=halting, window=window)
    model, ids = tiny_model(config), random_ids(config, 3, SEQ)
    n_loops = depth if isinstance(depth, int) else torch.tensor(depth)
    for cuts in (CUTS["token by token"], CUTS["mixed"]):
        exit_loops, _ = assert_cached_equals_full(model, ids, n_loops, cuts)
    if halting == "act" and depth not in (1, 2, 3):
        assert_halting_is_tested(exit_loops, n_loops)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_later_piece_settles_no_earlier_than_what_it_follows(attn_type: str, cuts: list[int]) -> None:
    config = tiny_config(attn_type, halting="settled", settle_tolerance=0.1, window=3, recurrent_layers=2)
    exit_loops, _ = assert_cached_equals_full(tiny_model(config), random_ids(config, 3, SEQ), 30, cuts)
    assert_halting_is_tested(exit_loops, 30)
    assert (exit_loops.diff(dim=1) >= 0).all()


VARIANTS: list[dict[str, Any]] = [
    {"recurrent_layers": 2},
    {"recurrent_layers": 2, "window": 2},
    {"prelude_layers": 0, "coda_layers": 0},
    {"prelude_layers": 2, "coda_layers": 2, "outer_window": 2},
    {"n_experts": 8, "router_score": "sigmoid"},
    {"n_experts": 0, "lora_rank": 0, "loop_embedding": False},
    {"use_rope": False, "attention_sink": False, "qk_norm": False, "tie_embeddings": False},
    {"state_init": "input", "window": 1},
]


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes))
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_every_architecture_decodes_as_it_computes(attn_type: str, changes: dict[str, Any], cuts: list[int]) -> None:
    config = tiny_config(attn_type, **changes)
    model, ids = tiny_model(config), random_ids(config, 2, SEQ)
    assert_cached_equals_full(model, ids, 5, cuts)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cuts", [[52, 1, 1, 6], [2, 49, 9], [59, 1]], ids=str)
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_long_chunks_go_through_the_flash_kernel_and_agree(attn_type: str, cuts: list[int], window: int | None) -> None:
    config = tiny_config(attn_type, window=window)
    model, ids = tiny_model(config), random_ids(config, 2, 60)
    exit_loops, _ = assert_cached_equals_full(model, ids, 4, cuts)
    assert_halting_is_tested(exit_loops, 4)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    n_loops=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    attn_type=st.sampled_from(["gqa", "mla"]),
    window=st.none() | st.integers(1, 6),
    seed=st.integers(0, 3),
)
def test_no_way_of_cutting_a_sequence_changes_it(
    cuts: list[int], n_loops: list[int], attn_type: str, window: int | None, seed: int
) -> None:
    config = tiny_config(attn_type, window=window)
    ids = random_ids(config, len(n_loops), sum(cuts), seed)
    assert_cached_equals_full(tiny_model(config, seed), ids, torch.tensor(n_loops), cuts)


@torch.no_grad()
def test_a_later_call_may_run_deeper_than_any_before() -> None:
    """When all positions of a first call stop at loop 1, nothing of loop 2 is stored, and what it sees is loop 1."""
    config = tiny_config(lora_rank=0)
    model, ids = tiny_model(config), random_ids(config, 1, 7)
    cache: PlainCache = {}
    model.recurrent.act.halt.bias.fill_(20.0)
    assert model(ids[:, :4], 6, cache, full_output=True).exit_loops.tolist() == [[1, 1, 1, 1]]
    model.recurrent.act.halt.bias.fill_(-20.0)
    assert model(ids[:, 4:6], 6, cache, full_output=True).exit_loops.tolist() == [[6, 6]]
    found = model(ids[:, 6:], 6, cache)

    def halting_by_position(h: Tensor) -> Tensor:
        return torch.tensor([[1.0] * 4 + [0.0] * 3])

    model.recurrent.act.forward = halting_by_position
    torch.testing.assert_close(found, model(ids, 6)[:, 6:], atol=1e-4, rtol=0)


def _stored_bytes(cache: PlainCache, stages: tuple[str, ...] = ("prelude", "recurrent", "coda")) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for key, entry in cache.items()
        if key.startswith(stages)
        for tensor in entry.values()
    )


def _bytes_per_row(config: MythosConfig) -> int:
    if config.attn_type == "mla":
        return 4 * (config.kv_lora_rank + config.qk_rope_head_dim)
    return 4 * 2 * config.n_kv_heads * config.head_dim


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("halting", ["act", "settled", "none"])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_the_cache_stores_only_rows_that_were_computed(attn_type: str, halting: str, cuts: list[int]) -> None:
    """Bytes are the sum over exit loops in the recurrent block, and one row per position elsewhere."""
    config = tiny_config(attn_type, halting=halting, recurrent_layers=2, coda_layers=2)
    model, ids = tiny_model(config), random_ids(config, 3, SEQ)
    exit_loops, cache = assert_cached_equals_full(model, ids, torch.tensor([4, 6, 3]), cuts)
    rows = 2 * int(exit_loops.sum()) + (config.prelude_layers + config.coda_layers) * ids.numel()
    assert _stored_bytes(cache) == rows * _bytes_per_row(config)
    bookkeeping = _stored_bytes(cache, ("",)) - _stored_bytes(cache)
    assert bookkeeping <= 8 * ids.numel() + 64


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@torch.no_grad()
def test_the_cache_keeps_no_larger_tensor_alive(attn_type: str, batch: int) -> None:
    """A slice of the joint projection would keep queries in memory: what is counted is what is held."""
    config = tiny_config(attn_type)
    cache: PlainCache = {}
    tiny_model(config)(random_ids(config, batch, 32), 3, cache)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for key, entry in cache.items()
        if key.startswith(("prelude", "recurrent", "coda"))
        for tensor in entry.values()
    }
    assert sum(storages.values()) <= 1.5 * _stored_bytes(cache)


def test_the_cache_is_a_plain_dict_of_dicts_of_tensors() -> None:
    config = tiny_config()
    cache: PlainCache = {}
    tiny_model(config)(random_ids(config, 2, 5), 3, cache)
    assert type(cache) is dict
    for key, entry in cache.items():
        assert isinstance(key, str)
        for name, tensor in entry.items():
            assert isinstance(name, str)
            assert isinstance(tensor, Tensor)
            assert not tensor.requires_grad, "a cache must not keep the graph alive"


@torch.no_grad()
def test_a_copied_cache_continues_on_its_own() -> None:
    """One prompt, several continuations."""
    config = tiny_config()
    model = tiny_model(config)
    prompt, one, other = random_ids(config, 1, 6), random_ids(config, 1, 3, 5), random_ids(config, 1, 3, 6)
    cache: PlainCache = {}
    model(prompt, 4, cache)
    branch = copy.deepcopy(cache)
    for continuation, own in ((one, cache), (other, branch)):
        full = model(torch.cat([prompt, continuation], 1), 4)
        torch.testing.assert_close(model(continuation, 4, own), full[:, 6:], atol=1e-4, rtol=0)


def _snapshot(cache: PlainCache) -> dict[str, dict[str, Tensor]]:
    return {key: {name: tensor.clone() for name, tensor in entry.items()} for key, entry in cache.items()}


def _assert_same_cache(one: PlainCache, other: PlainCache) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("filled", [0, 4])
@torch.no_grad()
def test_a_call_that_fails_half_way_leaves_the_cache_usable(
    attn_type: str, filled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(attn_type)
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    cache: PlainCache = {}
    if filled:
        model(ids[:, :filled], 4, cache)
    before = _snapshot(cache)

    def fail(x: Tensor) -> Tensor:
        raise MemoryError("in the final norm, after every layer has run")

    with monkeypatch.context() as patch:
        patch.setattr(model.norm, "forward", fail)
        with pytest.raises(MemoryError):
            model(ids[:, filled:7], 4, cache)
    _assert_same_cache(cache, before)
    found = model(ids[:, filled:], 4, cache)
    torch.testing.assert_close(found, model(ids, 4)[:, filled:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_refused_input_leaves_the_cache_unchanged() -> None:
    config = tiny_config(max_seq_len=8)
    model, ids = tiny_model(config), random_ids(config, 2, 8)
    cache: PlainCache = {}
    model(ids[:, :5], 4, cache)
    before = _snapshot(cache)
    refused = [(ids[:, :4], 4), (ids[:1, 5:], 4), (ids[:, 5:], 3), (ids[:, 5:] + 100, 4), (ids[:, 5:].float(), 4)]
    for wrong_ids, n_loops in refused:
        with pytest.raises(ValueError, match=r"input_ids|kv_cache"):
            model(wrong_ids, n_loops, cache)
        _assert_same_cache(cache, before)
    torch.testing.assert_close(model(ids[:, 5:], 4, cache), model(ids, 4)[:, 5:], atol=1e-4, rtol=0)
