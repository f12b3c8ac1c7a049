"""Names that checkpoints rely on, tied embeddings, initial weights and dropout."""

from __future__ import annotations

import pytest
import torch

from open_mythos import OpenMythos
from tiny import random_ids, tiny_config, tiny_model

ANCHORS = {
    "embed.weight": (17, 16),
    "prelude.0.attn_norm.weight": (16,),
    "prelude.0.attn.out.weight": (16, 16),
    "prelude.0.attn.sink": (4,),
    "prelude.0.ffn.gate.weight": (24, 16),
    "prelude.0.ffn.up.weight": (24, 16),
    "prelude.0.ffn.down.weight": (16, 24),
    "prelude_norm.weight": (16,),
    "recurrent.injection.log_a": (16,),
    "recurrent.injection.log_dt": (16,),
    "recurrent.injection.B": (16,),
    "recurrent.blocks.0.ffn_norm.weight": (16,),
    "recurrent.blocks.0.ffn.router.weight": (4, 16),
    "recurrent.blocks.0.ffn.router_bias": (4,),
    "recurrent.blocks.0.ffn.shared.gate.weight": (8, 16),
    "recurrent.adapter.down.weight": (2, 16),
    "recurrent.adapter.up.weight": (16, 2),
    "recurrent.loop_embedding.weight": (5, 16),
    "recurrent.act.halt.weight": (1, 16),
    "recurrent.act.halt.bias": (1,),
    "coda.0.ffn_norm.weight": (16,),
    "norm.weight": (16,),
}


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_well_known_names_and_shapes_are_in_the_state_dict(attn_type: str) -> None:
    """A rename would orphan every checkpoint out there; whoever wants one bumps the format version and converts."""
    shapes = {name: tuple(tensor.shape) for name, tensor in OpenMythos(tiny_config(attn_type)).state_dict().items()}
    expected = dict(ANCHORS)
    if attn_type == "mla":
        expected["prelude.0.attn.out.weight"] = (16, 20)
    assert {name: shapes.get(name) for name in expected} == expected


def test_tied_embeddings_read_and_write_with_one_matrix() -> None:
    tied, untied = OpenMythos(tiny_config()), OpenMythos(tiny_config(tie_embeddings=False))
    assert "head.weight" not in tied.state_dict()
    assert untied.state_dict()["head.weight"].shape == (17, 16)
    difference = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert difference == 17 * 16


def test_tied_and_untied_agree_where_the_matrices_do() -> None:
    tied = tiny_model(tiny_config())
    untied = tiny_model(tiny_config(tie_embeddings=False))
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.embed.weight})
    ids = random_ids(tied.config, 2, 5)
    assert torch.equal(tied(ids, 3), untied(ids, 3))


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_every_parameter_gets_a_gradient(attn_type: str) -> None:
    """One without would be dead weight, or cut off from the loss by mistake."""
    config = tiny_config(attn_type, n_experts=4, tie_embeddings=False)
    model = tiny_model(config).train()
    model(random_ids(config, 4, 12), 3).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_fresh_model_guesses_about_evenly(attn_type: str) -> None:
    """The first loss is close to log(256). Tied embeddings, not tested here, start by favouring the input token."""
    config = tiny_config(attn_type, dim=64, vocab_size=256, tie_embeddings=False)
    ids = random_ids(config, 4, 16)
    logits = OpenMythos(config).eval()(ids, 4).flatten(0, 1)
    targets = random_ids(config, 4, 16, seed=2).flatten()
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    assert abs(loss - 5.545) < 1.0


def test_the_same_seed_gives_the_same_model() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(OpenMythos(tiny_config()).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_dropout_acts_in_training_mode_only() -> None:
    config = tiny_config(dropout=0.3, balance_rate=0.0)
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    without = tiny_model(config.replace(dropout=0.0))
    assert torch.equal(model(ids, 3), model(ids, 3))
    assert torch.equal(model(ids, 3), without(ids, 3))
    model.train()
    assert not torch.equal(model(ids, 3), model(ids, 3))


def test_a_noisy_first_state_is_drawn_anew_in_training_and_zeros_in_inference() -> None:
    """Its size differs from sequence to sequence, from nearly 0 to nearly 1, or the zeros would never be trained."""
    recurrent = tiny_model(tiny_config(state_init="noise")).recurrent
    e = torch.ones(200, 20, 16)
    assert not recurrent.eval().initial_state(e).any()
    first, second = recurrent.train().initial_state(e), recurrent.initial_state(e)
    assert not torch.equal(first, second)
    sizes = first.flatten(1).std(-1)
    assert sizes.min().item() < 0.1
    assert 0.9 < sizes.max().item() < 1.2


@pytest.mark.parametrize("training", [True, False])
def test_the_other_first_states_are_the_same_in_both_modes(training: bool) -> None:
    e = torch.randn(2, 3, 16)
    recurrent = tiny_model(tiny_config(state_init="input")).train(training).recurrent
    assert torch.equal(recurrent.initial_state(e), e)
    recurrent = tiny_model(tiny_config(state_init="zeros")).train(training).recurrent
    assert torch.equal(recurrent.initial_state(e), torch.zeros_like(e))


def test_a_model_can_be_built_on_the_meta_device() -> None:
    """How the large presets are counted without their memory."""
    with torch.device("meta"):
        model = OpenMythos(tiny_config())
    assert all(p.device.type == "meta" for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in OpenMythos(tiny_config()).parameters())
