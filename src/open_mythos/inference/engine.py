"""Many requests through one model: continuous batching over depth and position.

Main entry: `Engine`. One step is schedule, run, postprocess. A request's result does not depend on its company: exits
are decided per position, and a halted position is frozen.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.inference.cache import PagedCache, RowTable
from open_mythos.inference.decoded_text import DecodedText
from open_mythos.inference.request import FinishReason, Output, Request
from open_mythos.inference.runner import Runner
from open_mythos.inference.sampling import SamplingParams, choose
from open_mythos.model.evaluation import evaluating
from open_mythos.model.mythos import OpenMythos

Prompt = Sequence[int]
_PAGE_SIZE = 16


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
    """Calls of the recurrent block."""
    lanes: int = 0
    """Requests in those calls, summed."""
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
        """Requests per call of the recurrent block."""
        return self.lanes / self.waves if self.waves else 0.0


def cache_bytes_needed(model: OpenMythos, length: int, n_loops: int) -> int:
    """The most bytes of cache that a request of so many positions, prompt included, can come to hold."""
    return _pages(model, length, n_loops) * PagedCache(model.config, 1, _PAGE_SIZE, model.embed.weight).page_bytes


class Engine:
    """Serves requests with one model, in a cache of at most `cache_bytes`.

    A request is begun while the positions being computed, those of its prompt included, are at most
    `max_batch_tokens`; a prompt longer than that is computed when nothing else is. With a tokenizer, outputs and
    events have text, and requests may have stop strings.
    """

    def __init__(
        self,
        model: OpenMythos,
        *,
        tokenizer: TextTokenizer | None = None,
        max_batch_tokens: int = 512,
        cache_bytes: int = 2**28,
    ) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}; it must be at least 1")
        self.model, self.tokenizer, self.max_batch_tokens = model, tokenizer, max_batch_tokens
        one = PagedCache(model.config, 1, _PAGE_SIZE, model.embed.weight)
        if cache_bytes < one.page_bytes:
            raise ValueError(f"cache_bytes is {cache_bytes}; it must be at least one page, {one.page_bytes}")
        self.cache = PagedCache(model.config, cache_bytes // one.page_bytes, _PAGE_SIZE, model.embed.weight)
        self.runner = Runner(model, self.cache)
        self._stats = Stats()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._reserved = self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting or self._running)

    def stats(self) -> Stats:
        """What has been done so far."""
        return replace(self._stats, cache_bytes=self.cache.bytes_in_use)

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
        """Admit requests, run one loop of all that are looping, and give those that have halted their next token."""
        begin = time.perf_counter()
        with torch.inference_mode(), evaluating(self.model):
            self._admit()
            for wave in _waves([r for r in self._running if r.loops is None]):
                self.runner.encode(wave)
            for wave in _waves(self._running):
                self._count(wave)
                self.runner.loop(wave)
            events = []
            for wave in _waves([r for r in self._running if r.loops is not None and not r.loops.active.any()]):
                events += self._next_tokens(wave)
        self._running = [request for request in self._running if request.output.finish_reason is None]
        self._stats.seconds += time.perf_counter() - begin
        return events

    def cancel(self, request: int) -> None:
        """End a request early, whatever it is doing; unknown or finished ones are left alone."""
        self._drop(request, "cancelled")

    def _drop(self, request: int, reason: FinishReason) -> None:
        for one in (*self._waiting, *self._running):
            if one.index == request:
                self._finish(one, reason)
        self._waiting = deque(one for one in self._waiting if one.index != request)
        self._running = [one for one in self._running if one.index != request]

    def _events(self, requests: Sequence[Request]) -> Generator[Event]:
        """What becomes of these requests, numbered as they stand; whoever closes this cancels what is left of them."""
        known = {request.index: number for number, request in enumerate(requests)}
        try:
            for number, request in enumerate(requests):
                if request.output.finish_reason is not None:
                    output = request.output
                    yield Event(number, None, None, output.finish_reason, output.text, output.error)
            while any(request.output.finish_reason is None for request in requests):
                for event in self.step():
                    if event.request in known:
                        yield event._replace(request=known[event.request])
        finally:
            for request in requests:
                self.cancel(request.index)

    def _call(self, on_event: Callable[[Event], None], event: Event, request: Request) -> None:
        try:
            on_event(event)
        except Exception as error:
            self._drop(request.index, "error")
            why = f"on_event raised {type(error).__name__}: {error}"
            request.output.finish_reason, request.output.error = "error", request.output.error or why

    def _submit(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]) -> list[Request]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params has {len(each)} entries; it must have one for each of the {len(prompts)} prompts")
        requests = [self._request(list(prompt), one) for prompt, one in zip(prompts, each, strict=True)]
        self._waiting.extend(request for request in requests if request.output.finish_reason is None)
        return requests

    def _request(self, prompt: list[int], params: SamplingParams) -> Request:
        """A request; one that cannot be served is finished at once, with the reason."""
        config = self.model.config
        n_loops = config.max_loop_iters if params.n_loops == "auto" else params.n_loops
        length = len(prompt) + params.max_new_tokens
        tokenizer = self.tokenizer
        output = Output([], [], [] if params.logprobs else None, text=None if tokenizer is None else "")
        self._submitted += 1
        request = Request(
            index=self._submitted - 1,
            prompt=prompt,
            params=params,
            n_loops=n_loops,
            table=RowTable(self.cache, length),
            reserved=_pages(self.model, length, n_loops),
            output=output,
            random=torch.Generator().manual_seed(params.seed),
            text=None if tokenizer is None else DecodedText(tokenizer, params.stop_strings),
        )
        wrong = self._why_not(request, length)
        if wrong is not None:
            output.finish_reason, output.error = "error", wrong
        return request

    def _why_not(self, request: Request, length: int) -> str | None:
        config, params = self.model.config, request.params
        if not request.prompt:
            return "prompt is empty; it must have at least one token"
        if params.stop_strings and request.text is None:
            return f"stop_strings is {params.stop_strings!r}; the engine must have a tokenizer to look for them"
        for name, tokens in (("prompt", request.prompt), ("stop_tokens", params.stop_tokens)):
            wrong = [token for token in tokens if not 0 <= token < config.vocab_size]
            if wrong:
                return f"{name} has {wrong[0]}; tokens must be from 0 to vocab_size - 1 ({config.vocab_size - 1})"
        if length > config.max_seq_len:
            parts = f"prompt has {len(request.prompt)} tokens and max_new_tokens is {params.max_new_tokens}"
            return f"{parts}; together they must be at most max_seq_len ({config.max_seq_len})"
        if request.reserved > self.cache.pages.n_pages:
            parts = f"the request may need {request.reserved * self.cache.page_bytes} bytes of cache"
            return f"{parts}; cache_bytes allows {self.cache.pages.n_pages * self.cache.page_bytes}"
        return None

    def _admit(self) -> None:
        """In the order of arrival, as many as there is certainly room for."""
        tokens = sum(len(request.pending) for request in self._running)
        while self._waiting:
            request = self._waiting[0]
            tokens += len(request.prompt)
            fits = tokens <= self.max_batch_tokens or not self._running
            if not fits or self._reserved + request.reserved > self.cache.pages.n_pages:
                return
            self._reserved += request.reserved
            self._running.append(self._waiting.popleft())

    def _next_tokens(self, wave: Sequence[Request]) -> list[Event]:
        events = []
        for request, logits in zip(wave, self.runner.readout(wave), strict=True):
            seen = torch.tensor([*request.prompt, *request.output.token_ids], device=logits.device)
            token, logprob = choose(logits, request.params, seen, request.random)
            assert request.loops is not None
            exit_loops = int(request.table.exits[request.loops.positions[-1]])
            self._stats.positions += len(request.loops.positions)
            request.loops = None
            output = request.output
            output.token_ids.append(token)
            output.exit_loops.append(exit_loops)
            if output.logprobs is not None and logprob is not None:
                output.logprobs.append(logprob)
            self._stats.tokens += 1
            before = len(output.text or "")
            if token in request.params.stop_tokens or _add_text(request, token):
                self._finish(request, "stop")
            elif len(output.token_ids) == request.params.max_new_tokens:
                self._finish(request, "length")
            text = None if output.text is None else output.text[before:]
            events.append(Event(request.index, token, exit_loops, output.finish_reason, text))
        return events

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request in self._running:
            self._reserved -= request.reserved
        request.table.release()
        request.output.finish_reason, request.loops = reason, None
        if request.text is not None and request.output.text is not None:
            request.output.text += request.text.finish()

    def _count(self, wave: Sequence[Request]) -> None:
        self._stats.waves += 1
        self._stats.lanes += len(wave)
        self._stats.loops += sum(int(r.loops.active.sum()) for r in wave if r.loops is not None)
        self._stats.peak_cache_bytes = max(self._stats.peak_cache_bytes, self.cache.bytes_in_use)


def _pages(model: OpenMythos, length: int, n_loops: int) -> int:
    """The most pages that a request of so many positions can come to hold."""
    c = model.config
    layers = c.prelude_layers + c.coda_layers + c.recurrent_layers * n_loops
    return layers * -(-length // _PAGE_SIZE)


def _add_text(request: Request, token: int) -> bool:
    """Whether the text with this token has a stop string."""
    if request.text is None or request.output.text is None:
        return False
    request.output.text += request.text.push(token)
    return request.text.stopped


def _waves(requests: Sequence[Request]) -> list[list[Request]]:
    """Single positions together, whatever their request, place and loop; every prompt by itself."""
    single = [request for request in requests if _width(request) == 1]
    return [*([single] if single else []), *([request] for request in requests if _width(request) > 1)]


def _width(request: Request) -> int:
    return (
        len(request.pending)
        if request.loops is None
        else int(request.loops.active.sum()) or len(request.loops.positions)
    )
