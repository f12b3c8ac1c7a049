"""The recurrent-depth transformer.

Main entry: `OpenMythos`. `encode`, `loop_step` and `decode` are the only forward pass; everything else calls them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model import folder
from open_mythos.model.block import Block
from open_mythos.model.cache import CacheAddress, DictStore, KVStore, PlainCache, Stage
from open_mythos.model.checks import check_ids, check_loops, check_sampling
from open_mythos.model.context import Constants, ForwardContext
from open_mythos.model.deeper import Deeper
from open_mythos.model.evaluation import evaluating
from open_mythos.model.experts import MoEFFN
from open_mythos.model.few_rows.stand_ins import FewRows
from open_mythos.model.init import init_weights
from open_mythos.model.many_rows.stand_ins import ManyRows
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.rows import Rows
from open_mythos.model.sequence_store import SequenceStore


@dataclass(frozen=True)
class MythosOutput:
    """Everything one forward pass can tell; `forward(..., full_output=True)` returns it.

    B batch, S positions, T loops run, L layers of the recurrent block, E experts.
    """

    logits: Tensor
    """(B, S, vocab_size)."""
    ponder_cost: Tensor
    """Scalar: mean loops run plus remainder (Graves 2016); differentiable; 0 without halting."""
    exit_loops: Tensor
    """(B, S): how many loops each position ran."""
    halting_probabilities: Tensor | None
    """(T, B, S) of what `ACTHalting` predicted; None without halting."""
    expert_load: Tensor | None
    """(T, L, E): slots that each routed expert received from active positions; None without experts."""
    state: Tensor
    """(B, S, dim): what the coda was given."""


class OpenMythos(nn.Module):
    """Prelude, one block looped `n_loops` times with the same weights, coda."""

    def __init__(self, config: MythosConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.prelude = self._outer_blocks(config.prelude_layers)
        self.prelude_norm = RMSNorm(config.dim, config.norm_eps)
        self.recurrent = RecurrentBlock(config)
        self.coda = self._outer_blocks(config.coda_layers)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self._cache_id = secrets.randbits(62)
        init_weights(self, config)

    def _outer_blocks(self, n_layers: int) -> nn.ModuleList:
        return nn.ModuleList(Block(self.config, window=self.config.outer_reach, moe=False) for _ in range(n_layers))

    def encode(self, ids: Tensor, context: ForwardContext | None = None) -> Tensor:
        """The encoded input e (batch, seq, dim) of token ids (batch, seq): embedding, prelude, norm."""
        context = context or self.context(ids.shape[1])
        return self._run(self.prelude, self.prelude_norm, "prelude", self.embed(ids) * self.config.dim**0.5, context)

    def loop_step(
        self, h: Tensor, e: Tensor, t: int, context: ForwardContext | None = None, active: Tensor | None = None
    ) -> Tensor:
        """Loop t (from 0): the next state from state h and encoded input e, both (batch, seq, dim).

        Positions where `active` (batch, seq) is False are frozen.
        """
        return self.recurrent.step(h, e, t, context or self.context(h.shape[1]), active)

    def decode(self, h: Tensor, context: ForwardContext | None = None, *, last: int | None = None) -> Tensor:
        """Logits (batch, seq, vocab_size) of a state h (batch, seq, dim): coda, norm, head.

        `last` computes them for that many final positions only.
        """
        context = context or self.context(h.shape[1])
        return self.logits(self.features(h, context, last=last), context)

    def features(
        self,
        h: Tensor,
        context: ForwardContext | None = None,
        *,
        last: int | None = None,
        wanted: Rows | None = None,
    ) -> Tensor:
        """What `decode` multiplies with the head: coda and norm of a state h, (batch, seq, dim).

        If only some are `wanted` of all positions of the batch, in ascending order, others may come out as anything.
        """
        context = context or self.context(h.shape[1])
        if last is not None:
            wanted = np.arange(h.shape[0] * h.shape[1]).reshape(h.shape[:2])[:, -last:].flatten()
        return self._run(self.coda, self.norm, "coda", h, context, wanted, last)

    def logits(self, features: Tensor, context: ForwardContext) -> Tensor:
        """Logits (..., vocab_size) of features (..., dim): the head."""
        stand_in = None
        if type(self).head_weight is OpenMythos.head_weight:
            stand_in = context.stand_ins.get(self.embed if self.head is None else self.head)
        return F.linear(features, self.head_weight) if stand_in is None else stand_in(features)

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, dim); the embedding's where the two are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def context(self, n_new: int, store: KVStore | None = None, constants: Constants | None = None) -> ForwardContext:
        """What the layers of one pass over `n_new` positions share."""
        weight = self.embed.weight
        context = ForwardContext(self.config, n_new, weight.device, weight.dtype, store, constants)
        if store is None:
            context.whole_layers = ManyRows()
        return context

    def few_rows(self) -> FewRows:
        """What stands in for the model's parts in passes over few positions."""
        own = all(getattr(OpenMythos, name) is method for name, method in _PASS.items())
        return FewRows(self, whole=type(self) is OpenMythos and own)

    def _run(
        self,
        blocks: nn.ModuleList,
        norm: RMSNorm,
        stage: Stage,
        x: Tensor,
        context: ForwardContext,
        wanted: Rows | None = None,
        last: int | None = None,
    ) -> Tensor:
        """A stage's blocks and then its norm, of the `last` positions if only these count."""
        whole = context.whole_stage(blocks, norm, x) if last is None else None
        if whole is not None:
            return whole(x, context, CacheAddress(stage, 0))
        if blocks in context.stand_ins:
            x = context.stand_ins[blocks](x, context, CacheAddress(stage, 0), wanted)
        else:
            for layer, block in enumerate(blocks):
                x = block(x, context, CacheAddress(stage, layer))
        return context.layer(norm)(x if last is None else x[:, -last:])

    def forward(
        self,
        ids: Tensor,
        n_loops: int | Tensor | None = None,
        kv_cache: PlainCache | None = None,
        *,
        full_output: bool = False,
        last: int | None = None,
    ) -> Tensor | MythosOutput:
        """Logits (batch, seq, vocab_size) of token ids (batch, seq).

        `n_loops` is one depth for all, one per sequence, (batch,), or without a cache one per position, (batch, seq):
        1 where ids are padding at the end. None means `max_loop_iters`. A plain dict passed as `kv_cache` is filled,
        and continues the sequence when passed again. `last` computes logits for that many final positions only. In
        training mode the routers' biases take one balancing step; and without a cache, in one process, a few sequences
        run deeper than `n_loops` says (the config's `deeper_rate`).

        Raises `ValueError` for ids, loops or a cache that do not fit, before anything is computed or changed.
        """
        loops = check_loops(n_loops, ids, self.config, by_position=kv_cache is None)
        store = None
        if kv_cache is not None:
            store = DictStore(kv_cache, self.config, self._cache_id, loops.shape[0], loops)
        check_ids(ids, self.config, 0 if store is None else store.length)
        context = self.context(ids.shape[1], store)
        if self.config.n_experts and (self.training or full_output):
            context.expert_load = {}
        e = self.encode(ids, context)
        deeper = None
        if self.training and self.config.deeper_rate and store is None and Deeper.may_be_drawn():
            deeper = Deeper.drawn(self.config.deeper_rate, loops)
        if deeper is None:
            result = self.recurrent(e, loops, context, keep_probabilities=full_output)
        else:
            result = deeper.run(self.recurrent, e, context, keep_probabilities=full_output)
        logits = self.decode(result.state, context, last=last)
        if store is not None:
            store.commit(result.exit_loops)
        load = context.stacked_load()
        if self.training and load is not None:
            self.balance(load.sum(0))
        if not full_output:
            return logits
        return MythosOutput(
            logits, result.ponder_cost, result.exit_loops, result.halting_probabilities, load, result.state
        )

    def balance(self, load: Tensor) -> None:
        """One step of every router bias against the slots that experts received, (layers, experts)."""
        for block, received in zip(self.recurrent.blocks, load, strict=True):
            assert isinstance(block, Block)
            assert isinstance(block.ffn, MoEFFN)
            block.ffn.balance(received)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int = 64,
        n_loops: int | Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Append `max_new_tokens` tokens to ids (batch, seq), sampled one by one through a cache.

        Temperature 0 takes the most likely token; `top_k` limits the choice to that many. Returns
        (batch, seq + max_new_tokens).
        """
        check_sampling(ids, max_new_tokens, temperature, top_k, self.config)
        with torch.inference_mode(), evaluating(self.modules()):
            new = list(self._tokens(ids, max_new_tokens, n_loops, temperature, top_k, generator))
        return torch.cat([ids, *new], 1)

    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int = 64,
        n_loops: int | Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """As `generate`, giving each step's tokens, (batch, 1), as soon as they are there."""
        check_sampling(ids, max_new_tokens, temperature, top_k, self.config)
        tokens = self._tokens(ids, max_new_tokens, n_loops, temperature, top_k, generator)
        for _ in range(max_new_tokens):
            with torch.inference_mode(), evaluating(self.modules()):
                new = next(tokens)
            yield new.clone()  # a tensor of inference mode could not be trained on

    def _tokens(
        self,
        ids: Tensor,
        max_new_tokens: int,
        n_loops: int | Tensor | None,
        temperature: float,
        top_k: int | None,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        """Each step's tokens; evaluation mode and inference mode are the caller's to switch on for every step."""
        loops = check_loops(n_loops, ids, self.config)
        store = SequenceStore(self.config, ids.shape[0], ids.shape[1] + max_new_tokens, self.embed.weight)
        new, constants = ids, Constants()
        few = self.few_rows()
        token = few.token()
        for _ in range(max_new_tokens):
            context = self.context(new.shape[1], store, constants)
            context.stand_ins = few.stand_ins(new.numel(), context.longest)
            if token is not None and context.stand_ins and new.numel() == 1:
                logits, exit_loops = token.run(int(new), int(loops), context)
            else:
                result = self.recurrent(self.encode(new, context), loops, context)
                logits, exit_loops = self.decode(result.state, context, last=1), result.exit_loops
            store.commit(exit_loops)
            new = _sample(logits[:, -1], temperature, top_k, generator)
            yield new

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` to a model folder, each file whole or not at all."""
        folder.save(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str | torch.device = "cpu") -> OpenMythos:
        """Read a model folder; the model is returned in evaluation mode, in the dtype it was saved in.

        Raises `ValueError` if the folder is incomplete, damaged, or was written by a newer version.
        """
        config = folder.load_config(directory)
        with torch.device(device):
            model = cls(config)
        folder.load_weights(model, directory)
        return model.eval()


_PASS = {name: getattr(OpenMythos, name) for name in ("encode", "decode", "features", "logits", "head_weight", "_run")}
"""What may be computed by something else, unless somebody has put another in its place."""


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row of logits (batch, vocab_size); (batch, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, choices = logits.topk(top_k)
        return choices.gather(-1, torch.multinomial(values.softmax(-1), 1, generator=generator))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
