"""The config checks itself, and survives being written and read."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos import MythosConfig
from tiny import tiny_config

# The field that must be named, the fields that are wrong together, and what of the accepted values must be said.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("n_heads", {"dim": 16, "n_heads": 3}, "divisor of dim (16)"),
    ("n_kv_heads", {"n_heads": 4, "n_kv_heads": 3}, "divisor of n_heads (4)"),
    ("n_kv_heads", {"n_kv_heads": 0}, "at least 1"),
    ("n_heads", {"dim": 12, "n_heads": 4, "n_kv_heads": 2}, "even"),
    ("qk_rope_head_dim", {"attn_type": "mla", "qk_rope_head_dim": 5}, "even"),
    ("kv_lora_rank", {"attn_type": "mla", "kv_lora_rank": 0}, "at least 1"),
    ("v_head_dim", {"attn_type": "mla", "v_head_dim": -1}, "at least 1"),
    ("n_experts_per_tok", {"n_experts": 4, "n_experts_per_tok": 5}, "from 1 to n_experts (4)"),
    ("n_experts_per_tok", {"n_experts": 4, "n_experts_per_tok": 0}, "from 1 to n_experts (4)"),
    ("expert_dim", {"n_experts": 4, "expert_dim": 0}, "at least 1"),
    ("n_experts", {"n_experts": -1}, "at least 0"),
    ("vocab_size", {"vocab_size": 0}, "at least 1"),
    ("dim", {"dim": -4}, "at least 1"),
    ("dim", {"dim": 16.0}, "an integer"),
    ("dim", {"dim": "16"}, "an integer"),
    ("dim", {"dim": True}, "an integer"),
    ("dim", {"dim": None}, "an integer"),
    ("max_seq_len", {"max_seq_len": 0}, "at least 1"),
    ("max_loop_iters", {"max_loop_iters": 0}, "at least 1"),
    ("max_output_tokens", {"max_output_tokens": 0}, "at least 1"),
    ("prelude_layers", {"prelude_layers": -1}, "at least 0"),
    ("recurrent_layers", {"recurrent_layers": 0}, "at least 1"),
    ("coda_layers", {"coda_layers": -2}, "at least 0"),
    ("window", {"window": "all"}, "integer"),
    ("update_scale", {"update_scale": 0}, "None or"),
    ("ffn_dim", {"ffn_dim": 0}, "None or"),
    ("window", {"window": 0}, "None or"),
    ("outer_window", {"outer_window": -3}, "None or"),
    ("window", {"window": 2.5}, "integer"),
    ("attn_type", {"attn_type": "mha"}, "'gqa', 'mla'"),
    ("router_score", {"router_score": "relu"}, "'softmax', 'sigmoid'"),
    ("state_init", {"state_init": "ones"}, "'input', 'zeros', 'noise'"),
    ("halting", {"halting": True}, "'act', 'settled', 'none'"),
    ("act_threshold", {"act_threshold": 0}, "(0, 1]"),
    ("act_threshold", {"act_threshold": 1.5}, "(0, 1]"),
    ("settle_tolerance", {"settle_tolerance": 0.0}, "above 0"),
    ("deeper_rate", {"deeper_rate": 1.0}, "[0, 1)"),
    ("deeper_rate", {"deeper_rate": -0.1}, "[0, 1)"),
    ("dropout", {"dropout": 1.0}, "[0, 1)"),
    ("dropout", {"dropout": -0.1}, "[0, 1)"),
    ("dropout", {"dropout": "0.1"}, "number"),
    ("norm_eps", {"norm_eps": 0.0}, "above 0"),
    ("rope_theta", {"rope_theta": -1.0}, "above 0"),
    ("balance_rate", {"balance_rate": -0.1}, "at least 0"),
    ("lora_rank", {"lora_rank": -1}, "at least 0"),
    ("qk_norm", {"qk_norm": 1}, "True or False"),
    ("use_rope", {"use_rope": "yes"}, "True or False"),
]


@pytest.mark.parametrize(("field", "changes", "accepted"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named_with_its_value_and_what_is_accepted(
    field: str, changes: dict[str, Any], accepted: str
) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        tiny_config(**changes)
    message = str(caught.value)
    assert message.startswith(f"{field} is {changes.get(field, 4)!r}")
    assert accepted in message


@pytest.mark.parametrize(
    "field", ["routed_scale", "rope_theta", "norm_eps", "balance_rate", "act_threshold", "dropout"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(field: str, value: float) -> None:
    """JSON has no infinity, and a model with one anywhere computes NaN."""
    with pytest.raises(ValueError, match=field):
        tiny_config(**{field: value})


def test_mla_ignores_the_fields_of_gqa() -> None:
    """Its heads have widths of their own: dim need not divide by n_heads."""
    tiny_config("mla", dim=18, n_heads=5, n_kv_heads=7)


def test_without_rotary_positions_head_widths_may_be_odd() -> None:
    assert tiny_config(dim=12, n_heads=4, use_rope=False).head_dim == 3


@given(
    attn_type=st.sampled_from(["gqa", "mla"]),
    dim=st.integers(1, 8).map(lambda n: 8 * n),
    window=st.none() | st.integers(1, 9) | st.just("auto"),
    n_experts=st.integers(2, 9),
    dropout=st.floats(0, 0.99),
    threshold=st.floats(0.01, 1),
    tie=st.booleans(),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_from_dict_inverts_to_dict_through_json(
    attn_type: str, dim: int, window: int | str | None, n_experts: int, dropout: float, threshold: float, tie: bool
) -> None:
    config = tiny_config(
        attn_type,
        dim=dim,
        window=window,
        n_experts=n_experts,
        dropout=dropout,
        act_threshold=threshold,
        tie_embeddings=tie,
    )
    assert MythosConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_keys_take_their_defaults() -> None:
    """So that a config written before a field existed still loads."""
    assert MythosConfig.from_dict({"dim": 64}) == MythosConfig(dim=64)


def test_unknown_keys_are_named() -> None:
    with pytest.raises(ValueError, match=r"n_layers.*accepted.*prelude_layers"):
        MythosConfig.from_dict({**MythosConfig().to_dict(), "n_layers": 3})
    with pytest.raises(TypeError, match="n_layers"):
        MythosConfig(n_layers=3)


@pytest.mark.parametrize("version", [2, 99, "1", None, 1.5])
def test_a_newer_or_senseless_format_is_refused(version: object) -> None:
    with pytest.raises(ValueError, match="format_version"):
        MythosConfig.from_dict({**MythosConfig().to_dict(), "format_version": version})


def test_another_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model_type is 'llama'; it must be 'open_mythos'"):
        MythosConfig.from_dict({"model_type": "llama"})


def test_a_config_is_frozen_keyword_only_and_replaced_with_checks() -> None:
    config = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 32
    with pytest.raises(TypeError):
        MythosConfig(256)
    assert config.replace(window=3).window == 3
    assert config.window is None
    with pytest.raises(ValueError, match="n_heads"):
        config.replace(n_heads=3)


def test_the_tutorial_fields_are_accepted() -> None:
    """DESIGN section 3: these names are public and stay."""
    MythosConfig(
        vocab_size=64,
        dim=64,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=28,
        max_loop_iters=16,
        prelude_layers=1,
        coda_layers=1,
        attn_type="mla",
        kv_lora_rank=32,
        q_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_experts=4,
        n_shared_experts=1,
        n_experts_per_tok=2,
        expert_dim=32,
        act_threshold=0.99,
        rope_theta=10_000.0,
        lora_rank=4,
        max_output_tokens=128,
        dropout=0.0,
    )
