"""What the engine computes: encoding, one loop, and the readout, for the positions of several requests at once.

Main entry: `Runner`. It calls the model's own three stages and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from open_mythos.inference.cache import PagedCache
from open_mythos.inference.exit import LoopView, Memory
from open_mythos.inference.request import Loops, Request
from open_mythos.inference.wave import Lane, WaveContext
from open_mythos.model.mythos import OpenMythos


class Runner:
    """Runs waves of requests through a model."""

    def __init__(self, model: OpenMythos, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self._like = model.embed.weight

    def encode(self, requests: Sequence[Request]) -> None:
        """Give each request the first state of its pending tokens."""
        pending = [np.arange(r.first_position, r.first_position + len(r.pending)) for r in requests]
        context = self._context([Lane(r.table, at, 0) for r, at in zip(requests, pending, strict=True)])
        ids = torch.zeros(context.valid.shape, dtype=torch.int64)
        for row, request in zip(ids, requests, strict=True):
            row[: len(request.pending)] = torch.tensor(request.pending)
        e = self.model.encode(ids.to(self._like.device), context)
        h = self.model.recurrent.initial_state(e)
        for request, at, own_e, own_h in zip(requests, pending, e, h, strict=True):
            n = len(at)
            mass, output = own_e.new_zeros(n), torch.zeros_like(own_e[:n])
            request.loops = Loops(at, own_h[:n], own_e[:n], mass, output, np.ones(n, bool))

    def loop(self, requests: Sequence[Request]) -> None:
        """One loop of every request's active positions, each request at its own loop; some then halt."""
        lanes = [_lane(request) for request in requests]
        context = self._context(lanes)
        h, e = (context.new_states([getattr(_loops(r), name)[_active(r)] for r in requests]) for name in ("h", "e"))
        own = torch.tensor([lane.loop for lane in lanes], device=h.device).view(-1, 1, 1)
        new = self.model.recurrent.step(h, e, 0, context, own_index=own)
        act = self.model.recurrent.act
        p = new.new_zeros(new.shape[:2]) if act is None else act(new)
        for index, request in enumerate(requests):
            n = len(lanes[index].positions)
            self._settle(request, new[index, :n], p[index, :n])

    def readout(self, requests: Sequence[Request]) -> Tensor:
        """Logits (requests, vocab_size) of the last pending position of each; all its positions have halted."""
        context = self._context([Lane(r.table, _loops(r).positions, 0) for r in requests])
        states = context.new_states([_loops(r).output for r in requests])
        features = self.model.features(states, context)
        last = torch.tensor([len(_loops(r).positions) - 1 for r in requests], device=features.device)
        chosen = features[torch.arange(len(requests), device=features.device), last]
        return torch.nn.functional.linear(chosen, self.model.head_weight)

    def _context(self, lanes: Sequence[Lane]) -> WaveContext:
        return WaveContext(self.model.config, self.cache, lanes, self._like)

    def _settle(self, request: Request, after: Tensor, p: Tensor) -> None:
        """Weigh the states after a loop, as `ACTAccumulator` does, and halt who is done."""
        loops, active = _loops(request), _active(request)
        before = loops.h[active]
        rule_stops, memory = self._ask_rule(request, before, after)
        last = loops.t + 1 == request.n_loops
        loops.h = loops.h.index_put((active,), after)
        if self.model.recurrent.act is None:
            stops = rule_stops | last
            loops.output = loops.h
        else:
            mass = loops.mass[active]
            stops = (mass + p >= self.model.config.act_threshold) | rule_stops | last
            weight = torch.where(stops, 1 - mass, p)
            loops.mass = loops.mass.index_put((active,), mass + weight)
            mean = torch.addcmul(loops.output[active], weight.unsqueeze(-1), after)
            loops.output = loops.output.index_put((active,), mean)
        loops.t += 1
        halted = stops.cpu().numpy()
        request.table.exits[loops.positions[loops.active][halted]] = loops.t
        loops.active[np.flatnonzero(loops.active)[halted]] = False
        loops.memory = {name: kept[~stops] for name, kept in memory.items()}

    def _ask_rule(self, request: Request, before: Tensor, after: Tensor) -> tuple[Tensor, Memory]:
        rule = request.params.exit_rule
        if rule is None:
            return torch.zeros(len(after), dtype=torch.bool, device=after.device), {}
        readout = lambda: torch.nn.functional.linear(self.model.norm(after), self.model.head_weight)  # noqa: E731
        return rule.exits(LoopView(before, after, readout, _loops(request).memory))


def _lane(request: Request) -> Lane:
    loops = _loops(request)
    return Lane(request.table, loops.positions[loops.active], loops.t)


def _active(request: Request) -> Tensor:
    loops = _loops(request)
    return torch.from_numpy(np.flatnonzero(loops.active)).to(loops.h.device)


def _loops(request: Request) -> Loops:
    assert request.loops is not None
    return request.loops
