"""A block's arithmetic for a few positions, of one sequence or of several.

Main entry: `FewRowsBlock`. Products are PyTorch's, what lies between them is `kernels`'.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from open_mythos.model import kernels
from open_mythos.model.attention import GQAttention
from open_mythos.model.block import Block
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.experts import MoEFFN
from open_mythos.model.feed_forward import SwiGLU
from open_mythos.model.few_rows_attention import FewRowsGQA, FewRowsMLA
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.norm import RMSNorm
from open_mythos.model.rows import Array, Product, Scratch, Shared, add_product, as_array, multiply


class FewRowsBlock:
    """What `block` computes for positions that have not halted.

    It copies no weights. Float32 on a CPU only: everything else is better served by `Block`.
    """

    def __init__(self, block: Block, scratch: Scratch) -> None:
        self._scale, self._out = block.branch_scale, block.attn.out.weight.detach()
        self._attn_norm, self._ffn_norm = _Norm(block.attn_norm, scratch), _Norm(block.ffn_norm, scratch)
        if isinstance(block.attn, MLAttention):
            self._attn: FewRowsGQA | FewRowsMLA = FewRowsMLA(block.attn, scratch)
        else:
            assert isinstance(block.attn, GQAttention)
            self._attn = FewRowsGQA(block.attn, scratch)
        dense = block.ffn.shared if isinstance(block.ffn, MoEFFN) else block.ffn
        self._dense = None if dense is None else _Dense(dense, scratch)
        self._experts = _Experts(block.ffn, scratch) if isinstance(block.ffn, MoEFFN) else None

    def __call__(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> Tensor:
        """(batch, seq, dim) to the same shape."""
        out = x.clone()
        self.add_to(out, context, address)
        return out

    def add_to(self, x: Tensor, context: ForwardContext, address: CacheAddress) -> None:
        """Add to x (batch, seq, dim) what the block adds to the stream, in place."""
        rows = x.view(-1, x.shape[-1])
        array, stream = rows.numpy(), rows[0] if len(rows) == 1 else rows
        heads = self._attn(self._attn_norm(array).tensor, context, address)
        add_product(stream, heads, self._out, self._scale)
        normed = self._ffn_norm(array)
        if self._experts is not None:
            self._experts.add_to(array, normed, self._scale)
        if self._dense is not None:
            self._dense.add_to(stream, normed.tensor, self._scale)


class _Norm:
    """What an `RMSNorm` makes of rows."""

    def __init__(self, norm: RMSNorm, scratch: Scratch) -> None:
        self._gain, self._eps = as_array(norm.weight), np.float32(norm.eps)
        self._out = scratch("normed", len(norm.weight))

    def __call__(self, x: Array) -> Shared:
        out = self._out(len(x))
        kernels.rms_norm(x, self._gain, self._eps, out.array)
        return out


class _Dense:
    """A SwiGLU that every row goes through."""

    def __init__(self, ffn: SwiGLU, scratch: Scratch) -> None:
        self._gate, self._up = Product(ffn.gate.weight, scratch, "gate"), Product(ffn.up.weight, scratch, "up")
        self._down = ffn.down.weight.detach()

    def add_to(self, stream: Tensor, normed: Tensor, scale: float) -> None:
        """Add `scale` times the layer's output for `normed` to `stream`, both (n, dim) or (dim,), in place."""
        hidden = _gated(self._gate(normed), self._up(normed))
        add_product(stream, hidden, self._down, scale)


class _Experts:
    """The routed experts, each on the rows that chose it."""

    def __init__(self, moe: MoEFFN, scratch: Scratch) -> None:
        self._topk, self._softmax, self._scale = moe.topk, moe.score == "softmax", float(moe.scale)
        self._router, self._bias = Product(moe.router.weight, scratch, "logits"), as_array(moe.router_bias)
        self._gates, self._ups, self._downs = list(moe.gate.detach()), list(moe.up.detach()), list(moe.down.detach().mT)
        self._ends = np.empty(moe.n_experts, np.int64)
        hidden, dim = moe.gate.shape[1:]
        self._rows, self._out = scratch("sorted", dim, moe.topk), scratch("experts", dim, moe.topk)
        self._gate, self._up = scratch("gate", hidden, moe.topk), scratch("up", hidden, moe.topk)

    def add_to(self, stream: Array, normed: Shared, scale: float) -> None:
        """Add `scale` times the experts' output for `normed` (n, dim) to `stream` (n, dim), in place."""
        shape = (len(stream), self._topk)
        chosen, slots, weights = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.float32)
        rows, gate, up, out = (buffer(chosen.size) for buffer in (self._rows, self._gate, self._up, self._out))
        logits = self._router(normed.tensor).array
        kernels.route(logits, self._bias, self._softmax, self._scale * scale, chosen, weights)
        kernels.dispatch(normed.array, chosen, self._ends, slots, rows.array)
        runs = self._runs()
        for expert, own in runs:
            x = rows.part(own)
            multiply(x, self._gates[expert], gate.part(own))
            multiply(x, self._ups[expert], up.part(own))
        _gated(gate, up)
        for expert, own in runs:
            multiply(gate.part(own), self._downs[expert], out.part(own))
        kernels.combine(stream, out.array, slots, weights)

    def _runs(self) -> list[tuple[int, slice]]:
        """Each expert that was chosen, with its slots."""
        ends = self._ends.tolist()
        starts = [0, *ends[:-1]]
        return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < b]


def _gated(gate: Shared, up: Shared) -> Tensor:
    """`silu(gate) * up`, in the place of `gate`."""
    F.silu(gate.tensor, inplace=True)
    np.multiply(gate.array, up.array, out=gate.array)
    return gate.tensor
