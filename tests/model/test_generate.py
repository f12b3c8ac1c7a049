"""Sampling token by token through the cache."""

from __future__ import annotations

import pytest
import torch

from tiny import random_ids, tiny_config, tiny_model


@pytest.mark.parametrize("halting", ["act", "settled"])
@pytest.mark.parametrize("n_loops", [1, 4, [2, 5], 20], ids=str)
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_full_forward(attn_type: str, n_loops: int | list[int], halting: str) -> None:
    config = tiny_config(attn_type, halting=halting)
    model, ids = tiny_model(config), random_ids(config, 2, 4)
    depth = torch.tensor(n_loops) if isinstance(n_loops, list) else n_loops
    sequence = ids
    for _ in range(6):
        sequence = torch.cat([sequence, model(sequence, depth)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, 6, n_loops=depth, temperature=0), sequence)


def test_top_k_of_one_is_greedy() -> None:
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 2, 4)
    assert torch.equal(model.generate(ids, 5, temperature=2.0, top_k=1), model.generate(ids, 5, temperature=0))


def test_a_low_temperature_is_greedy() -> None:
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 2, 4)
    assert torch.equal(model.generate(ids, 5, temperature=1e-6), model.generate(ids, 5, temperature=0))


def test_top_k_above_the_vocabulary_is_all_of_it() -> None:
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 2, 4)
    draws = [
        model.generate(ids, 8, top_k=top_k, generator=torch.Generator().manual_seed(4)) for top_k in (None, 17, 1000)
    ]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_a_generator_makes_sampling_repeatable_and_leaves_the_global_state_alone() -> None:
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 1, 4)
    before = torch.get_rng_state()
    one, same, other = (model.generate(ids, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_follow_the_softmax() -> None:
    """2000 draws of one token; each frequency within 0.05, over four standard deviations, of its probability."""
    config = tiny_config()
    model, ids = tiny_model(config), random_ids(config, 1, 3)
    expected = model(ids, 3)[0, -1].div(0.8).softmax(-1)
    drawn = model.generate(ids.expand(2000, 3), 1, n_loops=3, temperature=0.8)[:, -1]
    torch.testing.assert_close(drawn.bincount(minlength=17) / 2000, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_what_it_was_and_the_prompt_comes_first(training: bool) -> None:
    config = tiny_config(dropout=0.5)
    model, ids = tiny_model(config).train(training), random_ids(config, 2, 4)
    out = model.generate(ids, 3, n_loops=2, temperature=0)
    assert model.training is training
    assert torch.equal(out[:, :4], ids)
    assert out.shape == (2, 7)
    assert out.dtype == ids.dtype


@pytest.mark.parametrize("training", [True, False])
def test_every_modules_own_mode_is_what_it_was(training: bool) -> None:
    """A frozen prelude in evaluation mode once came back in training mode, with its dropout on."""
    model = tiny_model(tiny_config(dropout=0.5)).train(training)
    model.prelude.train(not training)
    before = [module.training for module in model.modules()]
    model.generate(random_ids(model.config, 1, 4), 2, n_loops=2)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="n_loops"):  # only found out inside the forward pass
        model.generate(random_ids(model.config, 1, 4), 2, n_loops=0)
    assert [module.training for module in model.modules()] == before


def test_generation_up_to_the_last_position_is_allowed() -> None:
    config = tiny_config(max_seq_len=8)
    assert tiny_model(config).generate(random_ids(config, 1, 4), 4, n_loops=2).shape == (1, 8)
