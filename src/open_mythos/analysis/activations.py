"""How many numbers autograd keeps for the backward pass, estimated from the config.

Main entry: `saved_activations`. Counted by reading which operands each operation's backward needs, with an attention
kernel that does not store its weights. Against the storages that saved-tensor hooks see in float32 on a CPU, it came
within 4% for GQA and MLA, dense and MoE, from 64 tokens on; tests/analysis/test_memory_plan.py holds it to 10%.
Compiled layers, which take the place of PyTorch's on a CPU, keep half to two thirds of that (also held). Without them,
under 48 tokens the CPU uses a kernel that stores `n_heads * seq_len` weights per token, which are not counted. Dropout
keeps a factor for each number that it acts on, as a CPU does; accelerators keep a byte.
"""

from __future__ import annotations

from open_mythos.config import MythosConfig


def saved_activations(config: MythosConfig, n_loops: int, *, checkpoint_loops: bool = False) -> int:
    """Numbers per token that the loss keeps until its backward pass; times the dtype's bytes that is memory.

    With `checkpoint_loops`, every loop keeps its state and one loop at a time is computed again.
    """
    ends = (config.prelude_layers + config.coda_layers) * _layer(config, moe=False) + _embedding_and_head(config)
    loop = config.recurrent_layers * _layer(config, moe=config.n_experts > 0) + _loop_extras(config)
    return ends + (n_loops * config.dim + loop if checkpoint_loops else n_loops * loop)


def _embedding_and_head(config: MythosConfig) -> int:
    """Two norms with input and output, the first state, and the loss's log-probabilities."""
    return 5 * config.dim + config.vocab_size


def _layer(config: MythosConfig, *, moe: bool) -> int:
    """The stream at both norms, their outputs, what attention and feed-forward keep, and what of them is dropped."""
    feed_forward = _experts(config) if moe else 4 * config.ffn_hidden
    dropped = 2 * config.dim if config.dropout else 0
    return 4 * config.dim + _attention(config) + feed_forward + dropped


def _attention(config: MythosConfig) -> int:
    """Queries, keys, values and outputs, and what was projected or normalised on the way to them."""
    c = config
    if c.attn_type == "gqa":
        kv_width = c.n_kv_heads * c.head_dim
        normalised = 2 * c.dim + 3 * kv_width if c.qk_norm else 0
        return normalised + 2 * c.dim + 2 * kv_width
    head = max(c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim)  # the kernel pads values to the keys' width
    latents = 2 * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim)
    return latents + c.n_heads * (4 * head + c.v_head_dim)


def _experts(config: MythosConfig) -> int:
    """Gate, up, their product and its parts, for the experts that compute a token; the shared ones as a dense layer."""
    k, shared = config.n_experts_per_tok, 4 * config.shared_dim
    if config.n_experts <= 2 * k:  # few experts all compute every token
        return 5 * config.n_experts * config.expert_dim + shared
    return k * (2 * config.dim + 5 * config.expert_dim) + config.n_experts + shared


def _loop_extras(config: MythosConfig) -> int:
    """The state at the injection, and the depth adapter's operands."""
    return config.dim + (config.dim + 2 * config.lora_rank if config.lora_rank else 0)
