"""A layer's pass over whole sequences, as something that PyTorch can differentiate.

Main entry: `WholeLayer`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, finalize

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from open_mythos.model.arithmetic.compiled import Threads
from open_mythos.model.block import Block
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.few_rows.layers import LAYER, Known, known_of
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.many_rows import layer as kernels
from open_mythos.model.many_rows.views import KEPT, PASS, SCRATCH
from open_mythos.model.rows import Array, as_dimensions

_GAINS = ("attn_gain", "ffn_gain", "qk_gain", "q_gain", "kv_gain")
"""In the order in which a line of the compiled code's `gains` has them."""

_ALIGNED = 16
"""Numbers in a line of the caches: where arrays begin."""

_MOST_HELD = 2**24
"""Numbers in a piece of memory that is held for the next pass; more is given back."""

_FIELDS = {name: k for k, name in enumerate(PASS.names or ())}
_FIRST_WEIGHT = {name: LAYER.fields[name][1] // 8 for name in LAYER.names if LAYER.fields[name][0].shape}  # type: ignore[index, union-attr]


class _Places(NamedTuple):
    """Arrays that lie in one piece of memory."""

    offsets: npt.NDArray[np.int64]
    """In bytes."""
    size: int
    """In numbers."""


class LayerPlan:
    """What a pass needs to know of a block beside where things are: sizes, and how memory is laid out."""

    def __init__(self, block: Block, known: Known) -> None:
        attn, self.window = block.attn, block.attn.window
        dim = block.attn_norm.weight.shape[0]
        n_heads, rank, q_rank, latent, rebuilt = attn.n_heads, 0, 0, 0, 0
        self.entries: dict[str, tuple[int, ...]]
        """Sizes of what a position leaves for others, by the names of the cache."""
        if isinstance(attn, MLAttention):
            n_kv, key_width, value_width = n_heads, attn.nope_dim + attn.rope_dim, attn.v_dim
            rank, q_rank = attn.kv_norm.weight.shape[0], attn.q_norm.weight.shape[0]
            raw, rebuilt, latent = attn.down.weight.shape[0], n_kv, rank + attn.rope_dim
            self.entries = {"latent": (latent,)}
        else:
            n_kv, key_width, value_width = attn.n_kv_heads, attn.head_dim, attn.head_dim
            raw = attn.qkv.weight.shape[0]
            self.entries = {"k": (n_kv, key_width), "v": (n_kv, key_width)}
        shared = known["gate"].shape[0] if "gate" in known else 0
        n_experts, expert_width, _ = known["expert_gate"].shape if "expert_gate" in known else (0, 0, 0)
        top_k = known.get("top_k", 0)
        self.n_experts, self.top_k = int(n_experts), int(top_k)
        slots = top_k * expert_width
        kept = {
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
            "logits": n_experts,
            "factors": top_k,
            "expert_gates": slots,
            "expert_ups": slots,
        }
        scratch = {
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
            "dlogits": n_experts,
            "dhidden": shared,
            "rows": top_k * dim,
            "drows": top_k * dim,
            "row_grads": top_k * dim,
            "expert_hidden": slots,
            "dexpert_hidden": slots,
            "dexpert_gates": slots,
            "dexpert_ups": slots,
        }
        self._per_row = {
            KEPT: np.array([kept[name] for name in KEPT]),
            SCRATCH: np.array([scratch[name] for name in SCRATCH]),
        }
        self._places: dict[tuple[tuple[str, ...], int], _Places] = {}
        self._free: list[Array] = []
        names = self.names = tuple(weights_of(block, known))
        """Of the weights, in the order in which passes are given them."""
        self.gains = {name: known[name].numel() for name in _GAINS if name in names}
        self.sizes = {"n_heads": n_heads, "n_kv": n_kv, "key_width": key_width, "value_width": value_width}
        self.sizes["n_gains"] = sum(self.gains.values())
        layer, weights = np.zeros(1, LAYER), np.zeros(1, LAYER)
        for name, value in known.items():
            if isinstance(value, Tensor):
                layer[name][0, 1:] = as_dimensions(value)
            else:
                layer[name] = value
            if name in names:
                weights[name][0, 1:] = as_dimensions(value)
        # As words: NumPy copies what has fields field by field.
        self._layer, self._weights = layer.view(np.int64), weights.view(np.int64)

    def described(self, tensors: Mapping[str, Tensor], *, gradients: bool = False) -> npt.NDArray[Any]:
        """The layer as compiled code knows it, its weights these; or their gradients, with 0 for what has none."""
        words = (self._weights if gradients else self._layer).copy()
        for name, tensor in tensors.items():
            words[_FIRST_WEIGHT[name]] = tensor.data_ptr()
        return words.view(LAYER)

    def places(self, names: tuple[str, ...], n: int) -> _Places:
        """Where each of `names` begins in an array that has all of them, for so many rows."""
        key = names, n
        if key not in self._places:
            ends = np.cumsum(-(-self._per_row[names] * n // _ALIGNED) * _ALIGNED)
            self._places[key] = _Places(4 * np.concatenate([[0], ends[:-1]]), int(ends[-1]))
        return self._places[key]

    def room(self, n: int) -> Tensor:
        """For all that a pass over so many rows keeps. Memory is used again once nobody has the tensor any more.

        To get it from the system for every pass took a fifth of a small model's step: it comes page by page. What is
        too small is given back, so that there are never more pieces than were in use at once.
        """
        size = self.places(KEPT, n).size
        if size > _MOST_HELD:
            return torch.empty(size, dtype=torch.float32, device="cpu")
        memory = self._free.pop() if self._free else None
        if memory is None or memory.size < size:
            memory = np.empty(size, np.float32)
        lent = memory[:size]
        finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


class _Scratch(threading.local):
    """Memory that a pass needs while it runs; each thread has its own."""

    buffer = torch.empty(0, dtype=torch.float32, device="cpu")

    def room(self, size: int) -> Tensor:
        """So many numbers, until the next call."""
        buffer = self.buffer
        if buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.float32, device="cpu")
            if size <= _MOST_HELD:
                self.buffer = buffer
        return buffer


_scratch = _Scratch()


def weights_of(block: Block, known: Known) -> dict[str, Tensor]:
    """A block's parameters by the names that compiled code has for them."""
    found: dict[str, Tensor] = {name: w for name, w in known.items() if isinstance(w, nn.Parameter)}
    if isinstance(block.attn, MLAttention):
        found["kv_up"] = block.attn.kv_up.weight
    return found


def _state(block: Block, known: Known) -> list[Any]:
    """Changes when a plan no longer holds."""
    return [block.attn.window, *(x.shape if isinstance(x, Tensor) else x for x in known.values())]


_plans: WeakKeyDictionary[Block, tuple[list[Any], LayerPlan]] = WeakKeyDictionary()


def _plan(block: Block, known: Known) -> LayerPlan:
    """The block's plan, made anew where the last one's does not hold any more."""
    state, found = _state(block, known), _plans.get(block)
    if found is None or found[0] != state:
        found = _plans[block] = state, LayerPlan(block, known)
    return found[1]


class _Given(NamedTuple):
    """What a pass of a layer is about, beside its input and its weights."""

    plan: LayerPlan
    constants: dict[str, Tensor]
    """What the layer has beside its weights, by the names of compiled code."""
    rotations: Array
    threads: Threads
    active: Tensor | None
    before: tuple[Tensor, ...]
    """Entries of the loop before, for what is not active; or none."""


class WholeLayer:
    """Computes what a `Block` does, for all positions of sequences without a past."""

    def __init__(self, block: Block, threads: Threads) -> None:
        """For one pass: its weights may change between passes only."""
        known = known_of(block)
        self._plan, self._threads, self._weights = _plan(block, known), threads, weights_of(block, known)
        tensors = {name: x for name, x in known.items() if isinstance(x, Tensor)}
        self._constants = {name: x for name, x in tensors.items() if name not in self._weights}

    def __call__(
        self, x: Tensor, context: ForwardContext, address: CacheAddress, active: Tensor | None = None
    ) -> Tensor:
        """(batch, seq, dim) to the same shape; `active` (batch, seq) marks positions that have not halted."""
        plan, store, before = self._plan, context.store, {}
        if active is not None:
            assert active.shape == x.shape[:2], "what is read by its address must have its size"
            assert active.dtype == torch.bool, "what is read by its address must have its size"
            active = active.contiguous()
            before = store.before(address) if address.loop > 0 else {}
        old = tuple(tensor.contiguous() for tensor in before.values())
        assert all(tensor.shape[:2] == x.shape[:2] for tensor in old), "what is read by its address must have its size"
        given = _Given(plan, self._constants, context.rotations, self._threads, active, old)
        if torch.is_grad_enabled():
            out, load, *entries = _LayerPass.apply(given, x, *old, *self._weights.values())
        else:
            out, load, entries, _ = _forward(given, x.contiguous(), self._weights, keep=False)
        store.extend(address, dict(zip(plan.entries, entries, strict=True)), None)
        if context.expert_load is not None and plan.n_experts:
            context.expert_load[address] = load.sum(0)
        return out


class _LayerPass(torch.autograd.Function):
    """`apply(given, x, *before, *weights)`: the stream, the experts' load, and the entries.

    x and the new stream are (batch, seq, dim); the load is (parts, experts), slots of active positions. `before` and
    weights are those that are given and the block's, for PyTorch to see.
    """

    @staticmethod
    def forward(ctx: Any, given: _Given, x: Tensor, *before_and_weights: Tensor) -> tuple[Tensor, ...]:
        x, names = x.contiguous(), list(given.plan.names)
        weights = dict(zip(names, before_and_weights[len(given.before) :], strict=True))
        out, load, entries, kept = _forward(given, x, weights, keep=True)
        ctx.save_for_backward(x, given.active, *kept, *entries, *weights.values())
        ctx.given, ctx.parts = given._replace(active=None, before=()), len(load)
        ctx.n_before = len(given.before)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(load)
        return out, load, *entries

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None, *dentries: Tensor | None) -> tuple[Tensor | None, ...]:
        given, parts = ctx.given, ctx.parts
        plan, names = given.plan, list(given.plan.names)
        x, active, kept, counted, *rest = ctx.saved_tensors
        entries, weights = rest[: len(plan.entries)], dict(zip(names, rest[len(plan.entries) :], strict=True))
        dx, dbefore = torch.empty_like(x), [torch.empty_like(entry) for entry in entries[: ctx.n_before]]
        dsink, gains = x.new_empty(len(x), plan.sizes["n_heads"]), x.new_zeros(parts, plan.sizes["n_gains"])
        grads = {name: torch.empty_like(weight) for name, weight in weights.items()}
        tensors = {"x": x, "active": active, "dx": dx, "dsink": dsink, "gains": gains}
        tensors["dy"] = torch.zeros_like(x) if dy is None else dy.contiguous()
        tensors |= _numbered("entry", entries) | _numbered("dbefore", dbefore)
        tensors |= _numbered("dentry", [None if grad is None else grad.contiguous() for grad in dentries])
        layer = plan.described({**given.constants, **weights})
        scratch = _scratch.room(plan.places(SCRATCH, _rows(x)).size)
        row = _described(given, parts, kept, counted, scratch, tensors)
        with given.threads.lock:
            kernels.backward(layer, plan.described(grads, gradients=True), row)
        start = 0
        for name, size in plan.gains.items():
            grads[name] = gains[0, start : start + size].view(weights[name].shape)
            start += size
        if "sink" in grads:
            grads["sink"] = dsink[0]
        return None, dx, *dbefore, *grads.values()


def _forward(
    given: _Given, x: Tensor, weights: Mapping[str, Tensor], *, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor], tuple[Tensor, Tensor]]:
    """The stream, the load, the entries and, to `keep` or not, what the way back needs; x is contiguous."""
    plan, n = given.plan, _rows(x)
    parts = min(given.threads.n, n)
    needed = plan.places(SCRATCH, n).size
    kept_size = plan.places(KEPT, n).size
    scratch = _scratch.room(needed if keep else needed + kept_size)
    kept = plan.room(n) if keep else scratch[needed:]
    n_ends = parts * plan.n_experts
    counted = torch.empty(2 * n_ends + n * plan.top_k, dtype=torch.int64, device="cpu")
    out, entries = torch.empty_like(x), [x.new_empty(*x.shape[:2], *shape) for shape in plan.entries.values()]
    tensors = {"x": x, "y": out, "active": given.active}
    tensors |= _numbered("entry", entries) | _numbered("before", given.before)
    layer = plan.described({**given.constants, **weights})
    row = _described(given, parts, kept, counted, scratch, tensors)
    with given.threads.lock:
        kernels.forward(layer, row)
    return out, counted[n_ends + n * plan.top_k :].view(parts, plan.n_experts), entries, (kept, counted)


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


def _numbered(name: str, tensors: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    return {f"{name}_{k}": tensor for k, tensor in enumerate(tensors)}


def _described(
    given: _Given, parts: int, kept: Tensor, counted: Tensor, scratch: Tensor, tensors: Mapping[str, Tensor | None]
) -> npt.NDArray[Any]:
    """A pass as compiled code knows it, with 0 for tensors that there are not; who calls keeps them."""
    plan, x, rotations = given.plan, tensors["x"], given.rotations
    assert x is not None
    batch, seq, _ = x.shape
    n = batch * seq
    found = np.zeros(len(_FIELDS), np.int64)
    for names, memory in ((KEPT, kept), (SCRATCH, scratch)):
        first = _FIELDS[names[0]]
        found[first : first + len(names)] = plan.places(names, n).offsets + memory.data_ptr()
    integers, n_ends = counted.data_ptr(), parts * plan.n_experts
    numbers = {
        "ends": integers,
        "owners": integers + 8 * n_ends,
        "loads": integers + 8 * (n_ends + n * plan.top_k),
        "rotations": rotations.ctypes.data,
        "rotary_width": rotations.shape[1],
        "batch": batch,
        "seq": seq,
        "window": plan.window or seq,
        "parts": parts,
        **plan.sizes,
    }
    for name, number in numbers.items():
        found[_FIELDS[name]] = number
    for name, tensor in tensors.items():
        if tensor is not None:
            found[_FIELDS[name]] = tensor.data_ptr()
    return found.view(PASS)
