"""In training some sequences run deeper than asked: which, how deep, and that nothing else about a pass changes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.model.checks import check_loops
from open_mythos.model.deeper import Deeper
from open_mythos.model.many_rows.function import _Stage
from open_mythos.model.mythos import OpenMythos
from tiny import random_ids, tiny_config, tiny_model


def _training(rate: float, **changes: object) -> OpenMythos:
    return tiny_model(tiny_config(**{"balance_rate": 0.0, "deeper_rate": rate, **changes})).train()


@pytest.mark.parametrize("rate", [0.125, 0.5])
def test_the_share_and_the_depths_are_those_asked_for(rate: float) -> None:
    torch.manual_seed(0)
    more = torch.zeros(13, dtype=torch.long)
    for _ in range(800):
        deeper = Deeper.drawn(rate, torch.full((8,), 3))
        extra = torch.zeros(8, dtype=torch.long) if deeper is None else deeper.n_loops - 3
        more += extra.bincount(minlength=13)
    assert abs(int(more[1:].sum()) / 6400 - rate) < 0.02
    for k in range(1, 13):  # k with a share of log(1 + 1/k), so about 1/k
        expected = 6400 * rate * math.log(1 + 1 / k) / math.log(13)
        assert abs(int(more[k]) - expected) < 5 * expected**0.5


def test_the_sequences_of_a_pass_have_depths_of_their_own() -> None:
    torch.manual_seed(0)
    deeper = Deeper.drawn(0.5, torch.full((64,), 4))
    assert deeper is not None
    assert len(deeper.n_loops.unique()) > 6


def test_a_batch_of_one_runs_deeper_now_and_then() -> None:
    torch.manual_seed(0)
    n = sum(Deeper.drawn(0.25, torch.tensor([4])) is not None for _ in range(400))
    assert 70 < n < 130


def test_each_sequence_goes_by_its_own_depth_and_padding_stays() -> None:
    torch.manual_seed(0)
    for _ in range(50):
        deeper = Deeper.drawn(0.99, torch.tensor([1, 2, 8]))
        assert deeper is not None
        assert (deeper.n_loops > torch.tensor([1, 2, 8])).sum() == deeper.n
        assert (deeper.n_loops <= torch.tensor([5, 10, 40])).all()
        by_position = Deeper.drawn(0.99, torch.tensor([[4, 4, 1], [6, 6, 6]]))
        assert by_position is not None
        assert int(by_position.n_loops[0, 2]) == 1
        assert int(by_position.n_loops[1].max()) in range(6, 31)


@pytest.mark.parametrize("n_loops", [3, [4, 1, 3, 2, 5, 3]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"halting": "none"}, {"act_threshold": 0.6}, {"n_experts": 0}], ids=str)
def test_a_pass_is_that_of_the_depths_that_were_drawn(changes: dict[str, object], n_loops: int | list[int]) -> None:
    """Logits, exits, costs and loads are those of the whole batch at once, everybody's depth given."""
    model = _training(0.4, **changes)
    ids, asked = random_ids(model.config, 6, 7), torch.tensor(n_loops).expand(6)
    plain = copy.deepcopy(model)
    plain.config = plain.recurrent.config = model.config.replace(deeper_rate=0)
    for seed in range(3):
        torch.manual_seed(seed)
        drawn = Deeper.drawn(0.4, asked)
        assert drawn is not None
        torch.manual_seed(seed)
        with torch.no_grad():
            got = model(ids, asked, full_output=True)
            expected = plain(ids, drawn.n_loops, full_output=True)
        for name in ("logits", "exit_loops", "ponder_cost", "halting_probabilities", "state"):
            a, b = getattr(got, name), getattr(expected, name)
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, check_dtype=False, msg=name)
        assert (got.expert_load is None) == (expected.expert_load is None)
        if got.expert_load is not None:
            assert torch.equal(got.expert_load, expected.expert_load)


@pytest.mark.parametrize("n_loops", [3, [4, 1, 3, 2, 5, 3]], ids=str)
def test_gradients_are_those_of_each_sequence_alone(n_loops: int | list[int]) -> None:
    model = _training(0.4)
    ids, asked = random_ids(model.config, 6, 7), torch.tensor(n_loops).expand(6)
    torch.manual_seed(1)
    drawn = Deeper.drawn(0.4, asked)
    assert drawn is not None
    torch.manual_seed(1)
    weights = torch.randn(6, 7, model.config.vocab_size)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def alone(i: int) -> Tensor:
        context = model.context(7)
        result = model.recurrent(model.encode(ids[i : i + 1], context), drawn.n_loops[i : i + 1], context)
        return (model.decode(result.state, context) * weights[i]).sum() + result.ponder_cost / 6

    torch.manual_seed(1)
    found = model(ids, asked, full_output=True)
    got = gradients((found.logits * weights).sum() + found.ponder_cost)
    expected = gradients(torch.stack([alone(i) for i in range(6)]).sum())
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        bound = 2e-5 * max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(got[name], grad, atol=bound, rtol=1e-4, msg=name)


def test_routers_balance_by_the_load_of_all() -> None:
    model = _training(0.4, balance_rate=0.05)
    plain, ids = copy.deepcopy(model), random_ids(model.config, 6, 7)
    plain.config = plain.recurrent.config = model.config.replace(deeper_rate=0)
    torch.manual_seed(1)
    drawn = Deeper.drawn(0.4, torch.full((6,), 3))
    assert drawn is not None
    torch.manual_seed(1)
    model(ids, 3)
    plain(ids, drawn.n_loops)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(plain.named_buffers())[name], msg=name)


@pytest.mark.parametrize(("training", "rate", "cached"), [(False, 0.9, False), (True, 0.0, False), (True, 0.9, True)])
def test_without_training_or_a_rate_or_with_a_cache_nothing_is_drawn(training: bool, rate: float, cached: bool) -> None:
    model = _training(rate).train(training)
    ids, before = random_ids(model.config, 8, 6), torch.get_rng_state()
    got = model(ids, n_loops=3, kv_cache={} if cached else None)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(got, model.eval()(ids, n_loops=3), atol=1e-5, rtol=1e-5)


def test_nothing_is_drawn_where_several_processes_would_have_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = _training(0.99), torch.get_rng_state()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model(random_ids(model.config, 8, 6), n_loops=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_depths_are_drawn_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        loops = check_loops(3, torch.zeros(4, 2, dtype=torch.long, device="cpu"), tiny_config())
        deeper = Deeper.drawn(0.99, loops)
    assert deeper is not None
    assert {loops.device.type, deeper.n_loops.device.type, deeper.order.device.type} == {"cpu"}


def test_deeper_sequences_go_through_compiled_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = _training(0.5), list[int]()
    run = _Stage.run

    def counted(self: _Stage, x: Tensor, *arguments: Any) -> Tensor:
        calls.append(len(x))
        return run(self, x, *arguments)

    monkeypatch.setattr(_Stage, "run", counted)
    torch.manual_seed(0)
    drawn = Deeper.drawn(0.5, torch.full((6,), 3))
    assert drawn is not None
    torch.manual_seed(0)
    model(random_ids(model.config, 6, 7), n_loops=3)
    most = int(drawn.n_loops.max())
    assert calls == [6, *[drawn.n] * most, *[6 - drawn.n] * 3, 6]


def test_a_seed_repeats_training() -> None:
    config = MythosConfig(dim=16, max_seq_len=16, vocab_size=5)
    assert config.deeper_rate > 0, "by default a depth that is always the same is not all that training sees"
    model, ids = OpenMythos(config).train(), random_ids(config, 64, 6)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids, n_loops=3).detach()

    first = logits(0)
    assert torch.equal(first, logits(0))
    assert not torch.equal(first, logits(1))
