"""The architecture of one model as a frozen, self-checking dataclass.

Main entry: `MythosConfig`. Derived sizes are properties; nothing is mutated after construction.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from math import isfinite, prod
from typing import Any, Literal

MODEL_TYPE = "open_mythos"
FORMAT_VERSION = 1
_FOLDER_KEYS = {"model_type", "format_version"}


@dataclass(frozen=True, kw_only=True)
class MythosConfig:
    """Sizes and choices of a recurrent-depth transformer; wrong ones raise `ValueError` naming the field.

    The defaults are a byte-level model of about 0.3M parameters that runs anywhere.
    """

    # Sizes.
    vocab_size: int = 256
    dim: int = 128
    max_seq_len: int = 1024
    max_loop_iters: int = 8
    """How often the recurrent block runs when a call does not say `n_loops`; no upper limit for calls that do."""
    prelude_layers: int = 1
    recurrent_layers: int = 1
    """Layers inside the recurrent block, all of them run once per loop."""
    coda_layers: int = 1
    ffn_dim: int | None = None
    """Hidden size of the dense SwiGLU layers; None means 4/3 of `dim`, rounded up to a multiple of 8."""
    tie_embeddings: bool = True

    # Attention.
    attn_type: Literal["gqa", "mla"] = "gqa"
    n_heads: int = 4
    n_kv_heads: int = 2
    """Key and value heads of GQA; MLA has one latent for all heads and ignores it."""
    qk_norm: bool = True
    """RMSNorm on every query and key head of GQA (MLA normalises its latents instead)."""
    attention_sink: bool = True
    """A learned logit per head that takes probability and contributes nothing; anchors absolute position."""
    window: int | Literal["auto"] | None = "auto"
    """Sliding window of the recurrent block: how many positions a query sees, itself included. None sees all; "auto"
    is just wide enough for information to cross `max_seq_len` in two fifths of `max_loop_iters` loops."""
    outer_window: int | Literal["auto"] | None = "auto"
    """Sliding window of the prelude's and the coda's layers."""
    use_rope: bool = True
    rope_theta: float | None = None
    """Base of the rotary frequencies; None means ten times the window (the context, without one), at least 100."""
    kv_lora_rank: int = 32
    q_lora_rank: int = 64
    qk_rope_head_dim: int = 16
    qk_nope_head_dim: int = 16
    v_head_dim: int = 16

    # Mixture of experts in the recurrent block.
    n_experts: int = 0
    """Routed experts; 0 makes the recurrent block's feed-forward a dense SwiGLU."""
    n_shared_experts: int = 1
    n_experts_per_tok: int = 2
    expert_dim: int = 64
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    routed_scale: float = 1.0
    """Factor on the sum of the routed experts (DeepSeek-V3's `routed_scaling_factor`)."""
    balance_rate: float = 0.05
    """Step of the router bias per training forward; 0 switches balancing off."""

    # The loop.
    lora_rank: int = 0
    """Rank of the depth adapter; 0 leaves it out."""
    loop_embedding: bool = False
    state_init: Literal["input", "zeros", "noise"] = "input"
    """First state: the encoded input, zeros, or in training noise of a random size around the zeros of inference."""
    deeper_rate: float = 0.125
    """The share of sequences that `forward` in training mode runs deeper than asked, up to five times as deep: with one
    depth for all, a model could else learn to be right after that many loops alone. All of their loops are kept for
    the way back. Not where several processes train together; the trainer's depth plans are kept to the letter."""
    halting: Literal["act", "settled", "none"] = "act"
    """When a position stops: as a trained head says, or once no position up to it moves any more (not in training)."""
    act_threshold: float = 0.99
    settle_tolerance: float = 0.1
    """Under halting "settled": a position moves where a loop changes its state by more than this share of its size."""

    # Numerics and generation.
    update_scale: float | None = None
    """How many times faster than the optimizer's rate the blocks' matrices move under Adam; None means 512 / `dim`, so
    that one rate serves every width (the rule of muP, Yang et al. 2022, arXiv 2203.03466)."""
    dropout: float = 0.0
    """The share of what attention and feed-forward add to the stream that is left out in training, drawn anew in every
    layer and loop; the rest is scaled up by `1 / (1 - dropout)`. Attention's weights never are."""
    norm_eps: float = 1e-6
    max_output_tokens: int = 4096
    """The most tokens that one `generate` call may add."""

    def __post_init__(self) -> None:
        self._check_types()
        for name in _AT_LEAST_ONE:
            self._require(name, getattr(self, name) >= 1, "an integer of at least 1")
        for name in _AT_LEAST_ZERO:
            self._require(name, getattr(self, name) >= 0, "a number of at least 0")
        for name, accepted in _CHOICES.items():
            self._require(name, getattr(self, name) in accepted, f"one of {', '.join(map(repr, accepted))}")
        for name in ("window", "outer_window"):
            value = getattr(self, name)
            self._require(name, value in (None, "auto") or value >= 1, "'auto', None or an integer of at least 1")
        self._require("ffn_dim", self.ffn_dim is None or self.ffn_dim >= 1, "None or an integer of at least 1")
        self._require("act_threshold", 0 < self.act_threshold <= 1, "a number in (0, 1]")
        for name in ("dropout", "deeper_rate"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._require("norm_eps", self.norm_eps > 0, "a number above 0")
        self._require("settle_tolerance", self.settle_tolerance > 0, "a number above 0")
        for name in ("rope_theta", "update_scale"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "None or a number above 0")
        self._check_attention()
        if self.n_experts:
            limit = f"an integer from 1 to n_experts ({self.n_experts})"
            self._require("n_experts_per_tok", 1 <= self.n_experts_per_tok <= self.n_experts, limit)
            self._require("expert_dim", self.expert_dim >= 1, "an integer of at least 1")

    def _check_types(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if (value is None and "None" in kind) or (value == "auto" and "auto" in kind):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if kind.startswith("int"):
                self._require(field.name, number and isinstance(value, int), "an integer")
            elif kind.startswith("float"):
                self._require(field.name, number and isfinite(value), "a finite number")
            elif kind == "bool":
                self._require(field.name, isinstance(value, bool), "True or False")

    def _check_attention(self) -> None:
        if self.attn_type == "mla":
            for name in ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
                self._require(name, getattr(self, name) >= 1, "an integer of at least 1")
            self._require("qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "an even integer")
            return
        self._require("n_heads", self.dim % self.n_heads == 0, f"a divisor of dim ({self.dim})")
        self._require("n_kv_heads", self.n_heads % self.n_kv_heads == 0, f"a divisor of n_heads ({self.n_heads})")
        even = not self.use_rope or self.head_dim % 2 == 0
        self._require("n_heads", even, f"such that dim / n_heads is even, as rotary positions need (dim is {self.dim})")

    def _require(self, name: str, ok: bool, accepted: str) -> None:
        if not ok:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {accepted}")

    @property
    def head_dim(self) -> int:
        """Width of one GQA head."""
        return self.dim // self.n_heads

    @property
    def loop_reach(self) -> int | None:
        """The recurrent block's window as a number; None where a query sees everything."""
        return self._resolve(self.window)

    @property
    def outer_reach(self) -> int | None:
        """The prelude's and coda's window as a number; None where a query sees everything."""
        return self._resolve(self.outer_window)

    def _resolve(self, window: int | str | None) -> int | None:
        if isinstance(window, str):
            return 1 - (-5 * self.max_seq_len // (2 * self.max_loop_iters))
        return window

    @property
    def rotary_base(self) -> float:
        """The base of the rotary frequencies."""
        return (
            self.rope_theta if self.rope_theta is not None else max(100.0, 10.0 * (self.loop_reach or self.max_seq_len))
        )

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are rotated."""
        return self.qk_rope_head_dim if self.attn_type == "mla" else self.head_dim

    @property
    def rotary_heads(self) -> int:
        """How many heads an attention layer rotates: queries and keys; MLA's keys share one."""
        return self.n_heads + (1 if self.attn_type == "mla" else self.n_kv_heads)

    @property
    def matrix_update_scale(self) -> float:
        """`update_scale` as a number."""
        return self.update_scale if self.update_scale is not None else 512 / self.dim

    @property
    def ffn_hidden(self) -> int:
        """Hidden size of the dense SwiGLU layers."""
        return self.ffn_dim if self.ffn_dim is not None else -(-4 * self.dim // 3 // 8) * 8

    @property
    def shared_dim(self) -> int:
        """Hidden size of the shared experts taken together; each is as wide as a routed one."""
        return self.n_shared_experts * self.expert_dim

    @property
    def cache_widths(self) -> dict[str, tuple[int, ...]]:
        """Names and trailing shapes of what one attention layer caches per token."""
        if self.attn_type == "mla":
            return {"latent": (self.kv_lora_rank + self.qk_rope_head_dim,)}
        return {"k": (self.n_kv_heads, self.head_dim), "v": (self.n_kv_heads, self.head_dim)}

    @property
    def cached_numbers(self) -> int:
        """How many numbers one attention layer caches per token."""
        return sum(prod(shape) for shape in self.cache_widths.values())

    def replace(self, **changes: Any) -> MythosConfig:
        """A checked copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for `config.json`."""
        return {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MythosConfig:
        """The inverse of `to_dict`; unknown keys and newer formats raise `ValueError`."""
        version = data.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version!r}; this release reads up to {FORMAT_VERSION}: upgrade open-mythos"
            )
        model_type = data.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(f"model_type is {model_type!r}; it must be {MODEL_TYPE!r}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known - _FOLDER_KEYS)
        if unknown:
            raise ValueError(f"unknown config keys {unknown}; accepted: {sorted(known)}")
        return cls(**{key: value for key, value in data.items() if key in known})


_AT_LEAST_ONE = (
    "vocab_size",
    "dim",
    "max_seq_len",
    "max_loop_iters",
    "recurrent_layers",
    "n_heads",
    "n_kv_heads",
    "max_output_tokens",
)
_AT_LEAST_ZERO = ("prelude_layers", "coda_layers", "n_experts", "n_shared_experts", "lora_rank", "balance_rate")
_CHOICES = {
    "attn_type": ("gqa", "mla"),
    "router_score": ("softmax", "sigmoid"),
    "state_init": ("input", "zeros", "noise"),
    "halting": ("act", "settled", "none"),
}
