"""What a model costs, from its config alone: parameters, and the matrix-product FLOPs of one token.

Main entries: `parameter_counts`, `forward_flops`. Only matrix products of tokens are counted, two FLOPs per
multiplication and addition; norms, activations and rotations are a few per cent on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from open_mythos.config import MythosConfig

_LOOP_EMBEDDING_DECAYS = 5


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by stage; `prelude` and `coda` include the norm that ends them."""

    embedding: int
    prelude: int
    recurrent: int
    coda: int
    head: int
    """0 where the head is the embedding's transpose."""
    idle_experts: int
    """Those in `recurrent` that a single token does not use: the routed experts it is not sent to."""

    @property
    def total(self) -> int:
        return self.embedding + self.prelude + self.recurrent + self.coda + self.head

    @property
    def active(self) -> int:
        """Parameters that take part in one token's forward pass, however many loops it runs."""
        return self.total - self.idle_experts


@dataclass(frozen=True)
class ForwardFlops:
    """Matrix-product FLOPs of one token's forward pass, averaged over the positions of a sequence."""

    prelude: float
    loop: float
    """One loop of the recurrent block; every loop costs the same."""
    coda: float
    head: float

    def total(self, n_loops: float) -> float:
        """The whole pass when a token runs `n_loops` loops; a mean exit loop serves as well."""
        return self.prelude + n_loops * self.loop + self.coda + self.head


def parameter_counts(config: MythosConfig) -> ParameterCounts:
    """Parameters of `OpenMythos(config)`, without building it."""
    outer = _block_matrices(config, moe=False) + _block_vectors(config)
    inner = _block_matrices(config, moe=config.n_experts > 0) + _block_vectors(config)
    idle = config.n_experts - config.n_experts_per_tok if config.n_experts else 0
    return ParameterCounts(
        embedding=config.vocab_size * config.dim,
        prelude=config.prelude_layers * outer + config.dim,
        recurrent=config.recurrent_layers * inner + _loop_parameters(config),
        coda=config.coda_layers * outer + config.dim,
        head=0 if config.tie_embeddings else config.vocab_size * config.dim,
        idle_experts=config.recurrent_layers * idle * 3 * config.dim * config.expert_dim,
    )


def buffer_bytes(config: MythosConfig, itemsize: int) -> int:
    """Bytes of the model's buffers: the routers' biases, always float32, and the loop embedding's decays."""
    biases = config.recurrent_layers * config.n_experts * 4
    return biases + _LOOP_EMBEDDING_DECAYS * config.loop_embedding * itemsize


def forward_flops(config: MythosConfig, seq_len: int) -> ForwardFlops:
    """FLOPs per token of a forward pass over `seq_len` tokens without a cache.

    Of the experts, those that a token is sent to are counted; of attention's (query, key) pairs, those that the causal
    mask and the window let through. A kernel that also computes what it masks does more, at most twice for causal ones.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
    adapter = 2 * config.dim * config.lora_rank
    halting = config.dim if config.halting == "act" else 0
    outer = 2 * _block_matrices(config, moe=False) + _attention_flops(config, seq_len, config.outer_reach)
    inner = 2 * _active_matrices(config) + _attention_flops(config, seq_len, config.loop_reach)
    return ForwardFlops(
        prelude=config.prelude_layers * outer,
        loop=config.recurrent_layers * inner + 2 * (adapter + halting),
        coda=config.coda_layers * outer,
        head=2 * config.vocab_size * config.dim,
    )


def visible_pairs(seq_len: int, window: int | None) -> int:
    """(query, key) pairs of a sequence under a causal mask, each query seeing at most `window` keys."""
    reach = seq_len if window is None else min(window, seq_len)
    return reach * (reach + 1) // 2 + (seq_len - reach) * reach


def pair_flops(config: MythosConfig) -> int:
    """FLOPs that one (query, key) pair costs in all heads of one layer: a score, and a share of the output.

    MLA compares queries and keys per head or in the latent space, whichever is narrower.
    """
    if config.attn_type == "gqa":
        return 4 * config.dim
    rebuilt = config.qk_nope_head_dim + config.v_head_dim
    return 2 * config.n_heads * (config.qk_rope_head_dim + min(rebuilt, 2 * config.kv_lora_rank))


def _attention_flops(config: MythosConfig, seq_len: int, window: int | None) -> float:
    return pair_flops(config) * visible_pairs(seq_len, window) / seq_len


def _attention_matrices(config: MythosConfig) -> int:
    c = config
    if c.attn_type == "gqa":
        return c.dim * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim + c.dim * c.dim
    queries = c.q_lora_rank * (c.dim + c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim))
    latents = c.dim * (c.kv_lora_rank + c.qk_rope_head_dim)
    keys_and_values = c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return queries + latents + keys_and_values + c.n_heads * c.v_head_dim * c.dim


def _feed_forward_matrices(config: MythosConfig, *, moe: bool, experts: int) -> int:
    """Of the dense layer, or of the router, `experts` routed experts and the shared ones."""
    if not moe:
        return 3 * config.dim * config.ffn_hidden
    return config.dim * config.n_experts + 3 * config.dim * (experts * config.expert_dim + config.shared_dim)


def _block_matrices(config: MythosConfig, *, moe: bool) -> int:
    return _attention_matrices(config) + _feed_forward_matrices(config, moe=moe, experts=config.n_experts)


def _active_matrices(config: MythosConfig) -> int:
    """The part of a recurrent layer's matrices that one token is multiplied with."""
    ffn = _feed_forward_matrices(config, moe=config.n_experts > 0, experts=config.n_experts_per_tok)
    return _attention_matrices(config) + ffn


def _block_vectors(config: MythosConfig) -> int:
    """Gains of the norms, and the sinks."""
    sinks = config.n_heads if config.attention_sink else 0
    if config.attn_type == "mla":
        gains = config.q_lora_rank + config.kv_lora_rank
    else:
        gains = (config.n_heads + config.n_kv_heads) * config.head_dim if config.qk_norm else 0
    return 2 * config.dim + gains + sinks


def _loop_parameters(config: MythosConfig) -> int:
    """What the recurrent block holds beside its layers: injection, adapter, loop embedding, halting."""
    injection = 3 * config.dim
    adapter = (2 * config.dim + 3) * config.lora_rank
    embedding = _LOOP_EMBEDDING_DECAYS * config.dim if config.loop_embedding else 0
    halting = config.dim + 1 if config.halting == "act" else 0
    return injection + adapter + embedding + halting
