"""Many requests through one model: continuous batching over depth and position.

Main entry: `Engine`. One step is schedule, run, postprocess. A request's result does not depend on its company: exits
are decided within a request, and a halted position is frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.inference.cache import CacheLayout, PagedCache, RowTable
from open_mythos.inference.compiled import CompiledWaves
from open_mythos.inference.decoded_text import DecodedText
from open_mythos.inference.flight import Running
from open_mythos.inference.prefixes import Prefixes
from open_mythos.inference.request import FinishReason, Output, Request, Turn
from open_mythos.inference.runner import Failure, Runner
from open_mythos.inference.sampling import Asked, Choice, SamplingParams, choose_all, draw_draft
from open_mythos.inference.scheduler import Job, Scheduler
from open_mythos.inference.speculation import Speculation
from open_mythos.model.cache_sharing import CacheSharing, EveryLoop
from open_mythos.model.evaluation import evaluating
from open_mythos.model.mythos import OpenMythos

Prompt = Sequence[int]

_LOOPS_AT_ONCE = 4
"""After so many, a step ends even if nobody is due: others may want to begin or be cancelled."""


class Event(NamedTuple):
    """A new token of a request, or its end."""

    request: int
    token: int | None
    exit_loops: int | None
    finish_reason: FinishReason | None
    text: str | None = None
    """What has become certain of the request's text; all of them join to the output's. None without a tokenizer."""
    error: str | None = None


@dataclass
class Stats:
    """What the engine has done so far."""

    tokens: int = 0
    """New ones."""
    loops: int = 0
    """Loops of single positions, those of prompts included."""
    positions: int = 0
    waves: int = 0
    """Loops of whoever runs together."""
    lanes: int = 0
    """Requests in those loops, summed."""
    reused: int = 0
    """Positions of prompts that were known from earlier ones."""
    drafted: int = 0
    accepted: int = 0
    """Guesses of speculation, and those that were right."""
    seconds: float = 0.0
    cache_bytes: int = 0
    """Of the pages in use now."""
    peak_cache_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def loops_per_token(self) -> float:
        """Per position, prompts included."""
        return self.loops / self.positions if self.positions else 0.0

    @property
    def occupancy(self) -> float:
        """Requests per loop."""
        return self.lanes / self.waves if self.waves else 0.0


class _Due(NamedTuple):
    """Whose turn it is."""

    running: Running
    """What was looping when it was found."""
    loops: int | None
    """After how many more a guess may be due; None if nobody waits for one."""
    final: list[Turn]
    """Positions that have their last state."""
    guessing: list[Turn]
    """Newest positions that are far enough for a guess."""
    n: int
    """How many requests these belong to."""
    looping: int
    """How many have positions that have not halted."""
    others: int
    """How many of those are not due."""


class Engine:
    """Serves requests with one model, in a cache of at most `cache_bytes`; on a CPU it takes memory as it is written.

    A request is begun while the positions being computed, those of its prompt included, are at most
    `max_batch_tokens`; a prompt longer than that is computed when nothing else is. Pages that running requests do not
    need keep finished prompts, unless `reuse_prefixes` is False. `sharing` says which loops keep keys and values. With
    a tokenizer, outputs and events have text, and requests may have stop strings. With `compiled`, what is not a prompt
    goes through `CompiledWaves`.
    """

    def __init__(
        self,
        model: OpenMythos,
        *,
        tokenizer: TextTokenizer | None = None,
        max_batch_tokens: int = 2048,
        cache_bytes: int = 2**28,
        sharing: CacheSharing | None = None,
        reuse_prefixes: bool = True,
        compiled: bool = False,
    ) -> None:
        self.model, self.tokenizer, self._modules = model, tokenizer, list(model.modules())
        layout = CacheLayout(model.config, model.embed.weight.element_size(), sharing or EveryLoop())
        self.cache = PagedCache(layout, cache_bytes, model.embed.weight)
        self.scheduler = Scheduler(max_batch_tokens, self.cache.pages.n_pages)
        self.runner = Runner(model, self.cache, CompiledWaves(model, self.cache) if compiled else None)
        self._exact = self.cache.layout.sharing == EveryLoop()
        self._prefixes = Prefixes(self.cache)
        self._reuses = reuse_prefixes and self._exact
        self._stats = Stats()
        self._requests: dict[int, Request] = {}
        """Those that have not ended."""
        self._begun: dict[int, Request] = {}
        self._latest_due: _Due | None = None
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return self.scheduler.busy

    def stats(self) -> Stats:
        """What has been done so far."""
        return replace(self._stats, cache_bytes=self.cache.bytes_in_use)

    def forget_prefixes(self) -> None:
        """Let go of the prompts that are kept for reuse."""
        while self._prefixes.evict():
            pass

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        on_event: Callable[[Event], None] | None = None,
    ) -> list[Output]:
        """All outputs, in the order of the prompts.

        `on_event` is called with what `stream` would yield; if it raises, that request alone ends as an error.
        """
        requests = self._submit(prompts, params)
        with closing(self._events(requests)) as events:
            for event in events:
                if on_event is not None:
                    self._call(on_event, event, requests[event.request])
        return [request.output for request in requests]

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]) -> Iterator[Event]:
        """Tokens of all requests as they come; `request` counts the prompts. Who stops listening cancels the rest."""
        yield from self._events(self._submit(prompts, params))

    def submit(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Queue a request that `step` then serves; its `index` is the number that events and `cancel` use."""
        return self._submit([prompt], params)[0]

    def step(self) -> list[Event]:
        """Begin what there is room for, run a few loops unless somebody is due, then take next tokens if anybody is."""
        if not self.busy:
            return []
        begin = time.perf_counter()
        with torch.inference_mode(), evaluating(self._modules):
            events = list[Event]()
            fresh, due = self._begin(), self._due()
            if not fresh and not self.scheduler.takes_turn(due.n, due.others):
                events += self._loops(due)
                fresh, due = self._begin(), self._due()
            if fresh or self.scheduler.takes_turn(due.n, due.others):
                events += self._turn(due, fresh)
        self._stats.seconds += time.perf_counter() - begin
        return events

    def cancel(self, request: int) -> None:
        """End a request early, whatever it is doing; unknown or finished ones are left alone."""
        self._drop(request, "cancelled")

    def _drop(self, request: int, reason: FinishReason) -> None:
        if request in self._requests:
            self._finish(self._requests[request], reason)
            self.runner.flight.keep(self._still_wanted())

    def _events(self, requests: Sequence[Request]) -> Generator[Event]:
        """What becomes of these requests, numbered as they stand; whoever closes this cancels what is left of them."""
        known = {request.index: number for number, request in enumerate(requests)}
        open_ones = {request.index for request in requests if request.output.finish_reason is None}
        try:
            for number, request in enumerate(requests):
                if request.index not in open_ones:
                    output = request.output
                    yield Event(number, None, None, output.finish_reason, output.text, output.error)
            while open_ones:
                for event in self.step():
                    if event.request in known:
                        yield event._replace(request=known[event.request])
                open_ones &= self._requests.keys()
        finally:
            for request in requests:
                self.cancel(request.index)

    def _call(self, on_event: Callable[[Event], None], event: Event, request: Request) -> None:
        try:
            on_event(event)
        except Exception as error:  # the callback may be anybody's code
            self._drop(request.index, "error")
            why = f"on_event raised {type(error).__name__}: {error}"
            request.output.finish_reason, request.output.error = "error", request.output.error or why

    def _submit(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]) -> list[Request]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params has {len(each)} entries; it must have one for each of the {len(prompts)} prompts")
        requests = [self._request(list(prompt), one) for prompt, one in zip(prompts, each, strict=True)]
        for request in requests:
            if request.output.finish_reason is None:
                self._requests[request.index] = request
                self.scheduler.submit(
                    Job(request.index, len(request.prompt), self._pages(request.prompt, request.params))
                )
        return requests

    def _request(self, prompt: list[int], params: SamplingParams) -> Request:
        """A request; one that cannot be served is finished at once, with the reason."""
        tokenizer, n_loops = self.tokenizer, params.most_loops(self.model.config)
        wrong = self._why_not(prompt, params)
        # Only where nothing is wrong is its size certain to be a sensible one.
        capacity = 0 if wrong else len(prompt) + params.max_new_tokens
        output = Output([], [], [] if params.logprobs else None, text=None if tokenizer is None else "")
        self._submitted += 1
        request = Request(
            index=self._submitted - 1,
            prompt=prompt,
            params=params,
            n_loops=n_loops,
            table=RowTable(self.cache, capacity, n_loops),
            output=output,
            random=torch.Generator().manual_seed(params.seed),
            tokens=list(prompt),
            text=None if tokenizer is None else DecodedText(tokenizer, params.stop_strings),
        )
        if wrong is not None:
            output.finish_reason, output.error = "error", wrong
        return request

    def _why_not(self, prompt: list[int], params: SamplingParams) -> str | None:
        """What keeps such a request from ever being served."""
        config, length = self.model.config, len(prompt) + params.max_new_tokens
        if not prompt:
            return "prompt is empty; it must have at least one token"
        if params.stop_strings and self.tokenizer is None:
            return f"stop_strings is {params.stop_strings!r}; the engine must have a tokenizer to look for them"
        for name, tokens in (
            ("prompt", prompt),
            ("stop_tokens", params.stop_tokens),
            ("continuation", params.continuation or ()),
        ):
            wrong = [token for token in tokens if not 0 <= token < config.vocab_size]
            if wrong:
                return f"{name} has {wrong[0]}; tokens must be from 0 to vocab_size - 1 ({config.vocab_size - 1})"
        if length > config.max_seq_len:
            parts = f"prompt has {len(prompt)} tokens and max_new_tokens is {params.max_new_tokens}"
            return f"{parts}; together they must be at most max_seq_len ({config.max_seq_len})"
        if params.speculation is not None and not self._exact:
            return (
                f"speculation needs a cache in which every loop keeps its own; sharing is {self.cache.layout.sharing}"
            )
        if params.speculation is not None and config.halting == "settled":
            return (
                "speculation has positions at different loops, and settling needs them at the same one; halting must "
                "be 'act' or 'none', not 'settled'"
            )
        pages = self._pages(prompt, params)
        if pages > self.cache.pages.n_pages:
            parts = f"the request may need {pages * self.cache.layout.page_bytes} bytes of cache"
            return f"{parts}; cache_bytes allows {self.cache.pages.n_pages * self.cache.layout.page_bytes}"
        return None

    def _pages(self, prompt: list[int], params: SamplingParams) -> int:
        """The most pages that such a request can come to hold."""
        length, n_loops = len(prompt) + params.max_new_tokens, params.most_loops(self.model.config)
        return self.cache.layout.pages_for(length, n_loops)

    def _begin(self) -> list[Request]:
        """In the order of arrival, as many as there is certainly room for."""
        fresh, in_flight = list[Request](), len(self.runner.flight)
        while (job := self.scheduler.first_in_line()) is not None and self.scheduler.has_room(job, in_flight):
            while not self.scheduler.has_pages(job, self._prefixes.n_pages) and self._prefixes.evict():
                pass
            if not self.scheduler.has_pages(job, self._prefixes.n_pages):
                break
            request = self._requests[self.scheduler.begin().request]
            if self._may_reuse(request):
                request.done = self._prefixes.adopt(request.prompt, _settings(request), request.table)
                request.encoded = request.done
                self._stats.reused += request.done
            in_flight += request.n_pending
            self._begun[request.index] = request
            fresh.append(request)
        return fresh

    def _may_reuse(self, request: Request) -> bool:
        """Rows do not say whether a position that a rule has stopped was still moving, which settling would ask."""
        return self._reuses and (self.model.config.halting != "settled" or request.params.exit_rule is None)

    def _due(self) -> _Due:
        """Who is due: whoever was before, if nobody has begun, halted or ended since, nor can come near a guess."""
        running, latest = self.runner.flight.running, self._latest_due
        if latest is None or latest.running is not running or latest.loops is not None:
            self._latest_due = latest = self._find_due(running)
        return latest

    def _find_due(self, running: Running) -> _Due:
        flight = self.runner.flight
        looping, active = set(flight.owner[running.lines].tolist()), flight.active.tolist()
        loops: int | None = None
        final, guessing = list[Turn](), list[Turn]()
        nobody_is_final = len(running.lines) == len(flight)
        for index, (first, last) in flight.ends().items():
            request = self._begun[index]
            speculation = request.params.speculation
            if speculation is None and nobody_is_final:
                continue
            end = first + request.turn
            if index not in looping or not any(active[first:end]):
                final.append(Turn(request, range(first, end)))
            if speculation is not None and self._may_guess(request, speculation, last):
                missing = speculation.guesses_after(request.n_loops) - int(flight.loop[last])
                if missing <= 0 or not active[last]:
                    guessing.append(Turn(request, range(last, last + 1)))
                loops = max(1, missing) if loops is None else min(loops, max(1, missing))
        due = {turn.request.index for turn in (*final, *guessing)}
        return _Due(running, loops, final, guessing, len(due), len(looping), len(looping - due))

    def _may_guess(self, request: Request, speculation: Speculation, newest: int) -> bool:
        """Whether a guess is wanted after the newest position, as soon as that is far enough."""
        if request.done < len(request.prompt) or len(request.drafts) >= speculation.most:
            return False
        if len(request.output.token_ids) + len(request.drafts) + 2 > request.params.max_new_tokens:
            return False
        return bool(self.runner.flight.active[newest] or request.drafts)  # else it is final, and needs no guess

    def _loops(self, due: _Due) -> list[Event]:
        """Loops, while nobody halts or fails."""
        flight, stats, failures = self.runner.flight, self._stats, list[Failure]()
        left = min(due.loops or _LOOPS_AT_ONCE, _LOOPS_AT_ONCE)
        while left and not failures and flight.running is due.running:
            n, failures = self.runner.loop(self._requests, left)
            stats.waves += n
            stats.loops += n * len(due.running.lines)
            stats.lanes += n * due.looping
            left -= n
        stats.peak_cache_bytes = max(stats.peak_cache_bytes, self.cache.bytes_in_use)
        events = [self._fail(failure) for failure in failures]
        if failures:
            flight.keep(self._still_wanted())
        return events

    def _fail(self, failure: Failure) -> Event:
        request = self._requests[failure.request]
        request.output.error = failure.error
        self._finish(request, "error")
        return Event(request.index, None, None, "error", None, failure.error)

    def _turn(self, due: _Due, fresh: Sequence[Request]) -> list[Event]:
        """Next tokens and guesses; then encode these, and the prompts of requests that are new."""
        events = self._read(due.final, due.guessing) if due.n else []
        read = {turn.request.index: turn.request for turn in (*due.final, *due.guessing)}
        encoding = [r for r in (*read.values(), *fresh) if r.n_pending and r.index in self._begun]
        if encoding:
            self.runner.encode(encoding)
        return events

    def _read(self, final: Sequence[Turn], guessing: Sequence[Turn]) -> list[Event]:
        """One call of the coda for all of them; what is final leaves the flight."""
        flight = self.runner.flight
        logits = self.runner.readout([*final, *guessing])
        stays = np.ones(len(flight), np.bool_)
        for turn in final:
            stays[turn.lines.start : turn.lines.stop] = False
        exits = flight.loop[[turn.lines[-1] for turn in final]].tolist()
        choices = choose_all(logits[: len(final)], [_asked(turn.request) for turn in final])
        events = [
            self._next_token(turn.request, choice, exit_loops, stays)
            for turn, choice, exit_loops in zip(final, choices, exits, strict=True)
        ]
        for row, (request, _) in enumerate(guessing, len(final)):
            if request.index in self._begun and not request.n_pending:
                draft = draw_draft(
                    logits[row], Asked(request.params, request.tokens, request.random, len(request.tokens))
                )
                request.drafts.append(draft)
                request.tokens.append(draft.token)
                self._stats.drafted += 1
        if any(event.finish_reason is not None for event in events):
            stays &= self._still_wanted()
        flight.keep(stays)
        return events

    def _next_token(self, request: Request, choice: Choice, exit_loops: int, stays: NDArray[np.bool_]) -> Event:
        """Take the token after a request's final positions; guesses stand if it is the first of them."""
        output, params, n_done = request.output, request.params, request.turn
        self._stats.positions += n_done
        self._stats.tokens += 1
        request.done += n_done
        if request.done == len(request.prompt) and self._may_reuse(request):
            self._prefixes.add(request.prompt, _settings(request), request.table, request.n_loops)
        output.token_ids.append(choice.token)
        output.exit_loops.append(exit_loops)
        if output.logprobs is not None and choice.logprob is not None:
            output.logprobs.append(choice.logprob)
        if request.drafts and request.drafts[0].token == choice.token:
            request.drafts.pop(0)
            self._stats.accepted += 1
        else:
            if request.drafts:
                self._drop_guesses(request, stays)
            request.tokens.append(choice.token)
        before = len(output.text or "")
        if choice.token in params.stop_tokens or request.add_text(choice.token):
            self._finish(request, "stop")
        elif len(output.token_ids) == params.max_new_tokens:
            self._finish(request, "length")
        text = None if output.text is None else output.text[before:]
        return Event(request.index, choice.token, exit_loops, output.finish_reason, text)

    def _drop_guesses(self, request: Request, stays: NDArray[np.bool_]) -> None:
        flight = self.runner.flight
        stays[(flight.owner == request.index) & (flight.position >= request.done)] = False
        request.table.drop(range(request.done, request.encoded))
        request.encoded = request.done
        request.drafts.clear()
        del request.tokens[request.done :]

    def _still_wanted(self) -> NDArray[np.bool_]:
        """Which lines of the flight belong to requests that have not ended."""
        return np.isin(self.runner.flight.owner, list(self._begun))

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Free all that it holds but for its lines of the flight."""
        self.scheduler.end(request.index)
        request.table.release()
        request.output.finish_reason = reason
        if request.text is not None and request.output.text is not None:
            request.output.text += request.text.finish()
        del self._requests[request.index]
        self._begun.pop(request.index, None)
        if not self.busy:
            self._latest_due = None
            self.runner.rest()


def _asked(request: Request) -> Asked | None:
    """What choosing the token after a request's final positions takes; None for the likeliest, as it is."""
    if request.is_plain:
        return None
    n_seen, n_new = request.done + request.turn, len(request.output.token_ids)
    draft = request.drafts[0] if request.drafts else None
    return Asked(request.params, request.tokens, request.random, n_seen, n_new, draft)


def _settings(request: Request) -> Hashable:
    """What a prompt's rows depend on beside its tokens."""
    return request.n_loops, request.params.exit_rule
