"""Batched = alone = the plain model, whatever the company: tokens, exit loops, and the cache's bytes."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch

from open_mythos.analysis.kv_memory import bytes_per_position
from open_mythos.inference.engine import Engine
from open_mythos.inference.exit import LoopView, Memory, PredictionChange, StableArgmax, StateChange
from open_mythos.inference.sampling import SamplingParams, distribution
from open_mythos.inference.speculation import Speculation
from open_mythos.model.cache_sharing import CacheSharing, EveryLoop, FirstLoops, Modulo
from tiny import tiny_config, tiny_model

RULES = [None, StateChange(0.3), PredictionChange(0.05), StableArgmax(2)]


def _config(random: Random):
    return tiny_config(
        random.choice(["gqa", "mla"]),
        halting=random.choice(["act", "none", "settled"]),
        settle_tolerance=random.choice([0.1, 0.4]),
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


def _greedy(random: Random) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=random.randint(1, 6),
        n_loops=random.randint(1, 6),
        temperature=0.0,
        exit_rule=random.choice(RULES),
    )


@pytest.mark.parametrize("seed", range(60))
def test_company_changes_nothing(seed: int) -> None:
    random = Random(seed)
    model = tiny_model(_config(random), seed)
    prompts = _prompts(random, random.randint(2, 5), model.config.vocab_size)
    params = [_greedy(random) for _ in prompts]
    together = Engine(model, max_batch_tokens=random.randint(1, 40), cache_bytes=2**20).generate(prompts, params)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        (alone,) = Engine(model, cache_bytes=2**20).generate([prompt], one)
        assert output.token_ids == alone.token_ids
        assert output.exit_loops == alone.exit_loops
        assert output.finish_reason == "length"


@pytest.mark.parametrize("seed", range(20))
def test_company_changes_nothing_where_loops_share_their_cache(seed: int) -> None:
    random = Random(4000 + seed)
    model = tiny_model(_config(random), seed)
    prompts = _prompts(random, 4, model.config.vocab_size)
    sharing = random.choice([FirstLoops(0), FirstLoops(1), Modulo(2)])
    params = [_greedy(random) for _ in prompts]
    engine = Engine(model, max_batch_tokens=random.randint(1, 40), cache_bytes=2**20, sharing=sharing)
    for prompt, one, output in zip(prompts, params, engine.generate(prompts, params), strict=True):
        (alone,) = Engine(model, cache_bytes=2**20, sharing=sharing).generate([prompt], one)
        assert (output.token_ids, output.exit_loops) == (alone.token_ids, alone.exit_loops)
    assert engine.cache.pages.n_free == engine.cache.pages.n_pages


@pytest.mark.parametrize("seed", range(60))
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


@pytest.mark.parametrize("seed", range(30))
def test_how_many_loops_a_step_runs_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither results nor what was computed for them: guesses are made after as many loops, turns begin as early."""
    random = Random(7000 + seed)
    config = _config(random).replace(halting="none")
    model = tiny_model(config, seed)
    prompts = _prompts(random, random.randint(1, 4), config.vocab_size)
    params = [
        SamplingParams(
            max_new_tokens=random.randint(4, 10),
            n_loops=random.randint(8, 12),
            temperature=0.0,
            exit_rule=random.choice([None, None, StateChange(0.02)]),
            speculation=random.choice([None, Speculation(random.randint(1, 7), 3), Speculation()]),
        )
        for _ in prompts
    ]
    found = []
    for at_once in (1, 4, 20):
        monkeypatch.setattr("open_mythos.inference.engine._LOOPS_AT_ONCE", at_once)
        engine = Engine(model, max_batch_tokens=20, cache_bytes=2**20)
        found.append((engine.generate(prompts, params), replace(engine.stats(), seconds=0)))
    assert found[0] == found[1] == found[2]
    assert found[0][1].drafted > 0 or params[-1].speculation is None or len(params) > 1, "alone, it guesses"


def _engine(**changes) -> Engine:
    return Engine(tiny_model(tiny_config()), **{"cache_bytes": 2**20, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_lies_in_rows_that_nobody_wrote_does_no_harm(dtype: torch.dtype) -> None:
    """A weight of 0 does not take a NaN away; float32 takes the kernels for few positions, float64 the general way."""
    model = tiny_model(tiny_config(halting="none")).to(dtype)
    prompts, params = [[1, 2, 3, 4], [5], [6, 7]], SamplingParams(max_new_tokens=4, n_loops=2, logprobs=True)
    expected = Engine(model, cache_bytes=2**20).generate(prompts, params)
    engine = Engine(model, cache_bytes=2**20)
    for entries in engine.cache._entries.values():
        entries.fill_(float("nan"))
    for output, other in zip(engine.generate(prompts, params), expected, strict=True):
        assert output.token_ids == other.token_ids
        assert output.logprobs == pytest.approx(other.logprobs)


def test_a_step_takes_the_turn_that_its_loops_end_with() -> None:
    engine = Engine(tiny_model(tiny_config(halting="none")), cache_bytes=2**20)
    engine.submit([1, 2, 3], SamplingParams(max_new_tokens=2, n_loops=3, temperature=0.0))
    assert engine.step() == [], "the prompt is encoded"
    assert [event.finish_reason for event in engine.step()] == [None], "three loops, then the first token"
    assert [event.finish_reason for event in engine.step()] == ["length"]
    assert not engine.busy


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


def test_a_model_that_halts_when_settled_takes_no_speculation() -> None:
    """Guesses are at other loops than what they follow."""
    engine = Engine(tiny_model(tiny_config(halting="settled")), cache_bytes=2**20)
    speculating = SamplingParams(max_new_tokens=2, n_loops=3, speculation=Speculation(1, 2))
    params = [speculating, SamplingParams(max_new_tokens=2, n_loops=3)]
    refused, served = engine.generate([[1, 2, 3, 4] * 5] * 2, params)
    assert "must be 'act' or 'none', not 'settled'" in refused.error
    assert len(served.token_ids) == 2


@pytest.mark.parametrize("halting", ["act", "settled"])
def test_a_request_cancelled_in_any_state_leaves_the_others_alone(halting: str) -> None:
    model = tiny_model(tiny_config(halting=halting, settle_tolerance=0.5))
    params = SamplingParams(max_new_tokens=5, n_loops=3, temperature=0.0)
    prompts = [[1, 2, 3], [4, 5], [6]]
    expected = Engine(model, cache_bytes=2**20).generate(prompts, params)
    for moment in range(14):
        engine = Engine(model, cache_bytes=2**20, max_batch_tokens=5)
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


@pytest.mark.parametrize("sharing", [EveryLoop(), FirstLoops(0), FirstLoops(2), Modulo(2)], ids=str)
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_only_what_is_computed_is_stored(sharing: CacheSharing, attn_type: str) -> None:
    """A row per position in each outer layer, and in each looped one as many as its loops have slots: as planned."""
    model = tiny_model(tiny_config(attn_type, recurrent_layers=2))
    engine = Engine(model, cache_bytes=2**20, sharing=sharing, reuse_prefixes=False)
    requests = engine._submit([[1, 2, 3, 4, 5, 6, 7]], SamplingParams(max_new_tokens=2, n_loops=6))
    while not requests[0].output.token_ids:
        engine.step()
    table = requests[0].table
    exits = table.exits[:7].tolist()
    assert len(set(exits)) > 1
    pending = bytes_per_position(model.config, 0, sharing=sharing)  # the new token has been encoded
    planned = sum(bytes_per_position(model.config, loops, sharing=sharing) for loops in exits) + pending
    assert table.bytes_stored == planned
    in_pages = engine.stats().cache_bytes
    assert planned <= in_pages < planned + 2 * engine.cache.layout.page_bytes  # a page of each kind is partly filled


@pytest.mark.parametrize("rule", [None, StableArgmax(4)])
def test_a_prompt_that_a_rule_stopped_does_not_tell_whether_it_had_settled(rule: StableArgmax | None) -> None:
    """So what begins alike is computed again; without a rule, the last of its loops say all."""
    model = tiny_model(tiny_config(halting="settled", settle_tolerance=0.3, window=3), 1)
    common, engine = [n % 17 for n in range(3, 50, 3)], Engine(model, cache_bytes=2**22)
    params = SamplingParams(max_new_tokens=4, n_loops=20, temperature=0.0, exit_rule=rule)
    engine.generate([[*common, 1, 2, 3]], params)
    prompt = [*common, 9, 4, 2, 7]
    assert engine.generate([prompt], params) == Engine(model, cache_bytes=2**22).generate([prompt], params)
    assert engine.stats().reused == (16 if rule is None else 0)


def test_the_first_loop_settles_nothing() -> None:
    """There is no state before it that a loop has left, however little it moves the first one."""
    model = tiny_model(tiny_config(halting="settled", settle_tolerance=100.0, state_init="input"))
    (output,) = Engine(model).generate([[1, 2, 3]], SamplingParams(max_new_tokens=3, n_loops=6, temperature=0.0))
    assert output.exit_loops == [2, 2, 2]


@pytest.mark.parametrize("seed", range(60))
def test_speculation_changes_no_greedy_token(seed: int) -> None:
    random = Random(2000 + seed)
    config = _config(random)
    model = tiny_model(config if config.halting != "settled" else config.replace(halting="none"), seed)
    prompts = _prompts(random, random.randint(1, 4), model.config.vocab_size)
    n_loops, rule = random.randint(1, 9), random.choice(RULES)
    plain = SamplingParams(max_new_tokens=12, n_loops=n_loops, exit_rule=rule, temperature=0.0, logprobs=True)
    speculation = Speculation(loops=random.choice([None, 1, 2, 3, 4, 5]), most=random.randint(1, 5))
    engine = Engine(model, cache_bytes=2**21, max_batch_tokens=random.choice([1, 50]))
    expected = Engine(model, cache_bytes=2**21).generate(prompts, plain)
    for output, other in zip(engine.generate(prompts, replace(plain, speculation=speculation)), expected, strict=True):
        assert (output.token_ids, output.exit_loops) == (other.token_ids, other.exit_loops)
        assert output.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    stats = engine.stats()
    assert stats.accepted <= stats.drafted
    assert engine.cache.pages.n_free == engine.cache.pages.n_pages
    assert len(engine.runner.flight) == 0


def test_guesses_come_after_a_quarter_of_the_loops_unless_told_otherwise() -> None:
    assert [Speculation().guesses_after(n_loops) for n_loops in (1, 4, 7, 16)] == [1, 1, 1, 4]
    assert Speculation(3).guesses_after(16) == 3
    with pytest.raises(ValueError, match="loops is 0; it must be None or at least 1"):
        Speculation(0)
    with pytest.raises(ValueError, match="most is 0; it must be at least 1"):
        Speculation(most=0)


def test_accepted_loops_are_never_computed_twice() -> None:
    """A model whose first loop decides: every guess is right, and each position runs exactly its loops."""
    model = tiny_model(tiny_config(halting="none", window=1, vocab_size=5))
    with torch.no_grad():
        for block in model.recurrent.blocks:  # the state is the injection's alone, and settles at once
            for parameter in block.parameters():
                parameter.zero_()
        model.recurrent.adapter.up.weight.zero_()
        model.recurrent.loop_embedding.weight.zero_()
    params = SamplingParams(max_new_tokens=10, n_loops=8, temperature=0.0, speculation=Speculation(loops=4, most=4))
    engine = Engine(model, cache_bytes=2**21)
    engine.generate([[1]], params)
    stats = engine.stats()
    assert stats.accepted == stats.drafted == 8
    assert stats.loops == 10 * 8
    assert stats.waves == 8 + 8 * 4 + 8  # the prompt; every guess; the last position


def test_speculation_keeps_the_distribution() -> None:
    """1500 pairs of tokens against exact probabilities: chi-square with at most 24 degrees of freedom, p > 0.0001."""
    model = tiny_model(tiny_config(halting="none", vocab_size=5), seed=3)
    n_loops, shape = 5, {"temperature": 1.5, "top_k": 4}
    speculation = Speculation(loops=1, most=3)
    params = [
        SamplingParams(max_new_tokens=3, n_loops=n_loops, seed=seed, speculation=speculation, **shape)
        for seed in range(1500)
    ]
    engine = Engine(model, cache_bytes=2**24)
    outputs = [
        output
        for start in range(0, len(params), 150)  # as many as begin together: guesses wait for stragglers
        for output in engine.generate([[1, 2, 3]] * 150, params[start : start + 150])
    ]
    assert 0.2 < engine.stats().accepted / engine.stats().drafted < 0.95
    counts, expected = torch.zeros(5, 5), torch.zeros(5, 5)
    for output in outputs:
        counts[output.token_ids[1], output.token_ids[2]] += 1
    plain = SamplingParams(**shape)
    for first in range(5):
        after = [distribution(model(torch.tensor([[1, 2, 3]]), n_loops)[0, -1], plain)[first]]
        seconds = distribution(model(torch.tensor([[1, 2, 3, first]]), n_loops)[0, -1], plain)
        for second in range(5):
            thirds = distribution(model(torch.tensor([[1, 2, 3, first, second]]), n_loops)[0, -1], plain)
            expected[second] += (after[0] * seconds[second] * thirds).detach() * len(params)
    likely = expected > 0
    assert counts[~likely].sum() == 0
    assert float(((counts - expected)[likely] ** 2 / expected[likely]).sum()) < 60


@pytest.mark.parametrize("seed", range(20))
def test_prompts_that_begin_alike_are_computed_once(seed: int) -> None:
    random = Random(3000 + seed)
    model = tiny_model(_config(random), seed)
    common = [random.randrange(17) for _ in range(40)]
    prompts = [common[: random.randint(10, 40)] + [random.randrange(17) for _ in range(3)] for _ in range(6)]
    params = SamplingParams(
        max_new_tokens=4, n_loops=random.randint(1, 5), temperature=0.0, exit_rule=random.choice(RULES)
    )
    expected = [Engine(model, cache_bytes=2**21).generate([prompt], params)[0] for prompt in prompts]
    engine = Engine(model, cache_bytes=random.choice([2**16, 2**21]), max_batch_tokens=random.choice([1, 60]))
    assert engine.generate(prompts, params) == expected
    assert engine.generate(prompts, params) == expected
    if model.config.halting == "settled" and params.exit_rule is not None:
        assert engine.stats().reused == 0
    elif engine.cache.pages.n_pages > 500:
        assert engine.stats().reused >= 6 * 16 / 2
    engine.forget_prefixes()
    assert engine.cache.pages.n_free == engine.cache.pages.n_pages


def test_a_prefix_of_other_settings_is_not_taken() -> None:
    model = tiny_model(tiny_config())
    prompt = list(range(17)) * 2
    shallow, deep = (SamplingParams(max_new_tokens=3, n_loops=n, temperature=0.0) for n in (1, 4))
    engine = Engine(model, cache_bytes=2**21)
    engine.generate([prompt], shallow)
    assert engine.generate([prompt], deep) == Engine(model, cache_bytes=2**21).generate([prompt], deep)
    assert engine.stats().reused == 0


@dataclass(frozen=True)
class _Broken:
    """Raises once a position has run a loop."""

    def exits(self, view: LoopView) -> tuple[torch.Tensor, Memory]:
        if int(view.loop.max()) > 0:
            raise RuntimeError("no idea")
        return view.loop > 5, {}


def test_an_exit_rule_that_raises_fails_its_own_request() -> None:
    engine = _engine()
    good = SamplingParams(max_new_tokens=3, n_loops=4, temperature=0.0)
    (alone,) = engine.generate([[1, 2]], good)
    outputs = engine.generate([[1, 2], [3]], [good, replace(good, exit_rule=_Broken())])
    assert outputs[0] == alone
    assert outputs[1].finish_reason == "error"
    assert outputs[1].error == "exit_rule _Broken() raised RuntimeError: no idea"
    assert engine.stats().cache_bytes == 0


def test_a_given_continuation_is_scored() -> None:
    model = tiny_model(tiny_config())
    engine = Engine(model, cache_bytes=2**20)
    text = [1, 5, 2, 8, 3, 9]
    params = SamplingParams(max_new_tokens=5, n_loops=3, continuation=tuple(text[1:]), logprobs=True)
    (output,) = engine.generate([text[:1]], params)
    assert output.token_ids == text[1:]
    expected = model(torch.tensor([text]), 3)[0].log_softmax(-1)[range(5), text[1:]]
    assert output.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_sharing_of_loops_is_exact_where_nothing_is_shared() -> None:
    model = tiny_model(tiny_config())
    params = SamplingParams(max_new_tokens=6, n_loops=4, temperature=0.0)
    expected = Engine(model, cache_bytes=2**20).generate([[1, 2, 3]], params)
    for sharing in (FirstLoops(3), FirstLoops(9), Modulo(4), Modulo(7)):
        assert Engine(model, cache_bytes=2**20, sharing=sharing).generate([[1, 2, 3]], params) == expected
    shared = Engine(model, cache_bytes=2**20, sharing=FirstLoops(0))
    (wrong,) = shared.generate([[1, 2, 3]], replace(params, speculation=Speculation()))
    assert "every loop keeps its own" in wrong.error


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


def test_weights_changed_after_a_stream_was_left_are_seen() -> None:
    """Nothing that follows from the weights is kept from one request to the next."""
    model, params = tiny_model(tiny_config()), SamplingParams(max_new_tokens=6, n_loops=3, logprobs=True)
    engine = Engine(model, cache_bytes=2**20, reuse_prefixes=False)
    stream = engine.stream([[1, 2, 3]], params)
    next(stream)
    stream.close()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    (found,), (expected,) = (e.generate([[1, 2, 3]], params) for e in (engine, Engine(model, cache_bytes=2**20)))
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_what_has_ended_is_let_go() -> None:
    engine = _engine()
    request = engine.submit([1, 2, 3], SamplingParams(max_new_tokens=3, n_loops=3))
    table = weakref.ref(request.table)
    while engine.busy:
        engine.step()
    del request
    gc.collect()
    assert table() is None
    assert engine.step() == []


def test_a_request_for_very_many_loops_takes_no_memory() -> None:
    tracemalloc.start()
    request = _engine().submit([1, 2], SamplingParams(max_new_tokens=1, n_loops=10**7))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert request.output.finish_reason == "error"
    assert peak < 10 * 2**20
