"""What the engine computes: encoding, one loop, and the readout, for the positions of several requests at once.

Main entry: `Runner`. It calls the model's own three stages, head and halting, or what stands in for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from open_mythos.inference.cache import PagedCache, RowTable
from open_mythos.inference.compiled import CompiledWaves, Stage
from open_mythos.inference.exit import ExitRule, LoopView
from open_mythos.inference.flight import Flight, Ints, Running
from open_mythos.inference.request import Request, Turn
from open_mythos.inference.wave import Lane, Places, WaveContext
from open_mythos.model.context import Constants, ForwardContext
from open_mythos.model.few_rows.stand_ins import FewRows
from open_mythos.model.halting import ACTHalting, has_moved
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.rows import Bools, Progress

if TYPE_CHECKING:
    from open_mythos.model.few_rows.ends import FewRowsEnds
    from open_mythos.model.few_rows.loop import FewRowsHalting, FewRowsLoop


class Failure(NamedTuple):
    """A request that cannot go on, and why."""

    request: int
    error: str


class _Company(NamedTuple):
    """Who runs together."""

    running: Running
    chosen: Tensor | None
    """Its lines as an index of the flight's tensors, as `_index` has it."""
    tables: list[RowTable]
    """Of each run's request."""
    places: Places
    asking: dict[ExitRule, list[int]]
    """Which of the lines ask which rule."""


class Runner:
    """Runs waves of requests through a model."""

    def __init__(self, model: OpenMythos, cache: PagedCache, compiled: CompiledWaves | None = None) -> None:
        """`compiled`, if given, computes waves of single positions."""
        self.model, self.cache, self._compiled = model, cache, compiled
        self._like = model.embed.weight
        self.flight = Flight(model.config.dim, self._like)
        self._constants: Constants = {}
        self._few: FewRows | None = None
        self._latest: _Company | None = None

    def rest(self) -> None:
        """Nothing is being computed: what has been found of the model, its weights and hooks, is found anew."""
        self._constants, self._few, self._latest = {}, None, None

    def encode(self, requests: Sequence[Request]) -> None:
        """Put the positions of each request that have not been encoded yet into the flight."""
        requests = sorted(requests, key=lambda request: request.n_pending > 1)
        each = [r.encoded if r.n_pending == 1 else np.arange(r.encoded, len(r.tokens)) for r in requests]
        places = Places(each, self.model.config.outer_reach)
        lanes = [Lane(r.table, at, None) for r, at in zip(requests, each, strict=True)]
        _place(lanes)
        ids = np.array([token for r in requests for token in r.pending], np.int64)
        e = self._encoded(ids, self._context(lanes, places))
        h = self.model.recurrent.initial_state(e.unsqueeze(0))[0]
        reached = [r.loops_before if self.model.config.halting == "settled" else 0 for r in requests]
        told = np.array([[r.index for r in requests], [r.n_loops for r in requests], reached])
        owner, most, before = told if places.n == len(lanes) else np.repeat(told, places.sizes, axis=1)
        self.flight.add(owner, places.positions, most, before, h, e)
        for request in requests:
            request.encoded = len(request.tokens)

    def _encoded(self, ids: Ints, context: WaveContext) -> Tensor:
        """Encoded inputs (n, dim) of token ids (n,)."""
        ends = self._ends(context)
        if ends is not None:
            return torch.from_numpy(ends.encode(ids, context))
        return self._run(_encode, context, self._there(ids).unsqueeze(0))[0]

    def loop(self, requests: Mapping[int, Request], most: int) -> tuple[int, list[Failure]]:
        """Loops of every position that has not halted, each at its own loop, up to `most` of them: how many.

        None is run after one in which a position halts or a request fails.
        """
        company = self._company(requests)
        loops = self.flight.loop[company.running.firsts].tolist()
        lanes = [Lane(*lane) for lane in zip(company.tables, company.places.each, loops, strict=True)]
        context = self._context(lanes, company.places)
        compiled: FewRowsLoop | None = context.stand_ins.get(self.model.recurrent)  # type: ignore[assignment]
        if compiled is None or company.asking or self.model.config.halting == "settled":
            return 1, self._one_loop(company, context)
        return self._several_loops(compiled, company, context, most), []

    def _several_loops(self, compiled: FewRowsLoop, company: _Company, context: WaveContext, most: int) -> int:
        """Loops after which nobody is asked who halts, up to `most`, or until one does: how many."""
        flight, lines, index = self.flight, company.running.lines, company.chosen
        loops, left = flight.loop[lines], flight.most[lines] - flight.loop[lines]
        n_loops, stops = min(most, *left.tolist()), np.zeros(len(lines), np.bool_)
        _place(context.lanes, n_loops)
        h, e = _of(flight.h, index).numpy().copy(), _of(flight.e, index).numpy()
        progress = Progress(lines, flight.mass.numpy(), flight.output.numpy(), stops, left)
        n = compiled.run(h, e, 0, n_loops, context, loops, progress)
        flight.h = _put(flight.h, index, torch.from_numpy(h))
        flight.loop[lines] += n
        flight.halt(lines[stops])
        return n

    def _one_loop(self, company: _Company, context: WaveContext) -> list[Failure]:
        """A loop, after which whoever has to be is asked who halts."""
        flight, index = self.flight, company.chosen
        h, e, loops = _of(flight.h, index), _of(flight.e, index), flight.loop[company.running.lines]
        t, own_index = self._there(loops), int(loops[0])
        _place(context.lanes)
        new = self._run(_loop, context, h[None], e[None], own_index if len(loops) == 1 else t.view(1, -1, 1))[0]
        failures = self._settle(company, context, t, h, new)
        flight.loop[company.running.lines] += 1
        return failures

    def _company(self, requests: Mapping[int, Request]) -> _Company:
        """What is running, with what stays the same from loop to loop."""
        flight, running = self.flight, self.flight.running
        if self._latest is None or self._latest.running is not running:
            owners = [requests[owner] for owner in flight.owner[running.firsts].tolist()]
            positions = flight.position[running.lines]
            each: list[Ints | int] = positions.tolist()
            if len(positions) > len(running.lengths):
                each = [_as_lane(run) for run in np.split(positions, np.cumsum(running.lengths)[:-1])]
            asking: dict[ExitRule, list[int]] = {}
            for i, owner in enumerate(np.repeat(np.arange(len(owners)), running.lengths).tolist()):
                rule = owners[owner].params.exit_rule
                if rule is not None:
                    asking.setdefault(rule, []).append(i)
            places = Places(each, self.model.config.loop_reach)
            tables = [request.table for request in owners]
            self._latest = _Company(running, self._index(running.lines), tables, places, asking)
        return self._latest

    def readout(self, turns: Sequence[Turn]) -> Tensor:
        """Logits (turns, vocab_size) after each turn's last position."""
        flight = self.flight
        order = list(range(len(turns)))
        if any(len(own) > 1 for _, own in turns):
            order.sort(key=lambda i: len(turns[i].lines) > 1)
        ordered = [turns[i] for i in order]
        lines = np.array([line for turn in ordered for line in turn.lines])
        each: list[Ints | int] = flight.position[lines].tolist()
        if len(lines) > len(turns):
            each = [_as_lane(flight.position[own.start : own.stop]) for _, own in ordered]
        lanes = [Lane(request.table, at, None) for (request, _), at in zip(ordered, each, strict=True)]
        states, places = self._outputs(self._index(lines)), Places(each, self.model.config.outer_reach)
        last = np.cumsum(places.sizes) - 1 if len(lines) > len(turns) else None
        logits = self._decoded(states, self._context(lanes, places), last)
        return logits if order == sorted(order) else logits[self._there(np.argsort(order))]

    def _decoded(self, states: Tensor, context: WaveContext, wanted: Ints | None) -> Tensor:
        """Logits (wanted, vocab_size) of states (n, dim); of all where none are `wanted`."""
        ends = self._ends(context)
        if ends is not None:
            return torch.from_numpy(ends.decode(states.numpy(), context, wanted))
        stage = _features if wanted is None else partial(_features, wanted=wanted)
        features = self._run(stage, context, states[None])[0]
        return self.model.logits(features if wanted is None else features[self._there(wanted)], context)

    def _index(self, lines: Ints) -> Tensor | None:
        """Lines of the flight as an index of its tensors; None for all of them in order."""
        if lines.tolist() == list(range(len(self.flight))):
            return None
        return self._there(lines)

    def _outputs(self, index: Tensor | None) -> Tensor:
        """What the coda reads of these lines, were this their last loop; the caller's own."""
        flight = self.flight
        if self.model.recurrent.act is None:
            states = flight.h
        elif np.count_nonzero(flight.active):
            rest = (1 - flight.mass) * self._there(flight.active)
            states = torch.addcmul(flight.output, rest.unsqueeze(-1), flight.h)
        else:
            states = flight.output
        return states.clone() if index is None else states[index]

    def _settle(
        self, company: _Company, context: ForwardContext, t: Tensor, before: Tensor, after: Tensor
    ) -> list[Failure]:
        """Weigh the states after a loop, as `ACTAccumulator` does, or as `SettledState`, and halt who is done."""
        flight, act = self.flight, self.model.recurrent.act
        lines, index = company.running.lines, company.chosen
        stops = flight.loop[lines] + 1 >= flight.most[lines]
        if self.model.config.halting == "settled":
            stops |= self._at_rest(lines, before, after)
        failures = self._ask_rules(company, t, before, after, stops)
        flight.h = _put(flight.h, index, after)
        if act is not None:
            stops = self._weigh(act, context, company, after, stops)
        flight.halt(lines[stops])
        return failures

    def _weigh(self, act: ACTHalting, context: ForwardContext, company: _Company, after: Tensor, stops: Bools) -> Bools:
        """Add states to the flight's output; which of the lines stop, as those of `stops` do in any case."""
        flight, threshold = self.flight, self.model.config.act_threshold
        lines, index = company.running.lines, company.chosen
        compiled: FewRowsHalting | None = context.stand_ins.get(act)  # type: ignore[assignment]
        if compiled is not None:
            compiled.weigh(after.numpy(), threshold, lines, flight.mass.numpy(), flight.output.numpy(), stops)
            return stops
        p, mass = act(after), _of(flight.mass, index)
        stop = self._there(stops) | (mass + p >= threshold)
        weight = torch.where(stop, 1 - mass, p)
        flight.mass = _put(flight.mass, index, mass + weight)
        output = torch.addcmul(_of(flight.output, index), weight.unsqueeze(-1), after)
        flight.output = _put(flight.output, index, output)
        return stop.cpu().numpy()

    def _at_rest(self, lines: Ints, before: Tensor, after: Tensor) -> Bools:
        """Which of the lines rest, as do all before them in their request; what runs of one is at the same loop."""
        flight, t = self.flight, self.flight.loop[lines]
        moved = np.zeros(len(flight), np.bool_)  # those that have halted do not move
        moved[lines] = has_moved(before, after, self.model.config.settle_tolerance).cpu().numpy()
        moved[lines] |= (t == 0) | (flight.reached[lines] > t + 1)
        first = np.maximum.accumulate(np.where(flight.owner != np.roll(flight.owner, 1), np.arange(len(flight)), 0))
        so_far = moved.cumsum()
        return (so_far == (so_far - moved)[first])[lines]

    def _ask_rules(self, company: _Company, t: Tensor, before: Tensor, after: Tensor, stops: Bools) -> list[Failure]:
        """Set `stops` where an exit rule says so; a rule that raises fails the requests that have it, and no others."""
        flight, failures, lines = self.flight, list[Failure](), company.running.lines
        for rule, who in company.asking.items():
            own, mine = torch.tensor(who, device=after.device), self._there(lines[who])
            kept = flight.memory.get(rule, {})
            view = LoopView(
                loop=t[own],
                before=before[own],
                after=after[own],
                readout=lambda own=own: linear(self.model.norm(after[own]), self.model.head_weight),  # type: ignore[misc]
                memory={name: x[mine] for name, x in kept.items()} if bool((t[own] > 0).any()) else {},
            )
            try:
                exits, memory = rule.exits(view)
                stops[who] |= exits.cpu().numpy()
            except Exception as error:  # the rule may be anybody's code
                for owner in sorted(set(flight.owner[lines[who]].tolist())):
                    failures.append(Failure(owner, f"exit_rule {rule!r} raised {type(error).__name__}: {error}"))
                continue
            flight.memory[rule] = {name: _scatter(kept.get(name), mine, x, len(flight)) for name, x in memory.items()}
        return failures

    def _context(self, lanes: Sequence[Lane], places: Places) -> WaveContext:
        """What a wave, and halting and head after it, share; what is compiled as a whole does without stand-ins."""
        context = WaveContext(self.model.config, self.cache, lanes, places, self._like, self._constants)
        if self._compiled is None or places.n > len(lanes):
            self._few = self._few or self.model.few_rows()
            context.stand_ins = self._few.stand_ins(context.n_new, context.longest)
        return context

    def _ends(self, context: WaveContext) -> FewRowsEnds | None:
        """What stands in for the model's `encode` and `decode`."""
        return self._few.ends if self._few is not None and context.stand_ins else None

    def _run(self, stage: Stage, context: WaveContext, *inputs: Tensor | int) -> Tensor:
        """One stage for the positions of a wave."""
        if self._compiled is not None and context.n_new == len(context.lanes):
            return self._compiled(stage, context.lanes, inputs)
        return stage(self.model, context, *inputs)

    def _there(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._like.device)


def _as_lane(positions: Ints) -> Ints | int:
    """As lanes have it."""
    return positions if len(positions) > 1 else int(positions[0])


def _place(lanes: Sequence[Lane], n_loops: int = 1) -> None:
    """Give the lanes' positions new rows for what the layers keep of them, in one loop or several."""
    for table, positions, loop in lanes:
        table.place(loop, positions, n_loops)


def _encode(model: OpenMythos, context: ForwardContext, ids: Tensor) -> Tensor:
    return model.encode(ids, context)


def _loop(model: OpenMythos, context: ForwardContext, h: Tensor, e: Tensor, own_index: int | Tensor) -> Tensor:
    return model.recurrent.step(h, e, 0, context, own_index=own_index)


def _features(model: OpenMythos, context: ForwardContext, states: Tensor, wanted: Ints | None = None) -> Tensor:
    return model.features(states, context, wanted=wanted)


def _of(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]


def _put(x: Tensor, index: Tensor | None, values: Tensor) -> Tensor:
    return values if index is None else x.index_copy(0, index, values)


def _scatter(kept: Tensor | None, index: Tensor, values: Tensor, n: int) -> Tensor:
    whole = values.new_zeros(n, *values.shape[1:]) if kept is None else kept
    return whole.index_copy(0, index, values)
