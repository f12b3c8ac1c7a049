"""In training some sequences go back to their first state once: what they then are, how many, and who never does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.mythos import OpenMythos
from tiny import random_ids, tiny_config, tiny_model

LOOPS = 5


def _timeless(**changes: object) -> OpenMythos:
    """In training; every loop is the same function, so that n loops after a restart are n loops."""
    same = {"lora_rank": 0, "loop_embedding": False, "halting": "none", "balance_rate": 0.0, "restart_rate": 0.5}
    return tiny_model(tiny_config(**{**same, **changes})).train()


def _depths(model: OpenMythos, ids: Tensor, got: Tensor) -> Tensor:
    """How many loops each sequence's logits are those of, (batch,)."""
    with torch.no_grad():
        each = torch.stack([model.eval()(ids, n_loops=n) for n in range(1, LOOPS + 1)])
    distance = (each - got).abs().amax((2, 3))
    assert (distance.amin(0) < 1e-5).all()
    assert (distance.sort(0).values[1] > 1e-4).all(), "depths must differ to be told apart"
    return 1 + distance.argmin(0)


@pytest.mark.parametrize("state_init", ["input", "zeros"])
@pytest.mark.parametrize("recurrent_layers", [1, 2])
def test_a_sequence_that_goes_back_has_run_the_loops_since(state_init: str, recurrent_layers: int) -> None:
    model = _timeless(state_init=state_init, recurrent_layers=recurrent_layers, restart_rate=0.25)
    ids = random_ids(model.config, 400, 3)
    torch.manual_seed(3)
    with torch.no_grad():
        counts = _depths(model, ids, model(ids, n_loops=LOOPS)).bincount(minlength=LOOPS + 1).tolist()
    assert counts[0] == 0
    assert 270 < counts[LOOPS] < 330, "three quarters of the sequences"
    assert all(10 < n < 45 for n in counts[1:LOOPS]), "each of the loops alike"


def test_the_share_is_that_of_every_depth() -> None:
    """However many loops others of the batch run; who has one cannot go back."""
    model = _timeless()
    ids, loops = random_ids(model.config, 600, 3), torch.tensor([1, 3, LOOPS]).repeat(200)
    torch.manual_seed(0)
    with torch.no_grad():
        got = model(ids, n_loops=loops, full_output=True)
        depths = _depths(model, ids, got.logits)
    assert (depths[loops == 1] == 1).all()
    for asked in (3, LOOPS):
        counts = depths[loops == asked].bincount(minlength=LOOPS + 1).tolist()
        assert 75 < counts[asked] < 125, "half of the sequences"
        assert all(100 / (asked - 1) * 0.5 < n < 100 / (asked - 1) * 1.5 for n in counts[1:asked])
    assert torch.equal(got.exit_loops, depths.unsqueeze(1).expand(-1, 3))


def test_padding_keeps_its_one_loop() -> None:
    model = _timeless(restart_rate=0.99)
    ids, loops = random_ids(model.config, 8, 6), torch.full((8, 6), LOOPS)
    loops[:, 4:] = 1
    with torch.no_grad():
        got = model(ids, n_loops=loops, full_output=True)
        once = model.eval()(ids, n_loops=1, full_output=True)
    assert (got.exit_loops[:, 4:] == 1).all()
    torch.testing.assert_close(got.state[:, 4:], once.state[:, 4:], atol=1e-6, rtol=1e-6)
    assert (got.exit_loops[:, :4] < LOOPS).any()


@pytest.mark.parametrize(("training", "rate", "n_loops"), [(False, 0.9, 4), (True, 0.0, 4), (True, 0.9, 1)])
def test_without_training_a_rate_or_a_second_loop_nothing_is_drawn(training: bool, rate: float, n_loops: int) -> None:
    model = _timeless(restart_rate=rate).train(training)
    ids, before = random_ids(model.config, 8, 6), torch.get_rng_state()
    with torch.no_grad():
        got = model(ids, n_loops=n_loops)
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(got, model.eval()(ids, n_loops=n_loops), atol=1e-6, rtol=1e-6)


def test_nothing_is_drawn_through_a_cache() -> None:
    """What a later call continues must be what the first one has stored."""
    model, before = _timeless(restart_rate=0.99), torch.get_rng_state()
    model(random_ids(model.config, 8, 6), n_loops=4, kv_cache={})
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_weighed_before_does_not_count() -> None:
    """Neither in the mean of states, nor in when a position halts, nor in what that costs."""
    model = _timeless(halting="act", act_threshold=0.7)
    act = model.recurrent.act
    assert act is not None
    with torch.no_grad():
        act.halt.bias.fill_(-1.2)  # a quarter per loop: three, and some positions two or four
        act.halt.weight.mul_(0.05)
    ids = random_ids(model.config, 60, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        got = model(ids, n_loops=LOOPS, full_output=True)
        each = [model.eval()(ids, n_loops=n, full_output=True) for n in range(1, LOOPS + 1)]
    distance = torch.stack([(one.logits - got.logits).abs().amax((1, 2)) for one in each])
    depths = distance.argmin(0)
    assert (distance.amin(0) < 1e-5).all()
    assert len(set(depths.tolist())) > 2
    exits = torch.stack([one.exit_loops for one in each])[depths, torch.arange(60)]
    assert torch.equal(got.exit_loops, exits)
    with torch.no_grad():
        plain = model.eval()(ids, n_loops=depths + 1, full_output=True)
    torch.testing.assert_close(got.ponder_cost, plain.ponder_cost, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grad_loops", [None, 1, 2, 4])
def test_gradients_are_those_of_the_loops_since(grad_loops: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two loops, for a sequence that goes back before the fourth of five."""
    model = _timeless(restart_rate=0.99)
    ids = random_ids(model.config, 4, 6)
    monkeypatch.setattr(torch, "randint", lambda _, size, **how: torch.full(size, 2, **how))
    monkeypatch.setattr(torch, "rand", lambda size, **how: torch.zeros(size, **how))

    def gradients(n_loops: int) -> dict[str, Tensor]:
        model.zero_grad()
        context = model.context(ids.shape[1])
        result = model.recurrent(model.encode(ids, context), torch.full((4,), n_loops), context, grad_loops=grad_loops)
        assert (result.exit_loops == 2).all()
        model.decode(result.state, context).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    got = gradients(LOOPS)
    model.recurrent.config = model.config.replace(restart_rate=0)
    for name, grad in gradients(2).items():
        torch.testing.assert_close(got[name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_with_noise_the_first_state_is_the_same_again() -> None:
    model = _timeless(state_init="noise", restart_rate=0.99)
    ids = random_ids(model.config, 1, 4)
    starts: list[Tensor] = []
    step = model.recurrent.step

    def noted(h: Tensor, *arguments: object, **how: object) -> Tensor:
        starts.append(h.detach())
        return step(h, *arguments, **how)  # type: ignore[arg-type]

    model.recurrent.step = noted  # type: ignore[method-assign]
    model(ids, n_loops=LOOPS)
    assert sum(torch.equal(h, starts[0]) for h in starts) == 2


@pytest.mark.parametrize("how", [{}, {"grad_loops": 2}, {"measure_movement": True}])
def test_loops_computed_again_on_the_way_back_go_back_where_the_first_ones_did(how: dict[str, int]) -> None:
    model = _timeless(lora_rank=2, loop_embedding=True, halting="act")
    ids = random_ids(model.config, 8, 6)

    def gradients(*, recompute: bool) -> dict[str, Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        context = model.context(ids.shape[1])
        e = model.encode(ids, context)
        result = model.recurrent(e, torch.full((8,), LOOPS), context, recompute=recompute, **how)
        moved = 0 if result.movement is None else result.movement
        (model.decode(result.state, context).square().mean() + result.ponder_cost + moved).backward()
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
