"""Named sizes, each a function that returns a `MythosConfig`.

Main entries: `preset` and `PRESETS`. The number in a large preset's name is its total parameter count, met within 2%.
The large ones follow DeepSeek-V3's proportions (arXiv 2412.19437): MLA, and many experts narrower than `dim`. They are
untrained: the sizes are set, the recipes are not.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Literal

from open_mythos.config import MythosConfig


def mythos_tiny() -> MythosConfig:
    """0.15M parameters with every part in place; a forward takes milliseconds, so tests use it."""
    return MythosConfig(
        vocab_size=256,
        dim=64,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=128,
        max_loop_iters=4,
        n_experts=8,
        n_experts_per_tok=2,
        expert_dim=32,
        lora_rank=4,
        loop_embedding=True,
    )


def mythos_tutorial_gqa() -> MythosConfig:
    """The published tutorial's GQA model."""
    return _tutorial(attn_type="gqa", n_kv_heads=2)


def mythos_tutorial_mla() -> MythosConfig:
    """The published tutorial's MLA model."""
    return _tutorial(
        attn_type="mla",
        n_kv_heads=4,
        kv_lora_rank=32,
        q_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )


def _tutorial(**attention: Any) -> MythosConfig:
    return MythosConfig(
        vocab_size=256,
        dim=128,
        n_heads=4,
        max_seq_len=128,
        max_loop_iters=8,
        prelude_layers=1,
        coda_layers=1,
        n_experts=4,
        n_shared_experts=1,
        n_experts_per_tok=2,
        expert_dim=64,
        lora_rank=8,
        **attention,
    )


def mythos_small(attn_type: Literal["gqa", "mla"] = "gqa") -> MythosConfig:
    """About 11M parameters: the size that speed is measured at."""
    return MythosConfig(
        vocab_size=4096,
        dim=384,
        n_heads=6,
        n_kv_heads=2,
        max_seq_len=1024,
        prelude_layers=2,
        coda_layers=2,
        attn_type=attn_type,
        kv_lora_rank=128,
        q_lora_rank=192,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_experts=16,
        n_shared_experts=1,
        n_experts_per_tok=2,
        expert_dim=256,
        lora_rank=8,
    )


def mythos_small_mla() -> MythosConfig:
    """`mythos_small` with MLA."""
    return mythos_small("mla")


def mythos_1b() -> MythosConfig:
    """1B parameters, 4k context, 16 loops."""
    return _large(
        dim=2048,
        n_heads=16,
        ffn_dim=3072,
        kv_lora_rank=256,
        q_lora_rank=512,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_experts=64,
        n_experts_per_tok=4,
        expert_dim=512,
        lora_rank=8,
        max_loop_iters=16,
        max_seq_len=4096,
    )


def mythos_3b() -> MythosConfig:
    """3B parameters, 4k context, 16 loops."""
    return _large(
        dim=3072,
        n_heads=24,
        ffn_dim=8448,
        kv_lora_rank=384,
        q_lora_rank=768,
        qk_rope_head_dim=32,
        qk_nope_head_dim=96,
        v_head_dim=96,
        n_experts=64,
        n_experts_per_tok=4,
        expert_dim=1024,
        lora_rank=8,
        max_loop_iters=16,
        max_seq_len=4096,
    )


def mythos_10b() -> MythosConfig:
    """10B parameters, 8k context, 24 loops."""
    return _large(
        dim=4096,
        n_heads=32,
        ffn_dim=11264,
        kv_lora_rank=512,
        q_lora_rank=1024,
        n_experts=128,
        expert_dim=1408,
        lora_rank=16,
        max_loop_iters=24,
        max_seq_len=8192,
    )


def mythos_50b() -> MythosConfig:
    """50B parameters, 8k context, 32 loops."""
    return _large(
        dim=6144,
        n_heads=48,
        prelude_layers=3,
        coda_layers=3,
        ffn_dim=16384,
        kv_lora_rank=512,
        q_lora_rank=1536,
        n_experts=256,
        expert_dim=2496,
        lora_rank=32,
        max_loop_iters=32,
        max_seq_len=8192,
    )


def mythos_100b() -> MythosConfig:
    """100B parameters, 1M context, 32 loops, 128k tokens of output."""
    return _large(
        dim=8192,
        n_heads=64,
        prelude_layers=4,
        coda_layers=4,
        ffn_dim=22528,
        kv_lora_rank=512,
        q_lora_rank=2048,
        n_experts=256,
        expert_dim=3712,
        lora_rank=64,
        max_loop_iters=32,
        max_seq_len=1_000_000,
        rope_theta=1_000_000.0,
        max_output_tokens=131_072,
    )


def mythos_500b() -> MythosConfig:
    """500B parameters, 1M context, 48 loops, 128k tokens of output."""
    return _large(
        vocab_size=100_352,
        dim=12288,
        n_heads=96,
        prelude_layers=4,
        coda_layers=4,
        ffn_dim=33792,
        kv_lora_rank=1024,
        q_lora_rank=3072,
        n_experts=512,
        expert_dim=6400,
        lora_rank=128,
        max_loop_iters=48,
        max_seq_len=1_000_000,
        rope_theta=1_000_000.0,
        max_output_tokens=131_072,
    )


def mythos_1t() -> MythosConfig:
    """1T parameters, 1M context, 64 loops, 128k tokens of output."""
    return _large(
        vocab_size=100_352,
        dim=16384,
        n_heads=128,
        prelude_layers=6,
        recurrent_layers=6,
        coda_layers=6,
        ffn_dim=45056,
        kv_lora_rank=1024,
        q_lora_rank=4096,
        n_experts=512,
        expert_dim=6336,
        lora_rank=256,
        max_loop_iters=64,
        max_seq_len=1_000_000,
        rope_theta=2_000_000.0,
        max_output_tokens=131_072,
    )


def _large(**sizes: Any) -> MythosConfig:
    """What the large presets share; `sizes` adds to it and overrides it."""
    shared: dict[str, Any] = {
        "vocab_size": 32_000,
        "prelude_layers": 2,
        "recurrent_layers": 4,
        "coda_layers": 2,
        "attn_type": "mla",
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_shared_experts": 1,
        "n_experts_per_tok": 8,
        "rope_theta": 500_000.0,
        "window": None,
        "outer_window": None,
    }
    return MythosConfig(**{**shared, **sizes})


PRESETS: dict[str, Callable[[], MythosConfig]] = {
    function.__name__: function
    for function in (
        mythos_tiny,
        mythos_tutorial_gqa,
        mythos_tutorial_mla,
        mythos_small,
        mythos_small_mla,
        mythos_1b,
        mythos_3b,
        mythos_10b,
        mythos_50b,
        mythos_100b,
        mythos_500b,
        mythos_1t,
    )
}


def preset(name: str) -> MythosConfig:
    """The config of the preset called `name`; another name raises `ValueError` with the closest ones."""
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]()
