"""The engine computes prelude, coda and head without the model's modules only where nobody would see a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from open_mythos.inference.engine import Engine
from open_mythos.inference.sampling import SamplingParams
from open_mythos.model.few_rows.ends import FewRowsEnds
from open_mythos.model.mythos import OpenMythos
from tiny import Doubled, tiny_config, tiny_model

_ENCODE, _FEATURES, _LOGITS = OpenMythos.encode, OpenMythos.features, OpenMythos.logits


def _become_doubled(model: OpenMythos, patch: pytest.MonkeyPatch) -> None:
    model.__class__ = Doubled


def _double_its_encode(model: OpenMythos, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "encode", lambda *given: 2 * _ENCODE(model, *given))


def _double_everybodys_features(model: OpenMythos, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenMythos, "features", lambda *given, **options: 2 * _FEATURES(*given, **options))


def _double_everybodys_logits(model: OpenMythos, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenMythos, "logits", lambda *given: 2 * _LOGITS(*given))


def _hook_embeddings(model: OpenMythos, patch: pytest.MonkeyPatch) -> None:
    model.embed.register_forward_hook(lambda *seen: 2 * seen[-1])


def _hook_a_norm(model: OpenMythos, patch: pytest.MonkeyPatch) -> None:
    model.norm.register_forward_hook(lambda *seen: 2 * seen[-1])


CHANGES: list[Callable[[OpenMythos, pytest.MonkeyPatch], None]] = [
    *(_become_doubled, _double_its_encode, _double_everybodys_features),
    *(_double_everybodys_logits, _hook_embeddings, _hook_a_norm),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of what computes without modules."""
    found: list[str] = []
    for name in ("encode", "decode"):
        original = getattr(FewRowsEnds, name)

        def counted(*given: Any, original: Any = original, name: str = name) -> Any:
            found.append(name)
            return original(*given)

        monkeypatch.setattr(FewRowsEnds, name, counted)
    return found


def _assert_engine_is_model(model: OpenMythos) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    params = SamplingParams(max_new_tokens=5, n_loops=3, temperature=0.0, logprobs=True)
    for prompt, output in zip(prompts, Engine(model, cache_bytes=2**20).generate(prompts, params), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.token_ids]), 3)[0, len(prompt) - 1 : -1]
        assert output.token_ids == logits.argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(output.logprobs), logits.log_softmax(-1).amax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("halting", ["act", "none", "settled"])
def test_a_plain_models_ends_go_through_no_module(halting: str, calls: list[str]) -> None:
    plain = {"lora_rank": 0, "loop_embedding": False} if halting == "settled" else {}
    _assert_engine_is_model(tiny_model(tiny_config(halting=halting, **plain)))
    assert {"encode", "decode"} == set(calls)


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_changed_stays_changed(
    change: Callable[[OpenMythos, pytest.MonkeyPatch], None], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_config())
    change(model, monkeypatch)
    _assert_engine_is_model(model)
    assert not calls


def test_hooks_count_once_an_engine_is_idle(calls: list[str]) -> None:
    model = tiny_model(tiny_config())
    engine, params = Engine(model, cache_bytes=2**20), SamplingParams(max_new_tokens=2, temperature=0.0)
    engine.generate([[1, 2]], params)
    assert calls
    calls.clear()
    model.embed.register_forward_hook(lambda *_: None)
    engine.generate([[1, 2]], params)
    assert not calls
