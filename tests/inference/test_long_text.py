"""Texts longer than the context: the same as `stream` while it holds, then from its second half, in one piece."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.data.tokenizer_spec import char_tokenizer
from open_mythos.inference.cache import cache_bytes_needed
from open_mythos.inference.engine import Engine
from open_mythos.inference.long_text import stream_long
from open_mythos.inference.sampling import SamplingParams
from tiny import tiny_config, tiny_model

CHARS = char_tokenizer(["abcdef"])
PARAMS = SamplingParams(max_new_tokens=40, n_loops=2, temperature=1.5, seed=4)


def _engine(**changes) -> Engine:
    model = tiny_model(tiny_config(**{"vocab_size": 7, "max_seq_len": 16, **changes}))
    return Engine(model, tokenizer=CHARS, cache_bytes=2**20)


def _tokens(events) -> list[int]:
    return [event.token for event in events]


def test_what_fits_is_what_stream_gives() -> None:
    engine, prompts = _engine(), [[1, 2, 3], [4]]
    params = [replace(PARAMS, max_new_tokens=n) for n in (5, 12)]
    assert list(stream_long(engine, prompts, params)) == list(engine.stream(prompts, params))


def test_a_full_context_goes_on_from_its_second_half() -> None:
    """Against the model itself, from the last 8 of 16 tokens each time."""
    engine, text = _engine(), [1, 2, 3]
    events = list(stream_long(engine, [text], [replace(PARAMS, temperature=0.0)]))
    context = torch.tensor([text])
    for room in (13, 8, 8, 8, 3):
        new = engine.model.generate(context, room, 2, 0.0)[0, context.shape[1] :].tolist()
        text, context = [*text, *new], torch.tensor([[*text, *new][-8:]])
    assert _tokens(events) == text[3:]
    assert [event.finish_reason for event in events] == [None] * 39 + ["length"]
    assert engine.cache.pages.n_free == engine.cache.pages.n_pages


def test_stretches_of_sampled_text_draw_other_numbers() -> None:
    """A model whose logits do not depend on the text: equal numbers would repeat the first stretch's tokens."""
    engine = _engine()
    with torch.no_grad():
        engine.model.norm.weight.zero_()
    tokens = _tokens(stream_long(engine, [[1] * 8], [PARAMS]))
    assert tokens[:8] != tokens[8:16]  # 7 ** -8 = 2e-7 by chance
    assert tokens == _tokens(stream_long(engine, [[1] * 8], [PARAMS]))


def test_a_stop_string_may_lie_across_two_stretches() -> None:
    engine = _engine()
    whole = list(stream_long(engine, [[1, 2, 3]], [PARAMS]))
    seam = sum(len(event.text) for event in whole[:13])
    text = "".join(event.text for event in whole)
    stop = text[seam - 3 : seam + 3]
    events = list(stream_long(engine, [[1, 2, 3]], [replace(PARAMS, stop_strings=(stop,))]))
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert len(events) >= 13
    assert not engine.busy


def test_a_character_may_lie_across_two_stretches() -> None:
    """Half of the tokens are the first byte of "é", "è" and others, the rest their second bytes."""
    engine, across = _engine(), 0
    halves = {"Ã": 0, "©": 1, "¨": 2, "ª": 3, "«": 4, "Å": 5}
    engine.tokenizer = TextTokenizer(Tokenizer(models.BPE(vocab=halves, merges=[])))
    engine.tokenizer.tokenizer.decoder = decoders.ByteLevel()
    for seed in range(3):
        events = list(stream_long(engine, [[1, 2, 3]], [replace(PARAMS, seed=seed)]))
        tokens = _tokens(events)
        assert "".join(event.text for event in events) == engine.tokenizer.decode(tokens)
        across += sum(tokens[seam - 1] in (0, 5) and tokens[seam] in (1, 2, 3, 4) for seam in (13, 21, 29, 37))
    assert across


def test_who_cannot_be_served_fails_alone_and_says_why() -> None:
    engine = _engine()
    events = list(stream_long(engine, [[1], [], [2] * 16], [replace(PARAMS, max_new_tokens=2)] * 3))
    assert [event.request for event in events if event.finish_reason == "error"] == [1, 2]
    assert "prompt is empty" in events[0].error
    assert "max_seq_len (16)" in events[1].error
    assert [event.token for event in events if event.request == 0][-1] is not None


def test_who_stops_listening_cancels_the_rest() -> None:
    engine = _engine()
    listening = stream_long(engine, [[1], [2]], [PARAMS] * 2)
    for _ in range(20):
        next(listening)
    listening.close()
    assert not engine.busy
    assert engine.cache.pages.n_free == engine.cache.pages.n_pages


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_the_bytes_that_a_request_needs_are_enough_and_no_byte_less_is(attn_type: str) -> None:
    model = tiny_model(tiny_config(attn_type))
    params = SamplingParams(max_new_tokens=4, n_loops=5)
    needed = cache_bytes_needed(model, 20, 5)
    (served,) = Engine(model, cache_bytes=needed).generate([[1] * 16], params)
    (refused,) = Engine(model, cache_bytes=needed - 1).generate([[1] * 16], params)
    assert served.finish_reason == "length"
    assert refused.finish_reason == "error"
