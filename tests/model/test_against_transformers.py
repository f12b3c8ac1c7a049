"""Equal weights, equal numbers: our layers against those of `transformers` with copied weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, LlamaConfig, Qwen3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from open_mythos.model.attention import GQAttention
from open_mythos.model.experts import MoEFFN
from open_mythos.model.feed_forward import SwiGLU
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.norm import RMSNorm
from tiny import tiny_config

ATTENTION = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attn_implementation": "eager",
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10, "v_head_dim": 5}


def _randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))
    return module.eval()


def _causal(seq: int) -> Tensor:
    return torch.full((1, 1, seq, seq), float("-inf")).triu(1)


def _assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert float(theirs.detach().abs().max()) > 0.1, "the comparison would hold for zeros"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seq", [9, 60])
@pytest.mark.parametrize("peer", ["llama", "qwen3"])
@torch.no_grad()
def test_gqa_equals_llama_and_with_qk_norm_qwen3(peer: str, seq: int) -> None:
    if peer == "llama":
        config = LlamaConfig(**ATTENTION, rms_norm_eps=1e-6)
        theirs, rotary = llama.LlamaAttention(config, 0), llama.LlamaRotaryEmbedding(config)
    else:
        config = Qwen3Config(**ATTENTION, rms_norm_eps=1e-6)
        theirs, rotary = qwen3.Qwen3Attention(config, 0), qwen3.Qwen3RotaryEmbedding(config)
    _randomised(theirs)
    ours = GQAttention(tiny_config(dim=32, n_heads=4, n_kv_heads=2, qk_norm=peer == "qwen3", attention_sink=False))
    ours.qkv.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
    ours.out.weight.copy_(theirs.o_proj.weight)
    if peer == "qwen3":
        ours.qk_gain.copy_(torch.cat([theirs.q_norm.weight.expand(4, 8), theirs.k_norm.weight.expand(2, 8)]))
    x = torch.randn(2, seq, 32)
    positions = rotary(x, torch.arange(seq).unsqueeze(0))
    expected, _ = theirs(x, position_embeddings=positions, attention_mask=_causal(seq))
    _assert_equal(ours(x), expected)


def _half_rotation(rows: Tensor) -> Tensor:
    """Reorder interleaved rotary channels (x0, x1), (x2, x3), ... to our layout, first halves of all pairs first."""
    return torch.cat([rows[..., 0::2, :], rows[..., 1::2, :]], -2)


@pytest.mark.parametrize("absorbing", [True, False], ids=["absorbed", "rebuilt"])
@pytest.mark.parametrize("interleave", [True, False], ids=["interleaved", "half rotation"])
@pytest.mark.parametrize("seq", [9, 60])
@torch.no_grad()
def test_mla_equals_deepseek_v3(seq: int, interleave: bool, absorbing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_interleave=interleave,
        attn_implementation="eager",
        **LATENT,
    )
    theirs = _randomised(deepseek.DeepseekV3Attention(config, 0))
    ours = MLAttention(tiny_config("mla", dim=32, n_heads=4, attention_sink=False, **LATENT))
    monkeypatch.setattr(ours, "_absorbing_is_cheaper", lambda mask: absorbing)
    reorder = _half_rotation if interleave else lambda rows: rows
    q_nope, q_rope = theirs.q_b_proj.weight.unflatten(0, (4, 16)).split([10, 6], 1)
    latent, k_rope = theirs.kv_a_proj_with_mqa.weight.split([8, 6])
    ours.q_up.weight.copy_(torch.cat([q_nope, reorder(q_rope)], 1).flatten(0, 1))
    ours.down.weight.copy_(torch.cat([theirs.q_a_proj.weight, latent, reorder(k_rope)]))
    ours.q_norm.weight.copy_(theirs.q_a_layernorm.weight)
    ours.kv_norm.weight.copy_(theirs.kv_a_layernorm.weight)
    ours.kv_up.weight.copy_(theirs.kv_b_proj.weight)
    ours.out.weight.copy_(theirs.o_proj.weight)
    x = torch.randn(2, seq, 32)
    positions = deepseek.DeepseekV3RotaryEmbedding(config)(x, torch.arange(seq).unsqueeze(0))
    expected, _ = theirs(x, position_embeddings=positions, attention_mask=_causal(seq))
    _assert_equal(ours(x), expected)


@pytest.mark.parametrize(("n_experts", "top_k", "n_shared"), [(4, 2, 1), (8, 3, 2)])
@torch.no_grad()
def test_moe_equals_deepseek_v3(n_experts: int, top_k: int, n_shared: int) -> None:
    ours = MoEFFN(
        tiny_config(
            dim=32,
            n_experts=n_experts,
            n_experts_per_tok=top_k,
            n_shared_experts=n_shared,
            expert_dim=12,
            router_score="sigmoid",
            routed_scale=2.5,
        )
    )
    config = DeepseekV3Config(
        hidden_size=32,
        moe_intermediate_size=12,
        n_routed_experts=n_experts,
        num_experts_per_tok=top_k,
        n_shared_experts=n_shared,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    theirs = _randomised(deepseek.DeepseekV3MoE(config))
    gate, up = theirs.experts.gate_up_proj.chunk(2, 1)
    ours.router.weight.copy_(theirs.gate.weight)
    ours.gate.copy_(gate)
    ours.up.copy_(up)
    ours.down.copy_(theirs.experts.down_proj.transpose(1, 2))
    ours.shared.gate.weight.copy_(theirs.shared_experts.gate_proj.weight)
    ours.shared.up.weight.copy_(theirs.shared_experts.up_proj.weight)
    ours.shared.down.weight.copy_(theirs.shared_experts.down_proj.weight)
    x = torch.randn(3, 11, 32)
    _assert_equal(ours(x), theirs(x))


@torch.no_grad()
def test_swiglu_and_rms_norm_equal_llama() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    their_mlp = _randomised(llama.LlamaMLP(config))
    their_norm = _randomised(llama.LlamaRMSNorm(16, 1e-6))
    mlp, norm = SwiGLU(16, 24), RMSNorm(16, 1e-6)
    mlp.gate.weight.copy_(their_mlp.gate_proj.weight)
    mlp.up.weight.copy_(their_mlp.up_proj.weight)
    mlp.down.weight.copy_(their_mlp.down_proj.weight)
    norm.weight.copy_(their_norm.weight)
    x = torch.randn(3, 5, 16)
    _assert_equal(mlp(x), their_mlp(x))
    _assert_equal(norm(x), their_norm(x))
