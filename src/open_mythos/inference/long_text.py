"""Text that may outgrow the context: where it is full, the model goes on from its second half.

Main entry: `stream_long`. Each stretch is a request of its own: the beginning of the text is forgotten, also by the
repetition penalty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from open_mythos.data.seeding import number
from open_mythos.inference.decoded_text import DecodedText
from open_mythos.inference.engine import Engine, Event, Prompt
from open_mythos.inference.sampling import SamplingParams


@dataclass
class _Writing:
    """One text: what the model still sees of it, and how much is to come."""

    place: int
    context: list[int]
    params: SamplingParams
    left: int
    text: DecodedText | None
    stretches: int = 0

    def wishes(self, max_seq_len: int) -> SamplingParams:
        """What to ask the engine for next, once the context has room for it.

        Stop strings are looked for here, as they may lie across two stretches.
        """
        if len(self.context) >= max_seq_len and self.stretches:
            self.context = self.context[-(max_seq_len // 2) :]
        room = min(self.left, max(1, max_seq_len - len(self.context)))
        seed = number(self.params.seed, self.stretches, "long text") if self.stretches else self.params.seed
        self.stretches += 1
        own = self.params.stop_strings if self.text is None else ()
        return replace(self.params, max_new_tokens=room, seed=seed, stop_strings=own)

    def take(self, event: Event) -> Event:
        """The event as one of the whole text."""
        reason = event.finish_reason
        if event.token is not None:
            self.context.append(event.token)
            self.left -= 1
        if reason == "length" and self.left:
            reason = None
        if self.text is None:
            return event._replace(request=self.place, finish_reason=reason)
        new = ""
        if event.token is not None and event.token not in self.params.stop_tokens:
            new = self.text.push(event.token)
            reason = "stop" if self.text.stopped else reason
        new += "" if reason is None else self.text.finish()
        return event._replace(request=self.place, finish_reason=reason, text=new)


def stream_long(engine: Engine, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Iterator[Event]:
    """As `engine.stream`, but `max_new_tokens` may be more than the context holds.

    A prompt must leave room for one token. Who stops listening cancels the rest.
    """
    running: dict[int, _Writing] = {}
    try:
        for place, (prompt, wishes) in enumerate(zip(prompts, params, strict=True)):
            text = None if engine.tokenizer is None else DecodedText(engine.tokenizer, wishes.stop_strings)
            yield from _submit(engine, _Writing(place, list(prompt), wishes, wishes.max_new_tokens, text), running)
        while running:
            for event in engine.step():
                if event.request in running:
                    yield from _go_on(engine, event, running)
    finally:
        for index in running:
            engine.cancel(index)


def _submit(engine: Engine, writing: _Writing, running: dict[int, _Writing]) -> list[Event]:
    """Ask for the next stretch; an event only if it cannot be had."""
    wishes = writing.wishes(engine.model.config.max_seq_len)
    request = engine.submit(writing.context, wishes)
    if request.output.finish_reason is None:
        running[request.index] = writing
        return []
    return [writing.take(Event(request.index, None, None, "error", None, request.output.error))]


def _go_on(engine: Engine, event: Event, running: dict[int, _Writing]) -> list[Event]:
    """The event, with what follows from it already done."""
    writing = running[event.request]
    own = writing.take(event)
    if own.finish_reason is None and event.finish_reason is None:
        return [own]
    del running[event.request]
    if own.finish_reason is None:
        return [own, *_submit(engine, writing, running)]
    engine.cancel(event.request)
    return [own]
