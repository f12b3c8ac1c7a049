"""What is timed: training steps, forwards and decoding, at two sizes and with both kinds of attention.

Main entry: `run_case`. Peer and model get the same sizes, data and optimizer, and take turns in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from open_mythos.analysis.kv_memory import bytes_per_position
from open_mythos.bench.timing import median, race
from open_mythos.config import MythosConfig
from open_mythos.model.cost import forward_flops
from open_mythos.model.experts import MoEFFN
from open_mythos.model.mythos import OpenMythos

Task = Literal["train", "forward", "decode"]

_TUTORIAL = {
    "vocab_size": 64,
    "dim": 64,
    "n_heads": 4,
    "max_seq_len": 28,
    "max_loop_iters": 16,
    "prelude_layers": 1,
    "coda_layers": 1,
    "n_experts": 4,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 32,
    "lora_rank": 4,
    "act_threshold": 0.99,
}
_SMALL = {
    "vocab_size": 4096,
    "dim": 384,
    "n_heads": 6,
    "max_seq_len": 1024,
    "max_loop_iters": 16,
    "prelude_layers": 2,
    "coda_layers": 2,
    "n_experts": 16,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 256,
    "lora_rank": 8,
}
_TUTORIAL_MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_SMALL_MLA = {
    "kv_lora_rank": 128,
    "q_lora_rank": 192,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
SIZES: dict[str, dict[str, Any]] = {
    "tutorial-gqa": {**_TUTORIAL, "attn_type": "gqa", "n_kv_heads": 2},
    "tutorial-mla": {**_TUTORIAL, "attn_type": "mla", "n_kv_heads": 4, **_TUTORIAL_MLA},
    "small-gqa": {**_SMALL, "attn_type": "gqa", "n_kv_heads": 2},
    "small-mla": {**_SMALL, "attn_type": "mla", "n_kv_heads": 6, **_SMALL_MLA},
}
_BATCH = {"tutorial": (64, 24), "small": (4, 256)}
_PROMPT, _NEW_TOKENS = 16, 32


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    task: Task
    size: str
    n_loops: int


CASES = (
    Case("train", "tutorial-gqa", 3),
    Case("train", "tutorial-mla", 3),
    Case("train", "small-gqa", 4),
    Case("train", "small-mla", 4),
    Case("forward", "small-gqa", 4),
    Case("forward", "small-mla", 4),
    Case("decode", "small-gqa", 4),
    Case("decode", "small-mla", 4),
)


@dataclass(frozen=True)
class Measured:
    """Median seconds per training step, forward or token. The floor is the least that the hardware allows."""

    case: Case
    ours: float
    peer: float | None
    floor: float
    parameters: int
    peer_parameters: int | None

    @property
    def speedup(self) -> float | None:
        """How many times faster than the peer."""
        return None if self.peer is None else self.peer / self.ours

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "task": self.case.task,
            "size": self.case.size,
            "n_loops": self.case.n_loops,
            "seconds": self.ours,
            "peer_seconds": self.peer,
            "speedup": self.speedup,
            "floor_seconds": self.floor,
            "times_floor": self.ours / self.floor,
            "parameters": self.parameters,
            "peer_parameters": self.peer_parameters,
        }


def run_case(case: Case, peer: ModuleType | None, seconds: float, flops: float, bandwidth: float) -> Measured:
    """Time one case for about `seconds`; `flops` and `bandwidth` are the measured peaks that the floor divides by."""
    torch.manual_seed(0)
    sizes = SIZES[case.size]
    # Every sequence at the same depth, as the peer has it.
    model = OpenMythos(MythosConfig(**sizes, deeper_rate=0))
    rival: nn.Module | None = None if peer is None else peer.OpenMythos(peer.MythosConfig(**sizes))
    contestants = {"ours": _runner(case, model, greedy={"temperature": 0.0})}
    if rival is not None:  # its temperature divides the logits, so greedy is the most likely of one
        contestants["peer"] = _runner(case, rival, greedy={"temperature": 1.0, "top_k": 1})
    times = race(contestants, seconds)
    units = _NEW_TOKENS if case.task == "decode" else 1
    return Measured(
        case,
        ours=median(times["ours"]) / units,
        peer=median(times["peer"]) / units if rival is not None else None,
        floor=_floor(case, model, flops, bandwidth),
        parameters=sum(p.numel() for p in model.parameters()),
        peer_parameters=None if rival is None else sum(p.numel() for p in rival.parameters()),
    )


def _runner(case: Case, model: nn.Module, greedy: dict[str, Any]) -> Callable[[], object]:
    vocabulary = SIZES[case.size]["vocab_size"]
    if case.task == "decode":
        prompt = torch.randint(0, vocabulary, (1, _PROMPT))
        model.eval()
        generate: Any = model.generate
        return lambda: generate(prompt, max_new_tokens=_NEW_TOKENS, n_loops=case.n_loops, **greedy)
    ids = torch.randint(0, vocabulary, _BATCH[case.size.split("-")[0]])
    if case.task == "forward":
        model.eval()
        return lambda: _forward(model, ids, case.n_loops)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return lambda: _train_step(model, optimizer, ids, case.n_loops)


@torch.no_grad()
def _forward(model: nn.Module, ids: torch.Tensor, n_loops: int) -> None:
    model(ids, n_loops=n_loops)


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, n_loops: int) -> None:
    logits = model(ids, n_loops=n_loops)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _floor(case: Case, model: OpenMythos, flops: float, bandwidth: float) -> float:
    """Least seconds: matrix products at the measured peak, or for decoding what has to be read, once per pass."""
    if case.task == "decode":
        return _bytes_per_token(model, case.n_loops) / bandwidth
    batch, seq_len = _BATCH[case.size.split("-")[0]]
    products = forward_flops(model.config, seq_len).total(case.n_loops) * batch * seq_len
    passes = 3 if case.task == "train" else 1  # the backward has two products for each one of the forward
    return products * passes / flops


@torch.no_grad()
def _bytes_per_token(model: OpenMythos, n_loops: int) -> float:
    """The mean of the prompt's pass, which gives the first token and reads all weights, and of those for one token.

    These read the cache, and all weights but those of experts that none of the token's loops chooses.
    """
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    experts = 0
    for block in model.recurrent.blocks:
        if isinstance(block.ffn, MoEFFN):
            experts += sum(p.numel() * p.element_size() for p in (block.ffn.gate, block.ffn.up, block.ffn.down))
    unused = experts * (1 - _chosen_share(model, n_loops)) if experts else 0
    cache = bytes_per_position(model.config, n_loops, model.embed.weight.dtype) * (_PROMPT + _NEW_TOKENS / 2)
    return whole + (cache - unused) * (_NEW_TOKENS - 1) / _NEW_TOKENS


def _chosen_share(model: OpenMythos, n_loops: int) -> float:
    """Which share of a layer's experts the loops of one token choose together, in the mean of some tokens."""
    model.eval()
    tokens = torch.arange(_PROMPT).view(-1, 1, 1)
    loads = [model(token, n_loops, full_output=True).expert_load for token in tokens]
    return sum(float((load.sum(0) > 0).float().mean()) for load in loads) / len(loads)
