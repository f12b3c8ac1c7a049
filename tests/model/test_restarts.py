"""In training some sequences go back to their first state once: what they then are, how many, and who never does."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import random_ids, tiny_config, tiny_model
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.mythos import OpenMythos

LOOPS = 5


def _timeless(**changes: object) -> OpenMythos:
    """In training; every loop is the same function, so that n loops after a restart are n loops."""
    same = {"lora_rank": 0, "loop_embedding": False, "halting": "none", "balance_rate": 0.0, "restart_rate": 0.5}
    return tiny_model(tiny_config(**{**same, **changes})).train()


def _depths(model: OpenMythos, ids: Tensor, got: Tensor) -> list[int]:
    """How many loops each sequence's logits are those of."""
    with torch.no_grad():
        each = torch.stack([model.eval()(ids, n_loops=n) for n in range(1, LOOPS + 1)])
    distance = (each - got).abs().amax((2, 3))
    assert (distance.amin(0) < 1e-5).all()
    assert (distance.sort(0).values[1] > 1e-4).all(), "depths must differ to be told apart"
    return [1 + int(loops) for loops in distance.argmin(0)]


@pytest.mark.parametrize("state_init", ["input", "zeros"])
@pytest.mark.parametrize("recurrent_layers", [1, 2])
def test_a_sequence_that_goes_back_has_run_the_loops_since(state_init: str, recurrent_layers: int) -> None:
    model = _timeless(state_init=state_init, recurrent_layers=recurrent_layers)
    ids = random_ids(model.config, 400, 3)
    torch.manual_seed(3)
    with torch.no_grad():
        counts = torch.tensor(_depths(model, ids, model(ids, n_loops=LOOPS))).bincount(minlength=LOOPS + 1).tolist()
    assert counts[0] == 0
    assert 160 < counts[LOOPS] < 240, "half of the sequences"
    assert all(25 < n < 80 for n in counts[1:LOOPS]), "each of the loops alike"


def test_no_sequence_is_asked_for_more_loops_or_touched_after_its_last() -> None:
    model = _timeless(restart_rate=0.99)
    ids = random_ids(model.config, 40, 3)
    loops = torch.tensor([1, 2, 3, LOOPS]).repeat(10)
    torch.manual_seed(0)
    with torch.no_grad():
        depths = _depths(model, ids, model(ids, n_loops=loops))
    assert all(1 <= depth <= asked for depth, asked in zip(depths, loops.tolist(), strict=True))
    assert any(depth < asked for depth, asked in zip(depths, loops.tolist(), strict=True))


@pytest.mark.parametrize(("training", "rate", "n_loops"), [(False, 0.9, 4), (True, 0.0, 4), (True, 0.9, 1)])
def test_without_training_a_rate_or_a_second_loop_nothing_is_drawn(training: bool, rate: float, n_loops: int) -> None:
    model = _timeless(restart_rate=rate).train(training)
    ids, before = random_ids(model.config, 8, 6), torch.get_rng_state()
    with torch.no_grad():
        got = model(ids, n_loops=n_loops)
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(got, model.eval()(ids, n_loops=n_loops), atol=1e-6, rtol=1e-6)


def test_positions_that_have_halted_stay_frozen() -> None:
    """What a halted position counts for, its output and its exit, is that of the loops before it halted."""
    model = _timeless(halting="act", act_threshold=0.5, restart_rate=0.99)
    assert model.recurrent.act is not None
    with torch.no_grad():
        model.recurrent.act.halt.bias.fill_(1.0)  # everybody halts with the first loop
        model.recurrent.act.halt.weight.zero_()
        ids = random_ids(model.config, 6, 5)
        got = model(ids, n_loops=4, full_output=True)
        plain = model.eval()(ids, n_loops=4, full_output=True)
    assert torch.equal(got.exit_loops, plain.exit_loops)
    torch.testing.assert_close(got.logits, plain.logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("how", [{}, {"grad_loops": 2}])
def test_loops_computed_again_on_the_way_back_go_back_where_the_first_ones_did(how: dict[str, int]) -> None:
    model = _timeless(lora_rank=2, loop_embedding=True, halting="act")
    ids = random_ids(model.config, 8, 6)

    def gradients(*, recompute: bool) -> dict[str, Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        context = model.context(ids.shape[1])
        e = model.encode(ids, context)
        result = model.recurrent(e, torch.full((8,), LOOPS), context, recompute=recompute, **how)
        (model.decode(result.state, context).square().mean() + result.ponder_cost).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(recompute=False), gradients(recompute=True)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_seed_repeats_training() -> None:
    config = MythosConfig(dim=16, max_seq_len=16, vocab_size=5)
    assert config.restart_rate > 0, "by default a depth that is always the same is not all that training sees"
    model, ids = OpenMythos(config).train(), random_ids(config, 64, 6)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids, n_loops=3).detach()

    first = logits(0)
    assert torch.equal(first, logits(0))
    assert not torch.equal(first, logits(1))
