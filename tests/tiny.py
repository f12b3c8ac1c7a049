"""Configs and models small enough for a test of milliseconds, with weights far from their initial values.

Main entries: `tiny_config`, `tiny_model`, `Doubled`, `random_ids`. Initial weights would hide mistakes: gains are 1
there, sinks and router biases 0, adapters silent, and every position halts at the same loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.mythos import OpenMythos


def tiny_config(attn_type: str = "gqa", **changes: Any) -> MythosConfig:
    """Everything that can be switched on is, and no field is left to be derived, unless `changes` says otherwise."""
    sizes = {
        "vocab_size": 17,
        "dim": 16,
        "max_seq_len": 64,
        "max_loop_iters": 4,
        "ffn_dim": 24,
        "n_heads": 4,
        "n_kv_heads": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 5,
        "window": None,
        "outer_window": None,
        "rope_theta": 10_000.0,
        "update_scale": 1.5,
        "n_experts": 4,
        "n_experts_per_tok": 2,
        "expert_dim": 8,
        "lora_rank": 2,
        "loop_embedding": True,
        "deeper_rate": 0,
    }
    return MythosConfig(attn_type=attn_type, **{**sizes, **changes})


def tiny_model(config: MythosConfig, seed: int = 0) -> OpenMythos:
    """A model in evaluation mode whose positions halt at different loops."""
    torch.manual_seed(seed)
    model = OpenMythos(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.15)
        if model.recurrent.act is not None:
            model.recurrent.act.halt.weight.copy_(torch.randn(1, config.dim) * 3 * config.dim**-0.5)
            model.recurrent.act.halt.bias.fill_(-0.5)
    return model


class Doubled(OpenMythos):
    """A model that changes what its parts compute."""

    def encode(self, ids: Tensor, context: Any = None) -> Tensor:
        return 2 * super().encode(ids, context)


def random_ids(config: MythosConfig, batch: int, seq: int, seed: int = 1) -> Tensor:
    """Token ids (batch, seq)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, seq), generator=generator)
