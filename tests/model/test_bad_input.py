"""Calls that cannot be right raise `ValueError` naming the argument, what it was and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from open_mythos.model.cache import PlainCache
from open_mythos.model.mythos import OpenMythos
from tiny import random_ids, tiny_config, tiny_model

CONFIG = tiny_config(max_seq_len=8, max_output_tokens=5)
IDS = random_ids(CONFIG, 2, 5)


@pytest.fixture
def model() -> OpenMythos:
    return tiny_model(CONFIG)


FORWARD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "n_loops zero": ({"n_loops": 0}, ["n_loops is 0", "at least 1"]),
    "n_loops negative": ({"n_loops": -3}, ["n_loops is -3", "at least 1"]),
    "n_loops float": ({"n_loops": 2.0}, ["n_loops is 2.0", "integer"]),
    "n_loops bool": ({"n_loops": True}, ["n_loops is True", "integer"]),
    "n_loops text": ({"n_loops": "4"}, ["n_loops is '4'", "integer"]),
    "n_loops list": ({"n_loops": [3, 3]}, ["n_loops is [3, 3]", "tensor of shape (2,)"]),
    "n_loops of another batch": ({"n_loops": torch.tensor([3, 3, 3])}, ["n_loops", "(3,)", "(2,)"]),
    "n_loops per position": ({"n_loops": torch.ones(2, 5, dtype=torch.int64)}, ["n_loops", "(2, 5)", "(2,)"]),
    "n_loops scalar tensor": ({"n_loops": torch.tensor(3)}, ["n_loops", "()", "(2,)"]),
    "n_loops float tensor": ({"n_loops": torch.tensor([3.0, 3.0])}, ["n_loops", "float32", "integer"]),
    "n_loops with a zero": ({"n_loops": torch.tensor([3, 0])}, ["n_loops is 0", "at least 1"]),
    "id too large": ({"ids": IDS + 15}, ["input_ids", "vocab_size - 1 (16)"]),
    "id negative": ({"ids": torch.tensor([[3, -1]])}, ["input_ids holds -1", "from 0"]),
    "ids float": ({"ids": IDS.float()}, ["input_ids", "torch.float32", "torch.int64"]),
    "ids bool": ({"ids": IDS > 3}, ["input_ids", "torch.bool", "torch.int64"]),
    "ids without a batch": ({"ids": IDS[0], "n_loops": 3}, ["input_ids", "(5,)", "(batch, seq)"]),
    "ids of three dimensions": ({"ids": IDS[None], "n_loops": 3}, ["input_ids", "(1, 2, 5)", "(batch, seq)"]),
    "ids scalar": ({"ids": torch.tensor(3)}, ["input_ids", "()", "(batch, seq)"]),
    "no positions": ({"ids": IDS[:, :0]}, ["input_ids", "(2, 0)", "at least 1"]),
    "no sequences": ({"ids": IDS[:0]}, ["input_ids", "(0, 5)", "at least 1"]),
    "too long": ({"ids": random_ids(CONFIG, 1, 9)}, ["input_ids", "9", "max_seq_len (8)"]),
}


@pytest.mark.parametrize("case", FORWARD)
def test_forward_refuses(case: str, model: OpenMythos) -> None:
    arguments, said = FORWARD[case]
    cache: PlainCache = {}
    with pytest.raises(ValueError, match="must be") as caught:
        model(**{"ids": IDS, "kv_cache": cache, **arguments})
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert cache == {}


GENERATE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "temperature negative": ({"temperature": -0.1}, ["temperature is -0.1", "positive"]),
    "temperature NaN": ({"temperature": math.nan}, ["temperature is nan", "positive"]),
    "temperature infinite": ({"temperature": math.inf}, ["temperature is inf", "positive"]),
    "top_k zero": ({"top_k": 0}, ["top_k is 0", "at least 1"]),
    "top_k float": ({"top_k": 2.0}, ["top_k is 2.0", "integer"]),
    "no new tokens": ({"max_new_tokens": 0}, ["max_new_tokens is 0", "from 1 to max_output_tokens (5)"]),
    "too many new tokens": ({"max_new_tokens": 6}, ["max_new_tokens is 6", "max_output_tokens (5)"]),
    "more than the context": ({"max_new_tokens": 4}, ["max_new_tokens is 4", "max_seq_len (8)"]),
    "n_loops zero": ({"n_loops": 0}, ["n_loops is 0", "at least 1"]),
    "ids float": ({"ids": IDS.float()}, ["input_ids", "torch.float32"]),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate_refuses(case: str, model: OpenMythos) -> None:
    arguments, said = GENERATE[case]
    with pytest.raises(ValueError, match="must be") as caught:
        model.generate(**{"ids": IDS, "max_new_tokens": 2, **arguments})
    assert all(part in str(caught.value) for part in said), str(caught.value)


def _other_model(cache: PlainCache) -> None:
    tiny_model(CONFIG, seed=3)(IDS, 3, cache)


def _other_architecture(cache: PlainCache) -> None:
    tiny_model(tiny_config("mla"))(IDS, 3, cache)


def _foreign(cache: PlainCache) -> None:
    cache["prelude.0"] = {"k": torch.zeros(2, 3, 2, 4), "v": torch.zeros(2, 3, 2, 4)}


@pytest.mark.parametrize("fill", [_other_model, _other_architecture, _foreign])
def test_a_cache_from_another_model_is_refused(fill: Callable[[PlainCache], None], model: OpenMythos) -> None:
    cache: PlainCache = {}
    fill(cache)
    with pytest.raises(ValueError, match=r"kv_cache was filled by another model.*empty dict"):
        model(IDS[:, :1], 3, cache)


CACHED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another batch size": ({"ids": IDS[:1, :1]}, ["kv_cache", "batch of 2", "batch of 1"]),
    "another depth": ({"n_loops": 4}, ["kv_cache", "n_loops", "3", "4"]),
    "another depth in one sequence": ({"n_loops": torch.tensor([3, 5])}, ["kv_cache", "n_loops", "3", "5"]),
    "too long together": ({"ids": IDS[:, :4]}, ["input_ids", "4 new and 5 cached", "max_seq_len (8)"]),
}


@pytest.mark.parametrize("case", CACHED)
def test_a_cache_that_does_not_fit_is_refused(case: str, model: OpenMythos) -> None:
    arguments, said = CACHED[case]
    cache: PlainCache = {}
    model(IDS, 3, cache)
    with pytest.raises(ValueError, match=r"must|was filled|holds") as caught:
        model(**{"ids": IDS[:, :1], "n_loops": 3, "kv_cache": cache, **arguments})
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_an_integer_and_a_tensor_of_it_are_the_same_depth(model: OpenMythos) -> None:
    cache: PlainCache = {}
    model(IDS, 3, cache)
    model(IDS[:, :1], torch.tensor([3, 3]), cache)


def test_a_full_context_is_not_too_long(model: OpenMythos) -> None:
    cache: PlainCache = {}
    model(IDS, 3, cache)
    model(IDS[:, :3], 3, cache)
    with pytest.raises(ValueError, match=r"1 new and 8 cached"):
        model(IDS[:, :1], 3, cache)
