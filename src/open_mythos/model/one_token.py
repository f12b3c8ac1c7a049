"""A block's arithmetic for one new token of each of a few sequences.

Main entry: `one_token_layers`. On a CPU, a decoding step is bound by how many operations it makes, not by their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

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
from open_mythos.model.router import route_few
from open_mythos.model.vectors import Array, Buffer, Norm, Product, add_product, as_array, multiply

_KNOWN = {Block, GQAttention, MLAttention, MoEFFN, SwiGLU, RMSNorm, nn.Linear, nn.Dropout}


def one_token_layers(blocks: list[Block], n: int) -> dict[nn.Module, Layer]:
    """What stands in for each block while `n` sequences are continued; none for blocks that it does not know fully.

    Those are other than float32, not on a CPU, or have parts that were wrapped, replaced, hooked or patched.
    """
    return {block: OneTokenBlock(block, n) for block in blocks if _is_plain(block)}


def _is_plain(block: Block) -> bool:
    for part in block.modules():
        if type(part) not in _KNOWN or "forward" in vars(part):
            return False
        if part is not block and (part._forward_hooks or part._forward_pre_hooks):
            return False
    return all(p.dtype == torch.float32 and p.device.type == "cpu" for p in block.parameters())


class OneTokenBlock:
    """What `block` computes for `n` positions that have not halted, each of another sequence.

    It copies no weights. Float32 on a CPU only: everything else is better served by `Block`.
    """

    def __init__(self, block: Block, n: int) -> None:
        self._scale, self._out = block.branch_scale, block.attn.out.weight.detach()
        self._attn_norm, self._ffn_norm = Norm(block.attn_norm, n), Norm(block.ffn_norm, n)
        if isinstance(block.attn, MLAttention):
            self._attn: OneTokenGQA | OneTokenMLA = OneTokenMLA(block.attn, n)
        else:
            assert isinstance(block.attn, GQAttention)
            self._attn = OneTokenGQA(block.attn, n)
        dense = block.ffn.shared if isinstance(block.ffn, MoEFFN) else block.ffn
        self._dense = None if dense is None else _Dense(dense, n)
        self._experts = _Experts(block.ffn, n) if isinstance(block.ffn, MoEFFN) else None

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """(n, 1, dim) or (1, n, dim) to the same shape."""
        out = x.clone()
        rows = out.view(-1, out.shape[-1])
        array, stream = rows.numpy(), rows[0] if len(rows) == 1 else rows
        heads = self._attn(self._attn_norm(array), context, address)
        add_product(stream, heads, self._out, self._scale)
        normed = self._ffn_norm(array)
        if self._experts is not None:
            self._experts.add_to(array, self._ffn_norm, self._scale)
        if self._dense is not None:
            self._dense.add_to(stream, normed, self._scale)
        return out


class _Dense:
    """A SwiGLU that every row goes through."""

    def __init__(self, ffn: SwiGLU, n: int) -> None:
        self._gate, self._up = Product(ffn.gate.weight, n), Product(ffn.up.weight, n)
        self._down = ffn.down.weight.detach()

    def add_to(self, stream: Tensor, normed: Tensor, scale: float) -> None:
        """Add `scale` times the layer's output for `normed` to `stream`, both (n, dim) or (dim,), in place."""
        self._gate(normed)
        up = self._up(normed)
        F.silu(self._gate.tensor, inplace=True)
        np.multiply(self._gate.array, up, out=self._gate.array)
        add_product(stream, self._gate.tensor, self._down, scale)


class _Experts:
    """The routed experts, each on the rows that chose it."""

    def __init__(self, moe: MoEFFN, n: int) -> None:
        self._moe = moe
        self._router, self._bias = Product(moe.router.weight, n), as_array(moe.router_bias)
        self._gates, self._ups, self._downs = list(moe.gate.detach()), list(moe.up.detach()), list(moe.down.detach().mT)
        slots, (hidden, dim) = n * moe.topk, moe.gate.shape[1:]
        self._rows, self._out = Buffer(slots, dim), Buffer(slots, dim)
        self._gate, self._up = Buffer(slots, hidden), Buffer(slots, hidden)

    def add_to(self, stream: Array, normed: Buffer, scale: float) -> None:
        """Add `scale` times the experts' output for `normed` (n, dim) to `stream` (n, dim), in place."""
        moe = self._moe
        experts, weights = route_few(self._router(normed.tensor), self._bias, moe.topk, moe.score, moe.scale)
        order = experts.ravel().argsort(kind="stable")
        np.take(normed.array, order // moe.topk, 0, self._rows.array)
        runs = list(_runs(experts.ravel()[order].tolist()))
        for expert, slots in runs:
            rows = self._rows.part(slots)
            multiply(rows, self._gates[expert], self._gate.part(slots))
            multiply(rows, self._ups[expert], self._up.part(slots))
        F.silu(self._gate.tensor, inplace=True)
        np.multiply(self._gate.array, self._up.array, out=self._gate.array)
        self._gate.array *= (scale * weights.ravel()[order])[:, None]
        for expert, slots in runs:
            multiply(self._gate.part(slots), self._downs[expert], self._out.part(slots))
        stream += self._out.array[order.argsort()].reshape(len(stream), moe.topk, -1).sum(1)


def _runs(sorted_experts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert with the slots that it has, side by side."""
    start = 0
    for expert, slots in groupby(sorted_experts):
        end = start + len(list(slots))
        yield expert, slice(start, end)
        start = end
