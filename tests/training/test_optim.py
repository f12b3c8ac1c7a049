"""Every parameter has one optimizer and one decay, and the rate follows its schedule."""

from __future__ import annotations

import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.training.muon import Muon
from open_mythos.training.optim import OptimConfig, build_optimizers, group_parameters, set_rate
from open_mythos.training.schedule import Schedule
from tiny import random_ids, tiny_config


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group(attn_type: str, kind: str, tied: bool) -> None:
    model = OpenMythos(tiny_config(attn_type, tie_embeddings=tied))
    optimizers = build_optimizers(model, OptimConfig(kind=kind))
    found = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_vectors_a_dt_and_b_do_not_decay_and_matrices_do() -> None:
    model = OpenMythos(tiny_config())
    (adamw,) = build_optimizers(model, OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        free = parameter.dim() < 2 or name.endswith(("qk_gain", "halt.weight", "loop_embedding.weight"))
        assert decay[id(parameter)] == (0.0 if free else 0.3), name
    free_names = {n for n, p in model.named_parameters() if decay[id(p)] == 0}
    injection = {f"recurrent.injection.{name}" for name in ("log_a", "log_dt", "B")}
    assert injection <= free_names


def test_muon_takes_the_hidden_matrices_only() -> None:
    groups = group_parameters(model := OpenMythos(tiny_config()))
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)] for p in groups.hidden}
    assert {"prelude.0.attn.qkv.weight", "recurrent.blocks.0.attn.out.weight"} <= hidden
    assert not [name for name in hidden if "embed" in name or "router" in name or name[-8:] == "ffn.gate"]
    assert all(p.dim() == 2 for p in groups.hidden)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_lowers_the_loss(kind: str) -> None:
    torch.manual_seed(0)
    model = OpenMythos(tiny_config())
    ids = random_ids(model.config, 4, 12)
    optimizers = build_optimizers(model, OptimConfig(kind=kind, learning_rate=3e-3))

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids, 2).flatten(0, 1), ids.flatten())

    before = loss()
    for _ in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss() < 0.8 * before


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_steps_as_pytorch_s_does(shape: tuple[int, int]) -> None:
    """Theirs multiplies in bfloat16, hence the tolerance: three hundredths of a step, which rounding adds up to."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    rates = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9}
    pair = Muon([ours], **rates), torch.optim.Muon([theirs], **rates, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
        moved = (ours - before).norm()
        assert (ours - theirs).norm() < 0.03 * moved


def test_the_rate_is_set_everywhere() -> None:
    optimizers = build_optimizers(OpenMythos(tiny_config()), OptimConfig(kind="muon"))
    set_rate(optimizers, 0.25)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {0.25}


def test_a_cosine_rises_then_falls_to_its_end() -> None:
    schedule = Schedule(warmup=10, final=0.1)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1.0
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1)
    assert factors[55] == pytest.approx(0.55)


def test_warm_up_stable_decay_is_level_until_its_decay() -> None:
    schedule = Schedule(shape="wsd", warmup=10, decay=0.4)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert set(factors[9:61]) == {1.0}
    assert factors[80] == pytest.approx(0.5)
    assert factors[100] == 0


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Schedule, "shape", "linear"),
        (Schedule, "warmup", -1),
        (Schedule, "decay", 0.0),
        (Schedule, "final", 2.0),
        (OptimConfig, "kind", "sgd"),
        (OptimConfig, "learning_rate", 0.0),
        (OptimConfig, "weight_decay", -0.1),
        (OptimConfig, "betas", (0.9, 1.0)),
        (OptimConfig, "momentum", 1.0),
    ],
)
def test_wrong_values_are_refused_by_name(kind, field: str, value) -> None:
    with pytest.raises(ValueError, match=field):
        kind(**{field: value})
