"""A pass of layers and of what stands around them over whole sequences, as something that PyTorch can differentiate.

Main entries: `WholeStage`, `WholeLoop`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from open_mythos.model.arithmetic.compiled import Threads
from open_mythos.model.block import Block
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext, Halting
from open_mythos.model.few_rows.layers import known_of
from open_mythos.model.many_rows import stage as kernels
from open_mythos.model.many_rows.plan import AROUND, Around, Layout, Scratch, StagePlan, plan_of, weights_of
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.rows import Array

_scratch = Scratch()


class _Given(NamedTuple):
    """What a pass is about, beside the tensors that it can be differentiated by."""

    plan: StagePlan
    constants: list[dict[str, Tensor]]
    """What layers have beside their weights, by the names of compiled code."""
    rotations: Array
    threads: Threads
    around: tuple[str, ...]
    """What there is of what stands around them."""
    n_before: int
    """Entries of the loop before, for what is not active."""
    active: Tensor | None

    @property
    def n_results(self) -> int:
        """Two where positions may halt: the result and the probabilities that they do."""
        return 1 + ("halt" in self.around)


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
            _named(given.around, tensors),
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


class WholeStage:
    """Computes what layers in a row do, for all positions of sequences without a past; and a norm after them."""

    def __init__(
        self,
        stage: nn.Module,
        blocks: Iterable[Block],
        threads: Threads,
        norm: RMSNorm | None = None,
        around: Around | None = None,
    ) -> None:
        """For one pass: weights may change between passes only. Plans are kept with `stage`."""
        blocks = list(blocks)
        known = [known_of(block) for block in blocks]
        self._weights = [weights_of(block, own) for block, own in zip(blocks, known, strict=True)]
        self._constants = [
            {name: x for name, x in own.items() if isinstance(x, Tensor) and name not in weights}
            for own, weights in zip(known, self._weights, strict=True)
        ]
        self._norm = {} if norm is None else {"norm_gain": norm.weight}
        if around is None:
            around = Around() if norm is None else Around(has_norm=True, norm_eps=norm.eps)
        self._plan, self._threads = plan_of(stage, blocks, known, around), threads

    def __call__(
        self, x: Tensor, context: ForwardContext, address: CacheAddress, active: Tensor | None = None
    ) -> Tensor:
        """(batch, seq, dim) to the same shape; `active` (batch, seq) marks positions that have not halted."""
        return self.run(x, self._norm, context, address, active)[0]

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
        given = _Given(plan, self._constants, context.rotations, self._threads, tuple(around), len(old), active)
        tensors = _Tensors(x, old, dict(around), self._weights).flat
        if torch.is_grad_enabled():
            flat = _StagePass.apply(given, *tensors)
            n, n_layers = given.n_results, len(addresses)
            found = _Found(flat[:n], flat[n : n + n_layers], flat[n + n_layers :])
        else:
            found, _ = _forward(given, _Tensors.of(given, tensors), keep=False)
        entries = iter(found.entries)
        for address, layer, load in zip(addresses, plan.layers, found.loads, strict=True):
            store.extend(address, _named(layer.entries, entries), None)
            if context.expert_load is not None and layer.n_experts:
                context.expert_load[address] = load.sum(0)
        return found.results


class WholeLoop:
    """Computes what `RecurrentBlock.step` does, and halting probabilities with it."""

    def __init__(self, recurrent: RecurrentBlock, threads: Threads) -> None:
        """For one pass: weights may change between passes only."""
        self._recurrent, adapter, act = recurrent, recurrent.adapter, recurrent.act
        rank = 0 if adapter is None else adapter.settled.shape[0]
        around = Around(is_loop=True, rank=rank, halt_eps=0.0 if act is None else act.eps)
        self._stage = WholeStage(recurrent, recurrent.blocks, threads, around=around)  # type: ignore[arg-type]

    def __call__(
        self, h: Tensor, e: Tensor, t: int, context: ForwardContext, active: Tensor | None, index: int
    ) -> Tensor:
        """The next state, from the state h and the encoded input e, (batch, seq, dim); `index` is t as it is counted."""
        recurrent = self._recurrent
        injection, embedding, adapter, act = (
            recurrent.injection,
            recurrent.loop_embedding,
            recurrent.adapter,
            recurrent.act,
        )
        around = {"e": e, "a": injection.prepare(e, context).a, "b": injection.B}
        if embedding is not None:
            around["embedding"] = embedding(index)
        if adapter is not None:
            around |= {"down": adapter.down.weight, "up": adapter.up.weight, "scale": adapter.scale_in(context, index)}
        if act is not None:
            around |= {"halt": act.halt.weight, "bias": act.halt.bias}
        results = self._stage.run(h, around, context, CacheAddress("recurrent", 0, t), active)
        if act is not None:
            context.halting = Halting(*results)
        return results[0]


class _StagePass(torch.autograd.Function):
    """`apply(given, *tensors)`, these as `_Tensors` has them in a row; gives all that `_Found` has, in its order."""

    @staticmethod
    def forward(ctx: Any, given: _Given, *flat: Tensor) -> tuple[Tensor, ...]:
        tensors = _Tensors.of(given, flat)
        found, kept = _forward(given, tensors, keep=True)
        halts = found.results if given.n_results > 1 else []
        ctx.save_for_backward(given.active, *kept, *halts, *found.entries, *tensors.flat)
        ctx.given, ctx.n = given._replace(active=None), (len(halts), len(found.entries), len(found.loads[0]))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found.loads)
        return (*found.results, *found.loads, *found.entries)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n_halts, n_entries, parts = ctx.n
        active, *saved = ctx.saved_tensors
        kept, results, entries = saved[:2], saved[2 : 2 + n_halts], saved[2 + n_halts :][:n_entries]
        given, tensors = ctx.given._replace(active=active), _Tensors.of(ctx.given, saved[2 + n_halts + n_entries :])
        dresults = [None if grad is None else grad.contiguous() for grad in grads[: given.n_results]]
        dentries = [None if grad is None else grad.contiguous() for grad in grads[-n_entries:]]
        layout = given.plan.layout(*tensors.x.shape[:2], parts)
        return None, *_backward(given, layout, tensors, kept, results, entries, dresults, dentries).flat


def _forward(given: _Given, tensors: _Tensors, *, keep: bool) -> tuple[_Found, list[Tensor]]:
    """What is found, and what the way back needs, if it is to be kept: numbers and integers."""
    plan, x = given.plan, tensors.x
    parts = min(given.threads.n, x.shape[0] * x.shape[1])
    layout = plan.layout(*x.shape[:2], parts)
    needed = layout.sizes.scratch
    scratch = _scratch.room(needed if keep else needed + layout.sizes.kept)
    kept = plan.room(layout.sizes.kept) if keep else scratch[needed:]
    counted = torch.empty(layout.sizes.counted // 2, dtype=torch.int64, device="cpu")
    results = [torch.empty_like(x), x.new_empty(x.shape[:2])][: given.n_results]
    loads = [counted[place].view(parts, -1) for place in layout.loads]
    shapes = [shape for layer in plan.layers for shape in layer.entries.values()]
    found = _Found(results, loads, [x.new_empty(*x.shape[:2], *shape) for shape in shapes])
    memory = kept.data_ptr(), scratch.data_ptr(), counted.data_ptr(), 0
    passes, around = layout.described(memory, _placed(given, tensors, found.results, found.entries), given.rotations)
    layers = plan.described(_with_constants(given, tensors))
    with given.threads.lock:
        kernels.forward(layers, passes, around)
    return found, [kept, counted]


def _backward(
    given: _Given,
    layout: Layout,
    tensors: _Tensors,
    kept: Sequence[Tensor],
    results: Sequence[Tensor],
    entries: Sequence[Tensor],
    dresults: Sequence[Tensor | None],
    dentries: Sequence[Tensor | None],
) -> _Tensors:
    """The gradients of all that a pass can be differentiated by."""
    plan, (numbers, integers), x = given.plan, kept, tensors.x
    scratch, gains = _scratch.room(layout.sizes.scratch), x.new_zeros(layout.sizes.gains)
    matrices = [
        {name: torch.empty_like(weight) for name, weight in own.items() if (k, name) not in layout.gains}
        for k, own in enumerate(tensors.weights)
    ]
    dx, dbefore = torch.empty_like(x), [torch.empty_like(entry) for entry in tensors.before]
    de = {"e": torch.empty_like(x)} if "e" in tensors.around else {}
    dout, *dp = dresults
    dout = torch.zeros_like(x) if dout is None else dout
    placed = _placed(given, tensors, results, entries)
    placed |= {**_by_layer(plan, "dentry", dentries), **_by_layer(plan, "dbefore", dbefore)}
    placed |= {(AROUND, name): grad for name, grad in (("dout", dout), *(("dp", grad) for grad in dp))}
    if plan.around.is_loop:
        placed |= {(AROUND, "dh"): dx, (AROUND, "de"): de["e"]}
    else:
        placed[0, "dx"] = dx
        if not plan.around.has_norm:
            placed[len(plan.layers) - 1, "dy"] = dout
    memory = numbers.data_ptr(), scratch.data_ptr(), integers.data_ptr(), gains.data_ptr()
    passes, around = layout.described(memory, placed, given.rotations)
    layers = plan.described(_with_constants(given, tensors))
    with given.threads.lock:
        kernels.backward(layers, plan.described(matrices, gradients=True), passes, around)

    def gain(k: int, name: str, weight: Tensor) -> Tensor:
        found = gains[layout.gains[k, name]]
        return found.view(*weight.shape[::-1]).t() if name == "up" and k == AROUND else found.view(weight.shape)

    return _Tensors(
        dx,
        dbefore,
        {name: de[name] if name in de else gain(AROUND, name, weight) for name, weight in tensors.around.items()},
        [
            {name: own[name] if name in own else gain(k, name, weight) for name, weight in weights.items()}
            for k, (own, weights) in enumerate(zip(matrices, tensors.weights, strict=True))
        ],
    )


def _placed(
    given: _Given, tensors: _Tensors, results: Sequence[Tensor], entries: Sequence[Tensor]
) -> dict[tuple[int, str], Tensor | None]:
    """Where compiled code looks for what, by layer and name."""
    plan = given.plan
    placed: dict[tuple[int, str], Tensor | None] = {(k, "active"): given.active for k in range(len(plan.layers))}
    placed |= {**_by_layer(plan, "entry", entries), **_by_layer(plan, "before", tensors.before)}
    placed |= {(AROUND, name): tensor for name, tensor in zip(("out", "p"), results)}
    placed |= {(AROUND, name): tensor for name, tensor in tensors.around.items()}
    placed[(AROUND, "h") if plan.around.is_loop else (0, "x")] = tensors.x
    if results and not plan.around.changes_stream:
        placed[len(plan.layers) - 1, "y"] = results[0]
    return placed


def _by_layer(plan: StagePlan, name: str, tensors: Sequence[Tensor | None]) -> dict[tuple[int, str], Tensor | None]:
    """Entries of all layers, or what is like them; or none."""
    names = [(k, f"{name}_{kind}") for k, layer in enumerate(plan.layers) for kind in range(len(layer.entries))]
    return dict(zip(names, tensors, strict=True)) if tensors else {}


def _with_constants(given: _Given, tensors: _Tensors) -> list[dict[str, Tensor]]:
    return [{**own, **weights} for own, weights in zip(given.constants, tensors.weights, strict=True)]


def _named(names: Collection[str], tensors: Iterator[Tensor]) -> dict[str, Tensor]:
    """The next so many of them."""
    return dict(zip(names, islice(tensors, len(names)), strict=True))
