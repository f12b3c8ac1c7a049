"""Computing the active positions only gives the numbers of computing all and masking, and of the naive model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from open_mythos.model import active_context
from open_mythos.model.mythos import MythosOutput, OpenMythos
from reference import model as reference
from tiny import random_ids, tiny_config, tiny_model

SEQ = 50
DEPTHS = torch.tensor([5, 9, 3, 1, 7])

VARIANTS: list[dict[str, Any]] = [
    {"window": None},
    {"window": 3},
    {"window": 17, "recurrent_layers": 2},
    {"window": 2, "n_experts": 8, "recurrent_layers": 2},
    {"window": 5, "halting": "none", "n_experts": 0},
    {"window": 4, "use_rope": False, "attention_sink": False, "qk_norm": False, "lora_rank": 0},
]


@pytest.fixture(params=["never", "always"])
def compacting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether loops leave out halted positions, however few there are."""
    share = 0.0 if request.param == "always" else 2.0
    monkeypatch.setattr(active_context, "_SHARE", share)
    monkeypatch.setattr(active_context, "_LEAST", 1)
    return str(request.param)


@torch.no_grad()
def _in_pieces(model: OpenMythos, ids: torch.Tensor, cuts: list[int]) -> list[MythosOutput]:
    cache = {} if len(cuts) > 1 else None
    return [model(piece, DEPTHS, cache, full_output=True) for piece in ids.split(cuts, 1)]


@pytest.mark.parametrize("cuts", [[SEQ], [20, 30], [3, 46, 1]], ids=str)
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes))
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_active_positions_alone_compute_what_masks_do(
    attn_type: str, changes: dict[str, Any], cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(attn_type, **changes)
    model, ids = tiny_model(config), random_ids(config, len(DEPTHS), SEQ)
    found = {}
    for share in (2.0, 0.0):
        monkeypatch.setattr(active_context, "_SHARE", share)
        monkeypatch.setattr(active_context, "_LEAST", 1)
        found[share] = _in_pieces(model, ids, cuts)
    for masked, compact in zip(*found.values(), strict=True):
        torch.testing.assert_close(compact.logits, masked.logits, atol=2e-5, rtol=0)
        assert torch.equal(compact.exit_loops, masked.exit_loops)
        assert (compact.expert_load is None) == (masked.expert_load is None)
        if masked.expert_load is not None:
            assert torch.equal(compact.expert_load, masked.expert_load)


@pytest.mark.usefixtures("compacting")
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_forward_equals_the_naive_model(attn_type: str, window: int | None) -> None:
    config = tiny_config(attn_type, window=window)
    model, ids = tiny_model(config), random_ids(config, 3, 9)
    expected = reference.forward(model, ids, [6, 2, 5])
    found = model(ids, torch.tensor([6, 2, 5]), full_output=True)
    assert torch.equal(found.exit_loops, expected.exit_loops)
    torch.testing.assert_close(found.logits.double(), expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("compacting")
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_generated_tokens_are_those_of_the_full_forward(attn_type: str) -> None:
    """`generate` keeps rows in another store than a plain dict."""
    config = tiny_config(attn_type, window=3)
    model, ids = tiny_model(config), random_ids(config, 3, 12)
    found = model.generate(ids, 5, 6, temperature=0)
    for length in range(12, 17):
        best = model(found[:, :length], 6, last=1).argmax(-1)
        assert torch.equal(best[:, 0], found[:, length])


def test_a_loop_costs_what_its_active_positions_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The feed-forward sees as many positions as are active, loop by loop; in training it sees all."""
    config = tiny_config(window=3, halting="none", n_experts=0)
    model, ids = tiny_model(config), random_ids(config, 5, SEQ)
    seen: list[int] = []
    model.recurrent.block.ffn.register_forward_hook(lambda module, args, out: seen.append(args[0][..., 0].numel()))
    model(ids, DEPTHS)
    assert seen == [SEQ * int((t < DEPTHS).sum()) for t in range(9)]
    seen.clear()
    model.train()(ids, DEPTHS)
    assert seen == [SEQ * 5] * 9


def test_a_few_halted_positions_are_not_worth_leaving_out() -> None:
    assert not active_context.ActiveContext.pays(torch.tensor([[True, False, False]]))
    assert not active_context.ActiveContext.pays(torch.arange(1000).view(10, 100) > 100)
    assert active_context.ActiveContext.pays(torch.arange(1000).view(10, 100) > 500)
    assert not active_context.ActiveContext.pays(torch.zeros(10, 100, dtype=torch.bool)), "nobody is left"
