"""Planned cache bytes equal measured ones."""

import pytest
import torch

from open_mythos.analysis.kv_memory import compare_kv_cache, kv_cache_bytes, measured_cache_bytes
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_tiny, mythos_tutorial_gqa, mythos_tutorial_mla
from tiny import random_ids, tiny_config, tiny_model


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_plan_is_exact(attn_type: str, dtype: torch.dtype, batch: int) -> None:
    config = tiny_config(attn_type, halting="none", recurrent_layers=2, coda_layers=2)
    model = OpenMythos(config).to(dtype).eval()
    cache: dict[str, dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        for new in (9, 1, 4):
            model(random_ids(config, batch, new), 3, cache)
    assert kv_cache_bytes(config, batch, 14, 3, dtype) == measured_cache_bytes(cache)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_the_plan_is_exact_when_positions_halt(attn_type: str) -> None:
    config = tiny_config(attn_type)
    model = tiny_model(config)
    cache: dict[str, dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        exits = [model(random_ids(config, 2, new, new), 12, cache, full_output=True).exit_loops for new in (10, 1, 3)]
    exit_loops = torch.cat(exits, 1)
    assert int(exit_loops.min()) < 12
    planned = kv_cache_bytes(config, 2, 14, 12, exit_loops=exit_loops)
    assert planned == measured_cache_bytes(cache)
    assert planned < kv_cache_bytes(config, 2, 14, 12)


def test_the_plan_is_exact_when_sequences_have_their_own_depth() -> None:
    config = mythos_tiny().replace(halting="none")
    cache: dict[str, dict[str, torch.Tensor]] = {}
    depths = torch.tensor([2, 5])
    with torch.no_grad():
        OpenMythos(config).eval()(random_ids(config, 2, 6), depths, cache)
    exit_loops = depths.unsqueeze(-1).expand(2, 6)
    assert kv_cache_bytes(config, 2, 6, 5, exit_loops=exit_loops) == measured_cache_bytes(cache)


def test_mla_caches_at_least_2_6_times_less_in_the_tutorial() -> None:
    comparison = compare_kv_cache(OpenMythos(mythos_tutorial_gqa()), OpenMythos(mythos_tutorial_mla()))
    for size in (comparison.gqa, comparison.mla):
        assert size.measured == size.planned
        assert size.layer_keys == 1 + 4 + 1
    assert comparison.ratio == pytest.approx(8 / 3, rel=0.001)


def test_bad_input_is_named() -> None:
    tiny = OpenMythos(mythos_tiny())
    with pytest.raises(ValueError, match="model_mla has attn_type 'gqa'; it must be 'mla'"):
        compare_kv_cache(tiny, tiny)
    with pytest.raises(ValueError, match="n_loops is 0; it must be at least 1"):
        kv_cache_bytes(mythos_tiny(), 1, 8, 0)
    with pytest.raises(ValueError, match=r"exit_loops has shape \(8,\); it must be \(1, 8\)"):
        kv_cache_bytes(mythos_tiny(), 1, 8, 2, exit_loops=torch.ones(8))
    with pytest.raises(ValueError, match=r"exit_loops holds 3; it must be from 1 to n_loops \(2\)"):
        kv_cache_bytes(mythos_tiny(), 1, 1, 2, exit_loops=torch.tensor([[3]]))
