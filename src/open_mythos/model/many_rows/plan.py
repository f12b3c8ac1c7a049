"""How the memory of a stage's pass is laid out, and what compiled code is told of it beside where things are.

Main entries: `StagePlan`, `plan_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from open_mythos.model.block import Block
from open_mythos.model.few_rows.layers import LAYER, Known
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.many_rows.around import AROUND_PASS, AROUND_WEIGHTS
from open_mythos.model.many_rows.memory import MOST_HELD, Pool
from open_mythos.model.many_rows.views import KEPT, PASS, SCRATCH, SCRATCH_BACK
from open_mythos.model.rows import Array, Rows, as_dimensions

_GAINS = ("attn_gain", "ffn_gain", "qk_gain", "q_gain", "kv_gain")
"""In the order in which a line of the compiled code's `gains` has them."""

_ALIGNED = 16
"""Numbers in a line of the caches: where arrays begin."""

_MOST_LAYOUTS = 64
"""Of so many shapes a plan remembers the layout."""

_PASS_WORDS = len(PASS.names or ())
_FIELDS = {name: k for k, name in enumerate(PASS.names or ())}
_AROUND_FIELDS = {name: AROUND_PASS.fields[name][1] // 8 for name in AROUND_PASS.names}  # type: ignore[index, union-attr]
_FIRST_WEIGHT = {name: LAYER.fields[name][1] // 8 for name in LAYER.names if LAYER.fields[name][0].shape}  # type: ignore[index, union-attr]


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
        self.per_row = {**kept, **scratch}
        """Numbers for each position, of what is kept and of what is needed for a moment."""
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

    def described(self, tensors: Mapping[str, Tensor], *, gradients: bool = False) -> Rows:
        """The layer as compiled code knows it, its weights these; or their gradients, with 0 for what has none."""
        words = (self._weights if gradients else self._layer).copy()
        words[[_FIRST_WEIGHT[name] for name in tensors]] = [tensor.data_ptr() for tensor in tensors.values()]
        return words


class Around(NamedTuple):
    """What stands around the layers of a stage."""

    weights: tuple[str, ...] = ()
    """Some of `AROUND_WEIGHTS`."""
    rank: int = 0
    """Of the adapter; 0 is none."""
    halt_eps: float = 0.0
    norm_eps: float = 0.0

    @property
    def is_loop(self) -> bool:
        """Whether a state and an encoded input enter the stage, in place of a stream."""
        return "a" in self.weights

    @property
    def has_norm(self) -> bool:
        """Whether a norm follows the last layer."""
        return "norm_gain" in self.weights

    @property
    def changes_stream(self) -> bool:
        """Whether the last layer's stream is not yet the result."""
        return self.rank > 0 or self.has_norm

    @property
    def given(self) -> tuple[str, ...]:
        """By name, what a pass is given beside a state or a stream."""
        return ("e", *self.weights) if self.is_loop else self.weights

    @property
    def results(self) -> tuple[str, ...]:
        """By name, what comes out: the next state or the stream, and the probabilities that positions halt, if any."""
        return ("out", "p") if "halt" in self.weights else ("out",)

    def widths(self, dim: int) -> dict[str, int]:
        """How many numbers each weight has."""
        of_rank = {"scale": self.rank, "down": self.rank * dim, "up": self.rank * dim}
        widths = {**dict.fromkeys(AROUND_WEIGHTS, dim), **of_rank, "bias": 1}
        return {name: widths[name] for name in self.weights}


class Sizes(NamedTuple):
    """Of the memory of a pass, in float32 numbers."""

    kept: int
    """What the way back needs."""
    scratch: int
    """What is needed for a moment."""
    counted: int
    """Integers that the way back needs."""
    gains: int
    """Gradients of which every part has its own, zeros before."""


_KEPT, _SCRATCH, _COUNTED, _GAINS_MEMORY = range(1, 5)
OUTSIDE = -1
"""What stands around the layers, where a layer's number is asked for."""


class Layout:
    """Where everything lies in a pass over sequences of one shape."""

    def __init__(
        self, layers: Sequence[LayerPlan], around: Around, dim: int, shape: tuple[int, int, int], *, keep: bool
    ) -> None:
        """`shape` is how many sequences, positions of each and parts there are.

        Unless the way back needs it and asks to `keep` it, what a layer finds makes room for what the next one does.
        """
        self._keep, self._kept = keep, _KEPT if keep else _SCRATCH
        self._n = len(layers)
        # Addresses are counted from the beginning of a piece of memory, and nothing else from 0.
        self._words = np.zeros(self._n * _PASS_WORDS + AROUND_PASS.itemsize // 8, np.int64)
        self._counted_from = np.zeros(len(self._words), np.int64)
        self._sizes = [0] * (1 + len(Sizes._fields))
        self._shape = shape
        self.loads: list[slice] = []
        """Where each layer's experts' loads are among the integers."""
        self.gains: dict[tuple[int, str], slice] = {}
        """Where the gradient of a layer's gain or sink, or of a weight around the layers, is in the memory of these."""
        most = 0
        for k, layer in enumerate(layers):
            self._sizes[_SCRATCH] = 0  # the next layer needs the same
            self._place_layer(k, layer)
            most = max(most, self._sizes[_SCRATCH])
        self._sizes[_SCRATCH] = most
        self._place_streams(around, dim)
        self._place_around(around, dim)
        if keep:
            self._place_gradients(around, dim)
        self.sizes = Sizes(*self._sizes[1:])

    def _cell(self, k: int, name: str) -> int:
        return self._n * _PASS_WORDS + _AROUND_FIELDS[name] if k == OUTSIDE else k * _PASS_WORDS + _FIELDS[name]

    def _place(self, k: int, name: str, memory: int, numbers: int) -> None:
        """Memory for so many numbers, in whole lines."""
        cell = self._cell(k, name)
        self._words[cell], self._counted_from[cell] = 4 * self._sizes[memory], memory
        self._sizes[memory] += -(-numbers // _ALIGNED) * _ALIGNED

    def _same(self, k: int, name: str, other: int, others_name: str) -> None:
        cell, source = self._cell(k, name), self._cell(other, others_name)
        self._words[cell], self._counted_from[cell] = self._words[source], self._counted_from[source]

    def _place_layer(self, k: int, layer: LayerPlan) -> None:
        batch, seq, parts = self._shape
        n, scratch = batch * seq, (*SCRATCH, *SCRATCH_BACK) if self._keep else SCRATCH
        for names, memory in ((KEPT, self._kept), (scratch, _SCRATCH)):
            for name in names:
                self._place(k, name, memory, n * layer.per_row[name])
        for name, integers in (("ends", parts * layer.n_experts), ("owners", n * layer.top_k)):
            self._place(k, name, _COUNTED, 2 * integers)
        start = self._sizes[_COUNTED] // 2
        self.loads.append(slice(start, start + parts * layer.n_experts))
        self._place(k, "loads", _COUNTED, 2 * parts * layer.n_experts)
        self._place_gains(k, "gains", parts, layer.gains)
        self._place_gains(k, "dsink", batch, {"sink": layer.sizes["n_heads"]})
        numbers = {"batch": batch, "seq": seq, "parts": parts, "window": layer.window or seq, **layer.sizes}
        for name, number in numbers.items():
            self._words[self._cell(k, name)] = number

    def _place_gains(self, k: int, name: str, lines: int, widths: Mapping[str, int]) -> None:
        """Lines of gradients, which will be added up to the first."""
        start = self._sizes[_GAINS_MEMORY]
        for weight, width in widths.items():
            self.gains[k, weight] = slice(start, start + width)
            start += width
        self._place(k, name, _GAINS_MEMORY, lines * sum(widths.values()))

    def _place_streams(self, around: Around, dim: int) -> None:
        """What goes from layer to layer; what is neither placed here nor a layer's own is given."""
        size, last = self._shape[0] * self._shape[1] * dim, self._n - 1
        if around.is_loop:
            self._place(0, "x", self._kept, size)
        for k in range(last):
            if k > 1 and not self._keep:
                self._same(k, "y", k - 2, "y")
            else:
                self._place(k, "y", self._kept, size)
            self._same(k + 1, "x", k, "y")
        if around.changes_stream:
            self._place(last, "y", self._kept, size)

    def _place_gradients(self, around: Around, dim: int) -> None:
        """Of streams, and what goes around the layers."""
        n, last = self._shape[0] * self._shape[1], self._n - 1
        if around.is_loop:
            self._place(0, "dx", _SCRATCH, n * dim)
            self._place(OUTSIDE, "apart", _SCRATCH, n * dim)
            self._place(OUTSIDE, "dlow", _SCRATCH, n * around.rank)
        for k in range(last):
            self._place(k, "dy", _SCRATCH, n * dim)
            self._same(k + 1, "dx", k, "dy")
        if around.is_loop or around.has_norm:
            self._place(last, "dy", _SCRATCH, n * dim)

    def _place_around(self, around: Around, dim: int) -> None:
        n, parts, rank = self._shape[0] * self._shape[1], self._shape[2], around.rank
        self._place(OUTSIDE, "low", self._kept, n * rank)
        self._place(OUTSIDE, "norm_scales", self._kept, n)
        if around.rank:
            self._place(OUTSIDE, "branches", _SCRATCH, n * dim)
            self._place(OUTSIDE, "scaled_low", _SCRATCH, n * rank)
        widths = around.widths(dim)
        self._place_gains(OUTSIDE, "gains", parts, widths)
        for name in widths:
            cell = self._cell(OUTSIDE, f"d{name}")
            self._words[cell], self._counted_from[cell] = 4 * self.gains[OUTSIDE, name].start, _GAINS_MEMORY
        numbers = {"dim": dim, "rank": rank, "n_gains": sum(widths.values())}
        for name, number in numbers.items():
            self._words[self._cell(OUTSIDE, name)] = number
        record = self._words[self._n * _PASS_WORDS :].view(AROUND_PASS)
        record["halt_eps"], record["norm_eps"] = around.halt_eps, around.norm_eps

    def described(
        self, memory: tuple[int, int, int, int], given: Mapping[tuple[int, str], Tensor | None], rotations: Array
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Layers' passes and what is around them as compiled code knows them; who calls keeps what is given.

        That is by layer and name; `memory` is where each piece begins, in the order of `Sizes`.
        """
        words = self._words + np.array([0, *memory])[self._counted_from]
        found = {self._cell(*name): tensor.data_ptr() for name, tensor in given.items() if tensor is not None}
        words[list(found)] = list(found.values())
        passes, around = words[: self._n * _PASS_WORDS].view(PASS), words[self._n * _PASS_WORDS :].view(AROUND_PASS)
        passes["rotations"], passes["rotary_width"] = rotations.ctypes.data, rotations.shape[1]
        return passes, around


class StagePlan:
    """What passes of some layers and of what stands around them need to know beside where things are."""

    def __init__(self, blocks: Sequence[Block], known: Sequence[Known], around: Around) -> None:
        self.layers = [LayerPlan(block, own) for block, own in zip(blocks, known, strict=True)]
        self.around, self._dim = around, blocks[0].attn_norm.weight.shape[0]
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self.pool = Pool(len(blocks) * MOST_HELD)
        """For what passes keep."""

    def layout(self, x: Tensor, parts: int, *, keep: bool = True) -> Layout:
        """Where everything lies in a pass over x (batch, seq, dim) that is done in so many parts."""
        key = x.shape[0], x.shape[1], parts, keep
        found = self._layouts.get(key)
        if found is None:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            found = self._layouts[key] = Layout(self.layers, self.around, self._dim, key[:3], keep=keep)
        return found

    def described(self, weights: Sequence[Mapping[str, Tensor]], *, gradients: bool = False) -> npt.NDArray[Any]:
        """The layers as compiled code knows them; see `LayerPlan.described`."""
        lines = [layer.described(own, gradients=gradients) for layer, own in zip(self.layers, weights, strict=True)]
        return np.concatenate(lines).view(LAYER)


def weights_of(block: Block, known: Known) -> dict[str, Tensor]:
    """A block's parameters by the names that compiled code has for them."""
    found: dict[str, Tensor] = {name: w for name, w in known.items() if isinstance(w, nn.Parameter)}
    if isinstance(block.attn, MLAttention):
        found["kv_up"] = block.attn.kv_up.weight
    return found


_plans: WeakKeyDictionary[nn.Module, tuple[list[Any], StagePlan]] = WeakKeyDictionary()


def plan_of(stage: nn.Module, blocks: Sequence[Block], known: Sequence[Known], around: Around) -> StagePlan:
    """The plan of a stage, made anew where the last one's does not hold any more."""
    state, found = _state(blocks, known, around), _plans.get(stage)
    if found is None or found[0] != state:
        found = _plans[stage] = state, StagePlan(blocks, known, around)
    return found[1]


def _state(blocks: Sequence[Block], known: Sequence[Known], around: Around) -> list[Any]:
    """Changes when a plan no longer holds."""
    values = [x.shape if isinstance(x, Tensor) else x for own in known for x in own.values()]
    return [around, *(block.attn.window for block in blocks), *values]
