"""Text of requests, and the strings that end it: across tokens and split characters, alone and in company."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from tokenizers import Tokenizer, decoders, models

from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.data.tokenizer_spec import bpe_tokenizer, byte_tokenizer, char_tokenizer
from open_mythos.inference.decoded_text import DecodedText
from open_mythos.inference.engine import Engine, Event
from open_mythos.inference.sampling import SamplingParams
from tiny import tiny_config, tiny_model

BYTES = byte_tokenizer()
BPE = bpe_tokenizer(["the cat sat on the mat, the cat sat. " * 20, "日本語 déjà vu\n" * 10], 290)
CHARS = char_tokenizer(["abcdef"])
PROMPTS = [[1, 2, 3], [4], [5, 6]]


def _engine(tokenizer: TextTokenizer | None = CHARS) -> Engine:
    """Its model knows the tokens of CHARS: six letters and the end of text, which has no text."""
    return Engine(tiny_model(tiny_config(vocab_size=7)), tokenizer=tokenizer, cache_bytes=2**20)


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to where the first stop string is complete, without it: character by character."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@pytest.mark.parametrize("tokenizer", [BYTES, CHARS])
def test_every_text_of_two_letters_ends_where_the_first_stop_string_is_complete(tokenizer: TextTokenizer) -> None:
    for letters in itertools.product("ab", repeat=7):
        text = "".join(letters)
        for stops in (["ab"], ["aab", "ba"], ["bbb", "abab"], ["a"], ["aabaab"]):
            decoded = DecodedText(tokenizer, stops)
            parts = [decoded.push(token) for token in tokenizer.encode(text)]
            assert "".join([*parts, decoded.finish()]) == _cut(text, stops)
            assert decoded.stopped == (_cut(text, stops) != text)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
@pytest.mark.parametrize("stop", ["cat", "the mat", "語 d", "\n", "é", "nowhere", " sat. "])
def test_a_stop_string_is_found_as_soon_as_it_is_there(tokenizer: TextTokenizer, stop: str) -> None:
    text = "the cat sat on the mat.\n日本語 déjà vu the cat sat. end"
    decoded, ids, got = DecodedText(tokenizer, [stop]), tokenizer.encode(text), ""
    for n, token in enumerate(ids, start=1):
        got += decoded.push(token)
        assert decoded.stopped == (stop in tokenizer.decode(ids[:n]))
        assert text.startswith(got)
    assert got + decoded.finish() == text.split(stop)[0]


def test_a_stop_string_does_not_wait_for_the_character_that_its_token_begins() -> None:
    """Token 3 is "c" and the first byte of "é": that it is held back for the rest hid the stop string in it."""
    whole = Tokenizer(models.BPE(vocab={"c": 0, "Ã": 1, "©": 2, "cÃ": 3}, merges=[("c", "Ã")]))
    whole.decoder = decoders.ByteLevel()
    tokenizer = TextTokenizer(whole)
    assert tokenizer.decode([3, 2]) == "cé"
    decoded = DecodedText(tokenizer, ["c"])
    assert decoded.push(3) == ""
    assert decoded.stopped
    assert decoded.push(2) + decoded.finish() == ""


@pytest.mark.parametrize("seed", range(20))
def test_requests_end_at_their_own_stop_strings(seed: int) -> None:
    """Against the text without any: tokens up to the one that completes a stop string, and the text before it."""
    random = Random(seed)
    free = SamplingParams(max_new_tokens=20, n_loops=2, temperature=1.5, seed=seed)
    whole = _engine().generate(PROMPTS, free)
    stops = [tuple(_piece(random, output.text) for _ in range(random.randint(1, 2))) for output in whole]
    params = [replace(free, stop_strings=one) for one in stops]
    for output, full, one in zip(_engine().generate(PROMPTS, params), whole, stops, strict=True):
        assert output.text == _cut(full.text, one)
        assert full.token_ids[: len(output.token_ids)] == output.token_ids
        lengths = [n for n in range(1, 21) if any(stop in CHARS.decode(full.token_ids[:n]) for stop in one)]
        assert len(output.token_ids) == (lengths or [20])[0]
        assert output.finish_reason == ("stop" if lengths else "length")


def _piece(random: Random, text: str) -> str:
    """Some characters of a text, or some that it may not have."""
    begin = random.randrange(max(1, len(text)))
    return text[begin : begin + random.randint(1, 4)] or "fff"


def test_the_texts_of_events_join_to_the_output() -> None:
    engine, params = _engine(), SamplingParams(max_new_tokens=12, n_loops=2, seed=3, stop_strings=("ab", "fcc"))
    outputs = engine.generate(PROMPTS, params)
    texts = ["", "", ""]
    for event in engine.stream(PROMPTS, params):
        texts[event.request] += event.text
    assert texts == [output.text for output in outputs]


def test_the_token_that_ends_a_request_has_no_text() -> None:
    free = SamplingParams(max_new_tokens=8, n_loops=2, temperature=0.0)
    (output,) = _engine().generate([[1]], free)
    last = output.token_ids[3]
    (stopped,) = _engine().generate([[1]], replace(free, stop_tokens=(last,)))
    assert stopped.token_ids[-1] == last
    assert stopped.text == CHARS.decode(stopped.token_ids[:-1])


def test_without_a_tokenizer_there_is_no_text_and_stop_strings_fail_alone() -> None:
    engine, good = _engine(None), SamplingParams(max_new_tokens=3, n_loops=2, temperature=0.0)
    (alone,) = engine.generate([[1, 2]], good)
    outputs = engine.generate([[1, 2], [3]], [good, replace(good, stop_strings=("a",))])
    assert outputs[0] == alone
    assert alone.text is None
    assert outputs[1].finish_reason == "error"
    assert "stop_strings is ('a',); the engine must have a tokenizer" in outputs[1].error


@pytest.mark.parametrize("value", ["ab", ("",), (b"a",), (3,), None])
def test_stop_strings_that_are_none_are_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"stop_strings is .*; it must be a tuple of strings that are not empty"):
        SamplingParams(stop_strings=value)


@pytest.mark.parametrize("moment", [0, 1, 4])
def test_a_callback_that_raises_fails_its_request_alone(moment: int) -> None:
    """At its first token, a later one, and its last."""
    params = SamplingParams(max_new_tokens=5, n_loops=3, temperature=0.0)
    engine = _engine()
    expected = engine.generate(PROMPTS, params)
    seen: list[Event] = []

    def on_event(event: Event) -> None:
        seen.append(event)
        if event.request == 1 and sum(one.request == 1 for one in seen) == moment + 1:
            raise KeyError("no such listener")

    outputs = engine.generate(PROMPTS, params, on_event)
    assert [outputs[0], outputs[2]] == [expected[0], expected[2]]
    assert outputs[1].finish_reason == "error"
    assert outputs[1].error == "on_event raised KeyError: 'no such listener'"
    assert outputs[1].token_ids == expected[1].token_ids[: moment + 1]
    assert [one.token for one in seen if one.request == 2] == expected[2].token_ids
    assert engine.cache.pages.n_free == engine.cache.pages.n_pages
    assert engine.scheduler.reserved == 0
    assert not engine.busy


def test_a_callback_hears_of_requests_that_cannot_be_served() -> None:
    seen: list[Event] = []
    outputs = _engine().generate([[], [1]], SamplingParams(max_new_tokens=1, n_loops=1), seen.append)
    assert seen[0] == Event(0, None, None, "error", "", "prompt is empty; it must have at least one token")
    assert outputs[0].error == seen[0].error


def test_who_stops_listening_to_a_stream_cancels_the_rest_of_it() -> None:
    """What was left went on in the engine, and its events broke the next stream with a KeyError."""
    engine, params = _engine(), SamplingParams(max_new_tokens=6, n_loops=2, temperature=0.0)
    expected = engine.generate(PROMPTS, params)
    listening = engine.stream(PROMPTS, params)
    next(listening)
    listening.close()
    assert not engine.busy
    assert engine.cache.pages.n_free == engine.cache.pages.n_pages
    other = engine.submit([1, 2], params)
    tokens = [event.token for event in engine.stream(PROMPTS[:1], params)]
    assert tokens == expected[0].token_ids
    while engine.busy:
        engine.step()
    assert len(other.output.token_ids) == 6
