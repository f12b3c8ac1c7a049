"""Batched = alone = the plain model, whatever the company: tokens, exit loops, and the cache's bytes."""

from __future__ import annotations

from random import Random

import pytest
import torch

from open_mythos.inference.engine import Engine
from open_mythos.inference.exit import PredictionChange, StableArgmax, StateChange
from open_mythos.inference.sampling import SamplingParams
from tiny import tiny_config, tiny_model

RULES = [None, StateChange(0.3), PredictionChange(0.05), StableArgmax(2)]


def _config(random: Random):
    return tiny_config(
        random.choice(["gqa", "mla"]),
        halting=random.choice(["act", "none"]),
        window=random.choice([None, 3]),
        outer_window=random.choice([None, 4]),
        n_experts=random.choice([0, 4]),
        recurrent_layers=random.choice([1, 2]),
        prelude_layers=random.choice([0, 1, 2]),
        attention_sink=random.choice([True, False]),
        use_rope=random.choice([True, True, False]),
        state_init=random.choice(["input", "zeros"]),
    )


def _prompts(random: Random, n: int, vocab: int) -> list[list[int]]:
    return [[random.randrange(vocab) for _ in range(random.randint(1, 12))] for _ in range(n)]


@pytest.mark.parametrize("seed", range(40))
def test_company_changes_nothing(seed: int) -> None:
    random = Random(seed)
    model = tiny_model(_config(random), seed)
    prompts = _prompts(random, random.randint(2, 5), model.config.vocab_size)
    params = [
        SamplingParams(
            max_new_tokens=random.randint(1, 6),
            n_loops=random.randint(1, 6),
            temperature=0.0,
            exit_rule=random.choice(RULES),
        )
        for _ in prompts
    ]
    together = Engine(model, max_batch_tokens=random.randint(1, 40), cache_bytes=2**20).generate(prompts, params)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        (alone,) = Engine(model, cache_bytes=2**20).generate([prompt], one)
        assert output.token_ids == alone.token_ids
        assert output.exit_loops == alone.exit_loops
        assert output.finish_reason == "length"


@pytest.mark.parametrize("seed", range(40))
def test_the_engine_is_the_model(seed: int) -> None:
    """Without a rule of its own: tokens of `generate`, and exit loops of the full forward."""
    random = Random(1000 + seed)
    model = tiny_model(_config(random), seed)
    prompts = _prompts(random, 3, model.config.vocab_size)
    n_loops = random.randint(1, 6)
    params = SamplingParams(max_new_tokens=5, n_loops=n_loops, temperature=0.0, logprobs=True)
    engine = Engine(model, cache_bytes=2**20)
    for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
        expected = model.generate(torch.tensor([prompt]), 5, n_loops, 0.0)[0]
        assert [*prompt, *output.token_ids] == expected.tolist()
        full = model(expected[:-1].unsqueeze(0), n_loops, full_output=True)
        assert output.exit_loops == full.exit_loops[0, len(prompt) - 1 :].tolist()
        logprobs = full.logits[0, len(prompt) - 1 :].log_softmax(-1)
        chosen = logprobs.gather(-1, expected[len(prompt) :].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.tensor(output.logprobs), chosen.detach(), atol=1e-4, rtol=1e-4)
    assert engine.cache.pages.n_free == engine.cache.pages.n_pages


def _engine(**changes) -> Engine:
    return Engine(tiny_model(tiny_config()), **{"cache_bytes": 2**20, **changes})


def test_streamed_events_are_the_outputs() -> None:
    engine = _engine()
    prompts, params = [[1, 2, 3], [4], [5, 6]], SamplingParams(max_new_tokens=4, n_loops=3, seed=2)
    outputs = engine.generate(prompts, params)
    tokens: list[list[int]] = [[], [], []]
    exits: list[list[int]] = [[], [], []]
    reasons = {}
    for event in engine.stream(prompts, params):
        tokens[event.request].append(event.token)
        exits[event.request].append(event.exit_loops)
        if event.finish_reason:
            reasons[event.request] = event.finish_reason
    assert tokens == [output.token_ids for output in outputs]
    assert exits == [output.exit_loops for output in outputs]
    assert reasons == {0: "length", 1: "length", 2: "length"}


def test_a_wrong_request_fails_alone_and_says_why() -> None:
    engine = _engine(cache_bytes=2**16)
    good = SamplingParams(max_new_tokens=3, n_loops=2, temperature=0.0)
    (alone,) = engine.generate([[1, 2]], good)
    prompts = [[1, 2], [], [99], [1] * 63, [3], [1] * 40]
    deep, stop = SamplingParams(max_new_tokens=3, n_loops=10_000), SamplingParams(stop_tokens=(77,))
    outputs = engine.generate(prompts, [good, good, good, good, stop, deep])
    assert outputs[0] == alone
    says = ["prompt is empty", "prompt has 99", "max_seq_len (64)", "stop_tokens has 77", "cache_bytes allows"]
    for output, words in zip(outputs[1:], says, strict=True):
        assert output.finish_reason == "error"
        assert words in output.error
        assert output.token_ids == []
    assert engine.stats().cache_bytes == 0


def test_a_request_cancelled_in_any_state_leaves_the_others_alone() -> None:
    params = SamplingParams(max_new_tokens=5, n_loops=3, temperature=0.0)
    prompts = [[1, 2, 3], [4, 5], [6]]
    expected = _engine().generate(prompts, params)
    for moment in range(14):
        engine = _engine(max_batch_tokens=5)
        requests = engine._submit(prompts, params)
        for _ in range(moment):
            engine.step()
        engine.cancel(1)
        engine.cancel(99)
        while engine.busy:
            engine.step()
        assert requests[0].output == expected[0]
        assert requests[2].output == expected[2]
        assert requests[1].output.finish_reason in ("cancelled", "length")
        assert requests[1].output.token_ids == expected[1].token_ids[: len(requests[1].output.token_ids)]
        assert engine.cache.pages.n_free == engine.cache.pages.n_pages


def test_stop_tokens_end_a_request_and_are_its_last() -> None:
    engine = _engine()
    free = SamplingParams(max_new_tokens=6, n_loops=2, temperature=0.0)
    (output,) = engine.generate([[1, 2, 3]], free)
    stop = output.token_ids[2]
    params = SamplingParams(max_new_tokens=6, n_loops=2, temperature=0.0, stop_tokens=(stop,))
    (stopped,) = engine.generate([[1, 2, 3]], params)
    assert stopped.token_ids == output.token_ids[: output.token_ids.index(stop) + 1]
    assert stopped.finish_reason == "stop"


def test_only_what_is_computed_is_stored() -> None:
    """To the page: a row per position in each outer layer, and one per loop that it ran in each looped one."""
    model = tiny_model(tiny_config(recurrent_layers=2))
    engine = Engine(model, cache_bytes=2**20)
    requests = engine._submit([[1, 2, 3, 4, 5, 6, 7]], SamplingParams(max_new_tokens=2, n_loops=6))
    while not requests[0].output.token_ids:
        engine.step()
    table, config = requests[0].table, model.config
    exits = table.exits[:7]
    assert len(set(exits.tolist())) > 1
    loops = [int((exits > t).sum()) for t in range(6)]
    size = engine.cache.page_size
    outer = (config.prelude_layers + config.coda_layers) * -(-7 // size)
    pages = outer + config.recurrent_layers * sum(-(-n // size) for n in loops)
    assert engine.stats().cache_bytes == pages * engine.cache.page_bytes


def test_the_figures() -> None:
    engine = _engine()
    engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_new_tokens=4, n_loops=3))
    stats = engine.stats()
    assert stats.tokens == 8
    assert stats.positions == 3 + 2 + 2 * 3
    assert 1 <= stats.loops_per_token <= 3
    assert 1 <= stats.occupancy <= 2
    assert stats.tokens_per_second > 0
    assert stats.peak_cache_bytes > 0
