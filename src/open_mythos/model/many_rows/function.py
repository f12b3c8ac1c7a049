"""A layer's pass over many positions as a function that PyTorch can differentiate.

Main entry: `WholeLayer`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, finalize

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from open_mythos.model.block import Block
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.few_rows.compiled import Threads
from open_mythos.model.few_rows.layers import Known, Layer, known_of, table
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.many_rows import layer as kernels
from open_mythos.model.rows import Array, described

_GAINS = ("attn_gain", "ffn_gain", "qk_gain", "q_gain", "kv_gain")
"""In the order in which a line of the compiled code's `gains` has them."""
_KEPT, _SCRATCH, _COUNTED = len(kernels.KEPT), len(kernels.SCRATCH), len(kernels.COUNTED)
_ALIGNED = 16
"""Numbers in a line of the caches: where arrays begin."""


class _Places(NamedTuple):
    """Arrays that lie in one."""

    offsets: npt.NDArray[np.int64]
    """In bytes."""
    size: int
    """In numbers."""


class LayerPlan:
    """What does not change between passes of one block: its weights' places, sizes, and those of what a pass keeps."""

    def __init__(self, block: Block, known: Known) -> None:
        self.state = _state(known)
        self.weights: dict[str, Tensor] = {name: w for name, w in known.items() if isinstance(w, nn.Parameter)}
        self._layer = Layer(block)
        self.table = table([self._layer])
        attn = block.attn
        if isinstance(attn, MLAttention):
            self.weights["kv_up"] = attn.kv_up.weight
        self.shapes = {name: known[name].shape for name in self.weights}
        """As compiled code sees the weights."""
        self.window = attn.window
        n_heads, dim = attn.n_heads, block.attn_norm.weight.shape[0]
        if isinstance(attn, MLAttention):
            n_kv, key_width, value_width = n_heads, attn.nope_dim + attn.rope_dim, attn.v_dim
            rank, q_rank = attn.kv_norm.weight.shape[0], attn.q_norm.weight.shape[0]
            raw, rebuilt, latent = attn.down.weight.shape[0], n_kv, rank + attn.rope_dim
            entries: dict[str, tuple[int, ...]] = {"latent": (latent,)}
        else:
            n_kv, key_width, value_width = attn.n_kv_heads, attn.head_dim, attn.head_dim
            raw, rebuilt, rank, q_rank, latent = attn.qkv.weight.shape[0], 0, 0, 0, 0
            entries = {"k": (n_kv, key_width), "v": (n_kv, key_width)}
        self.entries = entries
        """Sizes of what a position leaves for others, by the names of the cache."""
        shared = known["gate"].shape[0] if "gate" in known else 0
        n_experts, expert_width, _ = known["expert_gate"].shape if "expert_gate" in known else (0, 0, 0)
        self.n_experts: int = n_experts
        self.top_k: int = known.get("top_k", 0)
        top_k = self.top_k
        slots = top_k * expert_width
        per_row = {
            "attn_scales": 1,
            "raw": raw,
            "q": n_heads * key_width,
            "rebuilt_keys": rebuilt * key_width,
            "rebuilt_values": rebuilt * value_width,
            "mixed": n_heads * value_width,
            "lse": n_heads,
            "middle": dim,
            "ffn_scales": 1,
            "gates": shared,
            "ups": shared,
            "logits": self.n_experts,
            "factors": top_k,
            "expert_gates": slots,
            "expert_ups": slots,
            "normed": dim,
            "dnormed": dim,
            "draw": raw,
            "dq": n_heads * key_width,
            "dkeys": n_kv * key_width,
            "dvalues": n_kv * value_width,
            "dmixed": n_heads * value_width,
            "low": q_rank,
            "dlow": q_rank,
            "latents": rank,
            "dlatents": rank,
            "dkv": rebuilt * (key_width + value_width),
            "dlatent": latent,
            "scaled_dmiddle": dim,
            "dmiddle": dim,
            "ffn_normed": dim,
            "scaled_dy": dim,
            "hidden": shared,
            "dgates": shared,
            "dups": shared,
            "dlogits": self.n_experts,
            "dhidden": shared,
            "rows": top_k * dim,
            "drows": top_k * dim,
            "row_grads": top_k * dim,
            "expert_hidden": slots,
            "dexpert_hidden": slots,
            "dexpert_gates": slots,
            "dexpert_ups": slots,
        }
        self._per_row: dict[tuple[str, ...], npt.NDArray[np.int64]] = {
            names: np.array([per_row[name] for name in names]) for names in (kernels.KEPT, kernels.SCRATCH)
        }
        self._places: dict[tuple[tuple[str, ...], int], _Places] = {}
        self._free: dict[int, list[Array]] = {}
        self.gains = {name: self.weights[name].numel() for name in _GAINS if name in self.weights}
        self.n_gains = sum(self.gains.values())
        self.sizes = (n_heads, n_kv, key_width, value_width)

    def places(self, names: tuple[str, ...], n: int) -> _Places:
        """Where each of `names` begins in an array that has all of them, for so many rows."""
        key = names, n
        if key not in self._places:
            ends = np.cumsum(-(-self._per_row[names] * n // _ALIGNED) * _ALIGNED)
            self._places[key] = _Places(4 * np.concatenate([[0], ends[:-1]]), int(ends[-1]))
        return self._places[key]

    def room(self, n: int) -> Tensor:
        """For all that a pass over so many rows keeps. Memory is used again once nobody has the tensor any more.

        To get it from the system for every pass took a fifth of a small model's step: it comes page by page.
        """
        free = self._free.setdefault(n, [])
        memory: Array = free.pop() if free else np.empty(self.places(kernels.KEPT, n).size, np.float32)
        lent = memory[:]
        finalize(lent, free.append, memory)
        return torch.from_numpy(lent)


def _state(known: Known) -> list[float]:
    """Changes when a plan no longer holds: where the weights are, and the numbers."""
    return [x.data_ptr() if isinstance(x, Tensor) else x for name, x in known.items() if name != "qk_gain"]


class _Scratch(threading.local):
    """Memory that a pass needs while it runs; each thread has its own."""

    buffer = torch.empty(0)

    def address(self, size: int) -> int:
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size)
        return self.buffer.data_ptr()


_scratch = _Scratch()


class LayerPass(torch.autograd.Function):
    """`apply(x, plan, rotations, threads, active, *before, *weights)`: the stream, the load, and the entries.

    x and the new stream are (batch, seq, dim). Entries are keys and values, or latents; where `active` (batch, seq) is
    False, they are those of `before`, if these are not None. The load is (parts, experts): slots of active positions.
    Rotations are those of `ForwardContext`, the weights the plan's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: LayerPlan,
        rotations: Array,
        threads: Threads,
        active: Tensor | None,
        *before_and_weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x, n_entries = x.contiguous(), len(plan.entries)
        active = None if active is None else active.contiguous()
        before = [None if b is None else b.contiguous() for b in before_and_weights[:n_entries]]
        n = x.shape[0] * x.shape[1]
        parts = min(threads.n, n)
        kept = plan.room(n)
        counted = torch.empty(2 * parts * plan.n_experts + n * plan.top_k, dtype=torch.int64)
        y, entries = torch.empty_like(x), [x.new_empty(*x.shape[:2], *shape) for shape in plan.entries.values()]
        given = {"y": y, **_numbered("entry", entries), **_numbered("before", before)}
        with threads.lock:
            kernels.forward(plan.table, _described(plan, kept, counted, rotations, parts, x, active, given))
        ctx.save_for_backward(x, active, kept, counted, *entries, *before_and_weights[n_entries:])
        ctx.plan, ctx.rotations, ctx.threads, ctx.parts = plan, rotations, threads, parts
        ctx.has_before = bool(before) and before[0] is not None
        ctx.set_materialize_grads(False)
        load = counted[parts * plan.n_experts + n * plan.top_k :].view(parts, plan.n_experts)
        ctx.mark_non_differentiable(load)
        return y, load, *entries

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None, *dentries: Tensor | None) -> tuple[Tensor | None, ...]:
        x, active, kept, counted, *entries_and_weights = ctx.saved_tensors
        plan, parts, n_entries = ctx.plan, ctx.parts, len(ctx.plan.entries)
        entries, weights = entries_and_weights[:n_entries], entries_and_weights[n_entries:]
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dentries = tuple(None if grad is None else grad.contiguous() for grad in dentries)
        dx, dbefore = torch.empty_like(x), [torch.empty_like(entry) if ctx.has_before else None for entry in entries]
        dsink, gains = x.new_empty(x.shape[0], plan.sizes[0]), x.new_zeros(parts, plan.n_gains)
        grads = {name: torch.empty_like(weight) for name, weight in zip(plan.weights, weights, strict=True)}
        given = {"dx": dx, "dy": dy, "dsink": dsink, "gains": gains, **_numbered("entry", entries)}
        given |= {**_numbered("dentry", dentries), **_numbered("dbefore", dbefore)}
        described_grads = np.zeros(1, plan.table.dtype)
        for name, grad in grads.items():
            described_grads[name][0] = described(grad.view(plan.shapes[name]))
        with ctx.threads.lock:
            row = _described(plan, kept, counted, ctx.rotations, parts, x, active, given)
            kernels.backward(plan.table, described_grads, row)
        for name, grad in zip(plan.gains, gains.sum(0).split(list(plan.gains.values())), strict=True):
            grads[name] = grad.view(plan.weights[name].shape)
        if "sink" in grads:
            grads["sink"] = dsink.sum(0)
        return dx, None, None, None, None, *dbefore, *grads.values()


def _numbered(name: str, tensors: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    return {f"{name}_{k}": tensor for k, tensor in enumerate(tensors)}


def _described(
    plan: LayerPlan,
    kept: Tensor,
    counted: Tensor,
    rotations: Array,
    parts: int,
    x: Tensor,
    active: Tensor | None,
    given: dict[str, Tensor | None],
) -> npt.NDArray[Any]:
    """A pass as compiled code knows it; who calls keeps what is given."""
    batch, seq, _ = x.shape
    n, loads = batch * seq, parts * plan.n_experts
    row = np.zeros(1, kernels.PASS)
    numbers = row.view(np.int64)
    numbers[:_KEPT] = plan.places(kernels.KEPT, n).offsets + kept.data_ptr()
    places = plan.places(kernels.SCRATCH, n)
    numbers[_KEPT : _KEPT + _SCRATCH] = places.offsets + _scratch.address(places.size)
    integers = counted.data_ptr()
    first, last = _KEPT + _SCRATCH, _KEPT + _SCRATCH + _COUNTED
    numbers[first:last] = integers, integers + 8 * loads, integers + 8 * (loads + n * plan.top_k)
    given = {**given, "x": x, "active": active}
    addresses = [0 if (tensor := given.get(name)) is None else tensor.data_ptr() for name in kernels.GIVEN]
    window, width = plan.window or seq, rotations.shape[1]
    numbers[last:] = [*addresses, rotations.ctypes.data, batch, seq, window, parts, *plan.sizes, width, plan.n_gains]
    return row


_plans: WeakKeyDictionary[Block, LayerPlan] = WeakKeyDictionary()


def _plan(block: Block) -> LayerPlan:
    """The block's plan, made anew where the last one's does not hold any more."""
    known, plan = known_of(block), _plans.get(block)
    if plan is None or plan.state != _state(known):
        plan = _plans[block] = LayerPlan(block, known)
    return plan


class WholeLayer:
    """Computes what a `Block` does, for all positions of sequences without a past."""

    def __init__(self, plan: LayerPlan, threads: Threads) -> None:
        self._plan, self._threads = plan, threads

    @classmethod
    def of(cls, block: Block, threads: Threads) -> WholeLayer:
        """The layer's weights may change in place as long as this is used, and not move."""
        return cls(_plan(block), threads)

    def __call__(
        self, x: Tensor, context: ForwardContext, address: CacheAddress, active: Tensor | None = None
    ) -> Tensor:
        """(batch, seq, dim) to the same shape; `active` (batch, seq) marks positions that have not halted."""
        plan, store = self._plan, context.store
        names = list(plan.entries)
        before = store.before(address) if active is not None and address.loop > 0 else {}
        befores = [before.get(name) for name in names]
        out, load, *entries = LayerPass.apply(
            x, plan, context.rotations, self._threads, active, *befores, *plan.weights.values()
        )
        store.extend(address, dict(zip(names, entries, strict=True)), None)
        if context.expert_load is not None and plan.n_experts:
            context.expert_load[address] = load.sum(0)
        return out  # type: ignore[no-any-return]
