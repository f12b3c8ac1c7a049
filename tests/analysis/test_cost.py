"""Counts from the config equal what the real model has and does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from open_mythos.config import MythosConfig
from open_mythos.model.cost import forward_flops, pair_flops, parameter_counts, visible_pairs
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_small, mythos_tiny

CONFIGS = st.builds(
    MythosConfig,
    vocab_size=st.integers(1, 40),
    dim=st.sampled_from([16, 32]),
    prelude_layers=st.integers(0, 2),
    recurrent_layers=st.integers(1, 2),
    coda_layers=st.integers(0, 2),
    ffn_dim=st.sampled_from([None, 24]),
    tie_embeddings=st.booleans(),
    attn_type=st.sampled_from(["gqa", "mla"]),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    qk_norm=st.booleans(),
    attention_sink=st.booleans(),
    kv_lora_rank=st.sampled_from([3, 8]),
    q_lora_rank=st.sampled_from([5, 8]),
    v_head_dim=st.sampled_from([4, 6]),
    n_experts=st.sampled_from([0, 2, 8]),
    n_shared_experts=st.integers(0, 2),
    expert_dim=st.sampled_from([8, 12]),
    lora_rank=st.integers(0, 3),
    loop_embedding=st.booleans(),
    halting=st.sampled_from(["act", "none"]),
)


def stage_counts(model: OpenMythos) -> dict[str, int]:
    stages = {"embed": "embedding", "prelude": "prelude", "prelude_norm": "prelude", "norm": "coda"}
    counts = dict.fromkeys(("embedding", "prelude", "recurrent", "coda", "head"), 0)
    for name, parameter in model.named_parameters():
        top = name.split(".")[0]
        counts[stages.get(top, top)] += parameter.numel()
    return counts


@settings(max_examples=25, deadline=None)
@given(config=CONFIGS)
def test_every_stages_parameters_are_counted(config: MythosConfig) -> None:
    with torch.device("meta"):
        model = OpenMythos(config)
    counts = parameter_counts(config)
    assert {stage: getattr(counts, stage) for stage in stage_counts(model)} == stage_counts(model)


def test_active_parameters_leave_out_the_experts_a_token_is_not_sent_to() -> None:
    config = mythos_small()
    counts = parameter_counts(config)
    assert counts.total - counts.active == (16 - 2) * 3 * 384 * 256
    dense = parameter_counts(config.replace(n_experts=0))
    assert dense.active == dense.total


@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
def test_visible_pairs_are_those_of_the_mask(window: int | None) -> None:
    model = OpenMythos(MythosConfig(window=window))
    bias = model.context(7).mask(window).bias
    assert bias is not None
    assert visible_pairs(7, window) == int((bias == 0).sum())


BASE = mythos_tiny().replace(window=None, outer_window=None, loop_embedding=False)
VARIANTS = {
    "gqa-moe": BASE,
    "mla-rebuilt": BASE.replace(attn_type="mla", kv_lora_rank=24),
    "mla-latent": BASE.replace(attn_type="mla", kv_lora_rank=8),
    "dense": BASE.replace(n_experts=0, lora_rank=0, tie_embeddings=False, halting="none"),
}


def grouped_flops(rows: tuple[int, int], weights: tuple[int, int, int], *_: object, **__: object) -> int:
    """Of a grouped matrix product, which the counter does not know: every row meets one group's matrix."""
    return 2 * rows[0] * rows[1] * weights[2]


def measured_flops(model: OpenMythos, seq_len: int, n_loops: int) -> int:
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})
    with torch.no_grad(), counter:
        model(torch.zeros(2, seq_len, dtype=torch.long), n_loops)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("seq_len", [4, 16])
def test_flops_equal_torchs_counter(config: MythosConfig, seq_len: int) -> None:
    """Exactly; short sequences use the kernel that also computes masked pairs, so those are added to compare."""
    model = OpenMythos(config.replace(attention_sink=False)).eval()
    flops = forward_flops(config, seq_len)
    layers = config.prelude_layers + config.coda_layers
    masked = pair_flops(config) * (seq_len**2 - visible_pairs(seq_len, None)) / seq_len
    for n_loops in (1, 3):
        expected = flops.total(n_loops) + masked * (layers + n_loops * config.recurrent_layers)
        assert measured_flops(model, seq_len, n_loops) == pytest.approx(2 * seq_len * expected, rel=1e-9)


def test_flops_grow_by_one_loop_per_loop() -> None:
    flops = forward_flops(mythos_tiny(), 32)
    assert flops.total(9) - flops.total(8) == pytest.approx(flops.loop)


def test_a_window_bounds_what_attention_costs() -> None:
    config = mythos_tiny().replace(window=8)
    assert forward_flops(config, 10_000).loop <= forward_flops(config, 100).loop * 1.01
    with pytest.raises(ValueError, match="seq_len is 0; it must be at least 1"):
        forward_flops(config, 0)
