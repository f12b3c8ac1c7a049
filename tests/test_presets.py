"""The named sizes are what their names say."""

import pytest
import torch

from open_mythos.config import MythosConfig
from open_mythos.model.cost import buffer_bytes, parameter_counts
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import PRESETS, mythos_tutorial_gqa, mythos_tutorial_mla, preset

PROMISED = {
    "mythos_1b": 1e9,
    "mythos_3b": 3e9,
    "mythos_10b": 10e9,
    "mythos_50b": 50e9,
    "mythos_100b": 100e9,
    "mythos_500b": 500e9,
    "mythos_1t": 1e12,
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_built_model_has_the_counted_parameters_and_those_the_name_promises(name: str) -> None:
    """On the meta device, where even 1T parameters take milliseconds and no memory."""
    config = preset(name)
    with torch.device("meta"):
        model = OpenMythos(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == parameter_counts(config).total
    assert sum(buffer.nbytes for buffer in model.buffers()) == buffer_bytes(config, 4)
    if name in PROMISED:
        assert total == pytest.approx(PROMISED[name], rel=0.02)


@pytest.mark.parametrize("name", PROMISED)
def test_large_presets_have_round_sizes_and_fine_grained_experts(name: str) -> None:
    config = preset(name)
    assert config.attn_type == "mla"
    assert config.expert_dim < config.dim
    assert 64 <= config.n_experts <= 512
    assert all(size % 64 == 0 for size in (config.dim, config.expert_dim, config.ffn_hidden, config.vocab_size))


def test_tutorial_presets_are_the_tutorials_configs() -> None:
    """The values of make_config in the published tutorial."""
    shared = {
        "vocab_size": 256,
        "dim": 128,
        "n_heads": 4,
        "max_seq_len": 128,
        "max_loop_iters": 8,
        "prelude_layers": 1,
        "coda_layers": 1,
        "n_experts": 4,
        "n_shared_experts": 1,
        "n_experts_per_tok": 2,
        "expert_dim": 64,
        "lora_rank": 8,
    }
    latent = {
        "kv_lora_rank": 32,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
    assert mythos_tutorial_gqa() == MythosConfig(**shared, attn_type="gqa", n_kv_heads=2)
    assert mythos_tutorial_mla() == MythosConfig(**shared, attn_type="mla", n_kv_heads=4, **latent)


def test_an_unknown_name_is_answered_with_the_closest_ones() -> None:
    with pytest.raises(ValueError, match=r"preset is 'mythos-smal'.*did you mean mythos_small"):
        preset("mythos-smal")
    with pytest.raises(ValueError, match=r"preset is 'gpt'; it must be one of mythos_tiny"):
        preset("gpt")
