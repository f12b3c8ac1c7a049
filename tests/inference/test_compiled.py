"""Compiled waves give the numbers of eager ones, each is one graph, and few of them are compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

import pytest
import torch

from open_mythos.config import MythosConfig
from open_mythos.inference import engine as engine_module
from open_mythos.inference.compiled import CompiledWaves
from open_mythos.inference.engine import Engine
from open_mythos.inference.exit import PredictionChange, StableArgmax, StateChange
from open_mythos.inference.request import Output
from open_mythos.inference.sampling import SamplingParams
from open_mythos.inference.speculation import Speculation
from open_mythos.model.cache_sharing import EveryLoop, FirstLoops, Modulo
from tiny import tiny_config, tiny_model


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What has been compiled; it is run as it was traced."""
    seen = []

    def run_as_traced(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(engine_module, "CompiledWaves", partial(CompiledWaves, backend=run_as_traced))
    return seen


def _config(random: Random) -> MythosConfig:
    return tiny_config(
        random.choice(["gqa", "mla"]),
        max_seq_len=160,
        halting=random.choice(["act", "none", "settled"]),
        settle_tolerance=0.3,
        window=random.choice([None, 3]),
        outer_window=random.choice([None, 4]),
        n_experts=random.choice([0, 4, 12]),
        recurrent_layers=random.choice([1, 2]),
        prelude_layers=random.choice([0, 1, 2]),
        attention_sink=random.choice([True, False]),
        use_rope=random.choice([True, True, False]),
        loop_embedding=random.choice([True, False]),
        lora_rank=random.choice([0, 2]),
        state_init=random.choice(["input", "zeros"]),
    )


def _equal(outputs: list[Output], expected: list[Output]) -> None:
    for output, other in zip(outputs, expected, strict=True):
        assert (output.token_ids, output.exit_loops) == (other.token_ids, other.exit_loops)
        assert output.finish_reason == other.finish_reason == "length"
        assert output.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_compiled_waves_change_no_number(seed: int, graphs: list[torch.fx.GraphModule]) -> None:
    """Random models, depths, rules and mixtures; some guess ahead, some cross from 64 keys to 128."""
    random = Random(seed)
    model = tiny_model(_config(random), seed)
    prompts = [[random.randrange(17) for _ in range(random.choice([1, 3, 9, 61]))] for _ in range(random.randint(1, 4))]
    params = [
        SamplingParams(
            max_new_tokens=random.randint(1, 7),
            n_loops=random.randint(1, 6),
            temperature=1.0,
            logprobs=True,
            seed=seed,
            exit_rule=random.choice([None, StateChange(0.3), PredictionChange(0.05), StableArgmax(2)]),
            speculation=random.choice([None, Speculation(loops=random.randint(1, 3), most=3)]),
        )
        for _ in prompts
    ]
    sharing = random.choice([EveryLoop(), EveryLoop(), FirstLoops(1), Modulo(2)])
    if sharing != EveryLoop() or model.config.halting == "settled":
        params = [replace(one, speculation=None) for one in params]
    expected = Engine(model, cache_bytes=2**21, sharing=sharing).generate(prompts, params)
    engine = Engine(model, cache_bytes=2**21, sharing=sharing, compiled=True)
    _equal(engine.generate(prompts, params), expected)
    assert graphs
    engine.forget_prefixes()
    assert engine.cache.pages.n_free == engine.cache.pages.n_pages


def _serve(engine: Engine, n_requests: int, length: int) -> None:
    outputs = engine.generate([[1] * length] * n_requests, SamplingParams(max_new_tokens=3, n_loops=3))
    assert {output.finish_reason for output in outputs} == {"length"}


def test_sizes_are_few(graphs: list[torch.fx.GraphModule]) -> None:
    """One graph for encoding, loops and coda each, in every power of two of lanes, and of keys from 64 on."""
    model = tiny_model(tiny_config(halting="none", max_seq_len=256))
    engine = Engine(model, cache_bytes=2**22, compiled=True, reuse_prefixes=False)
    for length in range(2, 60, 19):
        _serve(engine, 3, length)
    assert len(graphs) == 3
    _serve(engine, 4, 30)
    assert len(graphs) == 3
    _serve(engine, 5, 30)
    assert len(graphs) == 6
    _serve(engine, 5, 64)
    _serve(engine, 5, 100)
    assert len(graphs) == 9


def test_a_window_is_the_only_number_of_keys(graphs: list[torch.fx.GraphModule]) -> None:
    model = tiny_model(tiny_config(halting="none", max_seq_len=256, window=5, outer_window=70))
    engine = Engine(model, cache_bytes=2**22, compiled=True)
    for length in (2, 60, 150):
        _serve(engine, 2, length)
    assert len(graphs) == 5  # loops once; the outer layers with 64 keys and with 70


def test_padding_reads_only_what_its_wave_has_written(graphs: list[torch.fx.GraphModule]) -> None:
    """A weight of 0 does not take a NaN away, and rows may hold what another request left there."""
    model = tiny_model(tiny_config(halting="none"))
    prompts, params = [[1, 2], [3], [4]], SamplingParams(max_new_tokens=4, n_loops=2, temperature=1.0, logprobs=True)
    expected = Engine(model, cache_bytes=2**20).generate(prompts, params)
    engine = Engine(model, cache_bytes=2**20, compiled=True)
    for rows in engine.cache._entries.values():
        rows.fill_(float("nan"))
    _equal(engine.generate(prompts, params), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler")
def test_inductor_changes_no_number() -> None:
    model = tiny_model(tiny_config("mla", n_experts=12, prelude_layers=1, coda_layers=1, halting="none"))
    prompts = [[1, 2, 3], [4]]
    params = SamplingParams(max_new_tokens=4, n_loops=3, temperature=1.0, logprobs=True)
    expected = Engine(model, cache_bytes=2**20).generate(prompts, params)
    _equal(Engine(model, cache_bytes=2**20, compiled=True).generate(prompts, params), expected)
