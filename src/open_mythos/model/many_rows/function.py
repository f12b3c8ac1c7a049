"""A pass of layers and of what stands around them over whole sequences, as something that PyTorch can differentiate.

Main entries: `WholeStage`, `WholeLoop`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.model.arithmetic.compiled import Threads
from open_mythos.model.block import Block
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext, Halting
from open_mythos.model.few_rows.layers import known_of
from open_mythos.model.many_rows import stage as kernels
from open_mythos.model.many_rows.memory import Scratch
from open_mythos.model.many_rows.plan import OUTSIDE, Around, StagePlan, plan_of, weights_of
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.rows import Array

_Placed: TypeAlias = dict[tuple[int, str], Tensor | None]
"""What compiled code looks for, by layer and name; None is what there is not."""

_FACTORS = ("attn_factors", "ffn_factors")
"""Of a layer, in the order in which its modules draw them."""

_scratch = Scratch()


class _Given(NamedTuple):
    """What a pass is about, beside the tensors that it can be differentiated by."""

    plan: StagePlan
    constants: list[dict[str, Tensor]]
    """What layers have beside their weights, by the names of compiled code."""
    rotations: Array
    threads: Threads
    n_before: int
    """Entries of the loop before, for what is not active."""
    active: Tensor | None
    factors: list[Tensor]
    """What dropout multiplies branches by, attention's and then feed-forward's of each layer; empty where none does."""


class _Tensors(NamedTuple):
    """What a pass can be differentiated by."""

    x: Tensor
    """The state or the stream, (batch, seq, dim)."""
    before: list[Tensor]
    """Entries of the loop before, of all layers one after another; or none."""
    around: dict[str, Tensor]
    weights: list[dict[str, Tensor]]

    @classmethod
    def of(cls, given: _Given, flat: Iterable[Tensor]) -> _Tensors:
        """From all of them in a row, as `flat` gives them; contiguous."""
        tensors = (tensor.contiguous() for tensor in flat)
        return cls(
            next(tensors),
            list(islice(tensors, given.n_before)),
            _named(given.plan.around.given, tensors),
            [_named(layer.names, tensors) for layer in given.plan.layers],
        )

    @property
    def flat(self) -> list[Tensor]:
        """All of them in a row."""
        weights = [weight for own in self.weights for weight in own.values()]
        return [self.x, *self.before, *self.around.values(), *weights]


class _Found(NamedTuple):
    """What a pass gives."""

    results: list[Tensor]
    """The next state or stream, (batch, seq, dim), and what positions may halt by, (batch, seq)."""
    loads: list[Tensor]
    """Of each layer, (parts, experts): slots of active positions."""
    entries: list[Tensor]
    """Of all layers one after another."""


class _Stage:
    """Layers in a row and what stands around them, for all positions of sequences without a past."""

    def __init__(self, stage: nn.Module, blocks: Iterable[nn.Module], threads: Threads, around: Around) -> None:
        """For one pass: weights may change between passes only. Plans are kept with `stage`."""
        layers: list[Block] = list(blocks)  # type: ignore[arg-type]
        known = [known_of(block) for block in layers]
        self._weights = [weights_of(block, own) for block, own in zip(layers, known, strict=True)]
        self._constants = [
            {name: x for name, x in own.items() if isinstance(x, Tensor) and name not in weights}
            for own, weights in zip(known, self._weights, strict=True)
        ]
        self._plan, self._threads = plan_of(stage, layers, known, around), threads
        self._dropped = [block.dropout.p if block.dropout.training else 0.0 for block in layers]
        """The share of what each layer's branches add that is left out."""

    def run(
        self,
        x: Tensor,
        around: Mapping[str, Tensor],
        context: ForwardContext,
        first: CacheAddress,
        active: Tensor | None,
    ) -> Sequence[Tensor]:
        """The result and halting probabilities, if any, given the state or the stream x and what is `around`.

        The first of the layers is at the address `first`.
        """
        plan, store = self._plan, context.store
        addresses = [first._replace(layer=first.layer + k) for k in range(len(plan.layers))]
        old: list[Tensor] = []
        if active is not None:
            assert active.shape == x.shape[:2], "what is read by its address must have its size"
            assert active.dtype == torch.bool, "what is read by its address must have its size"
            active = active.contiguous()
            if first.loop > 0:
                old = [tensor.contiguous() for address in addresses for tensor in store.before(address).values()]
        assert all(tensor.shape[:2] == x.shape[:2] for tensor in old), "what is read by its address must have its size"
        given = _Given(plan, self._constants, context.rotations, self._threads, len(old), active, self._factors(x))
        tensors = _Tensors(x, old, dict(around), self._weights).flat
        if torch.is_grad_enabled():
            flat = _StagePass.apply(given, *tensors)
            n, n_layers = len(plan.around.results), len(addresses)
            found = _Found(flat[:n], flat[n : n + n_layers], flat[n + n_layers :])
        else:
            found, _ = _forward(given, _Tensors.of(given, tensors), keep=False)
        entries = iter(found.entries)
        for address, layer, load in zip(addresses, plan.layers, found.loads, strict=True):
            store.extend(address, _named(layer.entries, entries), None)
            if context.expert_load is not None and layer.n_experts:
                context.expert_load[address] = load.sum(0)
        return found.results

    def _factors(self, x: Tensor) -> list[Tensor]:
        """Of dropout, drawn as the modules would draw them."""
        if not any(self._dropped):
            return []
        ones = torch.ones_like(x, memory_format=torch.contiguous_format)
        return [F.dropout(ones, share) for share in self._dropped for _ in _FACTORS]


class WholeStage:
    """Computes what layers in a row do, and a norm after them, if there is one."""

    def __init__(
        self, stage: nn.Module, blocks: Iterable[nn.Module], threads: Threads, norm: RMSNorm | None = None
    ) -> None:
        """For one pass: weights may change between passes only. Plans are kept with `stage`."""
        around = Around() if norm is None else Around(("norm_gain",), norm_eps=norm.eps)
        self._stage = _Stage(stage, blocks, threads, around)
        self._around = {} if norm is None else {"norm_gain": norm.weight}

    def __call__(
        self, x: Tensor, context: ForwardContext, address: CacheAddress, active: Tensor | None = None
    ) -> Tensor:
        """(batch, seq, dim) to the same shape; `active` (batch, seq) marks positions that have not halted."""
        return self._stage.run(x, self._around, context, address, active)[0]


class WholeLoop:
    """Computes what `RecurrentBlock.step` does, and halting probabilities with it."""

    def __init__(self, recurrent: RecurrentBlock, threads: Threads) -> None:
        """For one pass: weights may change between passes only."""
        self._recurrent, adapter, act = recurrent, recurrent.adapter, recurrent.act
        weights = ["a", "b"]
        if recurrent.loop_embedding is not None:
            weights.append("embedding")
        if adapter is not None:
            weights += ["down", "up", "scale"]
        if act is not None:
            weights += ["halt", "bias"]
        rank, eps = 0 if adapter is None else len(adapter.settled), 0.0 if act is None else act.eps
        self._stage = _Stage(recurrent, recurrent.blocks, threads, Around(tuple(weights), rank, halt_eps=eps))

    def __call__(
        self, h: Tensor, e: Tensor, t: int, context: ForwardContext, active: Tensor | None, index: int
    ) -> Tensor:
        """The next state, from the state h and the encoded input e, (batch, seq, dim).

        Loop t is the sequences' own loop `index`.
        """
        around = self._around(e, context, index)
        state, *probabilities = self._stage.run(h, around, context, CacheAddress("recurrent", 0, t), active)
        if probabilities:
            context.halting = Halting(state, *probabilities)
        return state

    def _around(self, e: Tensor, context: ForwardContext, index: int) -> dict[str, Tensor]:
        recurrent = self._recurrent
        around = {"e": e, "a": recurrent.injection.prepare(e, context).a, "b": recurrent.injection.B}
        if recurrent.loop_embedding is not None:
            around["embedding"] = recurrent.loop_embedding(index)
        if recurrent.adapter is not None:
            adapter = recurrent.adapter
            around |= {"down": adapter.down.weight, "up": adapter.up.weight, "scale": adapter.scale_in(context, index)}
        if recurrent.act is not None:
            around |= {"halt": recurrent.act.halt.weight, "bias": recurrent.act.halt.bias}
        return around


class _StagePass(torch.autograd.Function):
    """`apply(given, *tensors)`, these as `_Tensors` has them in a row; gives all that `_Found` has, in its order."""

    @staticmethod
    def forward(ctx: Any, given: _Given, *flat: Tensor) -> tuple[Tensor, ...]:
        tensors = _Tensors.of(given, flat)
        found, kept = _forward(given, tensors, keep=True)
        ctx.save_for_backward(given.active, *given.factors, *kept, *found.results, *found.entries, *tensors.flat)
        ctx.given, ctx.parts = given._replace(active=None, factors=[]), len(found.loads[0])
        ctx.n_factors, ctx.n_entries = len(given.factors), len(found.entries)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found.loads)
        return (*found.results, *found.loads, *found.entries)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        results, n_entries = ctx.given.plan.around.results, ctx.n_entries
        saved = iter(ctx.saved_tensors)
        given = ctx.given._replace(active=next(saved), factors=list(islice(saved, ctx.n_factors)))
        kept = list(islice(saved, 2))
        found, entries = list(islice(saved, len(results))), list(islice(saved, n_entries))
        tensors = _Tensors.of(given, saved)
        placed = _placed(given, tensors, found, entries)
        given_back = [None if grad is None else grad.contiguous() for grad in grads]
        dresults = dict(zip(results, given_back[: len(results)], strict=True))
        placed |= {(OUTSIDE, f"d{name}"): grad for name, grad in dresults.items()}
        placed |= _by_layer(given.plan, "dentry", given_back[-n_entries:])
        flat: list[Tensor | None] = [*_backward(given, tensors, ctx.parts, kept, placed).flat]
        if "p" in results and dresults["p"] is None:  # nobody asked who halts, which is no gradient, not one of zero
            for name in ("halt", "bias"):
                flat[1 + given.n_before + given.plan.around.given.index(name)] = None
        return None, *flat


def _forward(given: _Given, tensors: _Tensors, *, keep: bool) -> tuple[_Found, list[Tensor]]:
    """What is found, and what the way back needs, numbers and integers: nothing if it is not to be kept."""
    plan, x = given.plan, tensors.x
    parts = min(given.threads.n, x.shape[0] * x.shape[1])
    layout = plan.layout(x, parts, keep=keep)
    scratch, kept = _scratch.room(layout.sizes.scratch), plan.pool.room(layout.sizes.kept)
    counted = torch.empty(layout.sizes.counted // 2, dtype=torch.int64, device="cpu")
    results = [torch.empty_like(x), *(x.new_empty(x.shape[:2]) for _ in plan.around.results[1:])]
    loads = [counted[place].view(parts, -1) for place in layout.loads]
    shapes = [shape for layer in plan.layers for shape in layer.entries.values()]
    found = _Found(results, loads, [x.new_empty(*x.shape[:2], *shape) for shape in shapes])
    memory = kept.data_ptr(), scratch.data_ptr(), counted.data_ptr(), 0
    passes, around = layout.described(memory, _placed(given, tensors, found.results, found.entries), given.rotations)
    layers = plan.described(_with_constants(given, tensors))
    with given.threads.lock:
        kernels.forward(layers, passes, around)
    return found, [kept, counted]


def _backward(given: _Given, tensors: _Tensors, parts: int, kept: Sequence[Tensor], placed: _Placed) -> _Tensors:
    """The gradients of all that a pass can be differentiated by; what it was given and found, and more, is `placed`."""
    plan, x = given.plan, tensors.x
    layout = plan.layout(x, parts)
    scratch, gains = _scratch.room(layout.sizes.scratch), x.new_zeros(layout.sizes.gains)

    def room(k: int, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        places = {name: layout.gains.get((k, name)) for name in named}
        return {
            name: torch.empty_like(tensor) if places[name] is None else gains[places[name]].view(tensor.shape)
            for name, tensor in named.items()
        }

    grads = _Tensors(
        torch.empty_like(x),
        [torch.empty_like(entry) for entry in tensors.before],
        room(OUTSIDE, tensors.around),
        [room(k, weights) for k, weights in enumerate(tensors.weights)],
    )
    if placed[OUTSIDE, "dout"] is None:
        placed[OUTSIDE, "dout"] = torch.zeros_like(x)
    if plan.around.is_loop:
        placed |= {(OUTSIDE, "dh"): grads.x, (OUTSIDE, "de"): grads.around["e"]}
    else:
        placed[0, "dx"] = grads.x
        if not plan.around.has_norm:
            placed[len(plan.layers) - 1, "dy"] = placed[OUTSIDE, "dout"]
    placed |= _by_layer(plan, "dbefore", grads.before)
    numbers, integers = kept
    memory = numbers.data_ptr(), scratch.data_ptr(), integers.data_ptr(), gains.data_ptr()
    passes, around = layout.described(memory, placed, given.rotations)
    layers, matrices = plan.described(_with_constants(given, tensors)), plan.described(grads.weights, gradients=True)
    with given.threads.lock:
        kernels.backward(layers, matrices, passes, around)
    return grads


def _placed(given: _Given, tensors: _Tensors, results: Sequence[Tensor], entries: Sequence[Tensor]) -> _Placed:
    """Where compiled code looks for what, by layer and name."""
    plan = given.plan
    placed: _Placed = {(k, "active"): given.active for k in range(len(plan.layers))}
    placed |= {**_by_layer(plan, "entry", entries), **_by_layer(plan, "before", tensors.before)}
    factors = [(k, name) for k in range(len(plan.layers)) for name in _FACTORS]
    placed |= dict(zip(factors, given.factors, strict=True)) if given.factors else {}
    placed |= {(OUTSIDE, name): tensor for name, tensor in zip(plan.around.results, results, strict=True)}
    placed |= {(OUTSIDE, name): tensor for name, tensor in tensors.around.items()}
    placed[(OUTSIDE, "h") if plan.around.is_loop else (0, "x")] = tensors.x
    if not plan.around.changes_stream:
        placed[len(plan.layers) - 1, "y"] = results[0]
    return placed


def _by_layer(plan: StagePlan, name: str, tensors: Sequence[Tensor | None]) -> _Placed:
    """Entries of all layers, or what is like them; or none."""
    names = [(k, f"{name}_{kind}") for k, layer in enumerate(plan.layers) for kind in range(len(layer.entries))]
    return dict(zip(names, tensors, strict=True)) if tensors else {}


def _with_constants(given: _Given, tensors: _Tensors) -> list[dict[str, Tensor]]:
    return [{**own, **weights} for own, weights in zip(given.constants, tensors.weights, strict=True)]


def _named(names: Collection[str], tensors: Iterator[Tensor]) -> dict[str, Tensor]:
    """The next so many of them."""
    return dict(zip(names, islice(tensors, len(names)), strict=True))
