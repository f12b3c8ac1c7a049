"""A block's arithmetic for one token of one sequence: vectors where `Block` has matrices.

Main entry: `one_token_layers`. On a CPU, a decoding step is bound by how many operations it makes, not by their size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.model.attention import GQAttention
from open_mythos.model.block import Block
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext, Layer
from open_mythos.model.experts import MoEFFN
from open_mythos.model.feed_forward import SwiGLU
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.norm import RMSNorm
from open_mythos.model.one_token_attention import OneTokenGQA, OneTokenMLA
from open_mythos.model.router import route_one
from open_mythos.model.vectors import Buffer, Norm, Product, as_array

_KNOWN = {Block, GQAttention, MLAttention, MoEFFN, SwiGLU, RMSNorm, nn.Linear, nn.Dropout}


def one_token_layers(blocks: list[Block]) -> dict[nn.Module, Layer]:
    """What stands in for each block while one sequence is continued; none for blocks that it does not know fully.

    Those are other than float32, not on a CPU, or have parts that were wrapped, replaced, hooked or patched.
    """
    return {block: OneTokenBlock(block) for block in blocks if _is_plain(block)}


def _is_plain(block: Block) -> bool:
    for part in block.modules():
        if type(part) not in _KNOWN or "forward" in vars(part):
            return False
        if part is not block and (part._forward_hooks or part._forward_pre_hooks):
            return False
    return all(p.dtype == torch.float32 and p.device.type == "cpu" for p in block.parameters())


class OneTokenBlock:
    """What `block` computes for a position that has not halted.

    It copies no weights. Float32 on a CPU only: everything else is better served by `Block`.
    """

    def __init__(self, block: Block) -> None:
        self._scale, self._out = block.branch_scale, block.attn.out.weight.detach()
        self._attn_norm, self._ffn_norm = Norm(block.attn_norm), Norm(block.ffn_norm)
        if isinstance(block.attn, MLAttention):
            self._attn: OneTokenGQA | OneTokenMLA = OneTokenMLA(block.attn)
        else:
            assert isinstance(block.attn, GQAttention)
            self._attn = OneTokenGQA(block.attn)
        self._ffn = _OneTokenFFN(block.ffn)

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """(1, 1, dim) to the same shape."""
        out = x.clone()
        stream = out.view(-1)
        array = stream.numpy()
        heads = self._attn(self._attn_norm(array), context, address)
        stream.addmv_(self._out, heads, alpha=self._scale)
        self._ffn.add_to(stream, self._ffn_norm(array), self._scale)
        return out


class _Expert(NamedTuple):
    """The matrices of one SwiGLU: (hidden, dim), (hidden, dim), (dim, hidden)."""

    gate: Tensor
    up: Tensor
    down: Tensor


class _OneTokenFFN:
    """The chosen experts one after the other, or the dense layer as the only expert there is."""

    def __init__(self, ffn: MoEFFN | SwiGLU) -> None:
        self._moe = ffn if isinstance(ffn, MoEFFN) else None
        dense = ffn.shared if isinstance(ffn, MoEFFN) else ffn
        matrices = [] if dense is None else [_Expert(dense.gate.weight, dense.up.weight, dense.down.weight)]
        self._always = [(expert, 1.0) for expert in matrices]
        sizes = [expert.gate.shape[0] for expert in matrices]
        if self._moe is not None:
            routed = zip(self._moe.gate, self._moe.up, self._moe.down.mT, strict=True)
            self._routed = [_Expert(*each) for each in routed]
            self._router, self._bias = Product(self._moe.router.weight), as_array(self._moe.router_bias)
            sizes = [self._moe.gate.shape[1]] * self._moe.topk + sizes
        self._gate, self._up = Buffer(sum(sizes)), Buffer(sum(sizes))
        self._gates, self._ups = self._gate.tensor.split(sizes), self._up.tensor.split(sizes)

    def add_to(self, stream: Tensor, normed: Tensor, scale: float) -> None:
        """Add `scale` times the layer's output for `normed` to `stream`, both (dim,), in place."""
        chosen = self._choose(normed)
        for (expert, _), gate, up in zip(chosen, self._gates, self._ups, strict=True):
            torch.mv(expert.gate, normed, out=gate)
            torch.mv(expert.up, normed, out=up)
        F.silu(self._gate.tensor, inplace=True)
        np.multiply(self._gate.array, self._up.array, out=self._gate.array)
        for (expert, weight), hidden in zip(chosen, self._gates, strict=True):
            stream.addmv_(expert.down, hidden, alpha=scale * weight)

    def _choose(self, normed: Tensor) -> list[tuple[_Expert, float]]:
        """The experts to run, with their weights."""
        moe = self._moe
        if moe is None:
            return self._always
        chosen = route_one(self._router(normed), self._bias, moe.topk, moe.score, moe.scale)
        return [*((self._routed[expert], weight) for expert, weight in chosen), *self._always]
