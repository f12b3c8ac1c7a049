"""A short training run: it learns, repeats, reports every step, and stops where the loss is lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from open_mythos.model.mythos import OpenMythos
from open_mythos.training.fit import Batch, FitConfig, Step, fit
from tiny import random_ids, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = tiny_config(vocab_size=5, max_loop_iters=2)


def successor(step: int) -> Batch:
    """The answer at every position is the token after its own, cyclically: learned within a few steps."""
    ids = random_ids(CONFIG, 8, 6, seed=step)
    return Batch(ids, (ids + 1) % CONFIG.vocab_size, 2)


def trained(config: FitConfig, seed: int = 0, draw: object = successor) -> tuple[OpenMythos, list[Step]]:
    torch.manual_seed(seed)
    model, steps = OpenMythos(CONFIG), []
    fit(model, draw, config, steps.append)  # type: ignore[arg-type]
    return model, steps


def weights(model: OpenMythos) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def test_it_learns_and_leaves_the_model_in_evaluation_mode() -> None:
    model, steps = trained(FitConfig(steps=60, learning_rate=0.02, weight_decay=0.0, warmup=5))
    assert steps[0].loss > 1
    assert steps[-1].loss < 0.1
    assert steps[-1].accuracy == 1.0
    assert not any(module.training for module in model.modules())


def test_the_observer_sees_every_step_in_order() -> None:
    _, steps = trained(FitConfig(steps=3, learning_rate=0.01, weight_decay=0.1))
    assert [step.index for step in steps] == [0, 1, 2]
    assert {step.n_loops for step in steps} == {2}
    assert all(math.isfinite(step.loss) and 0 <= step.accuracy <= 1 for step in steps)


def test_an_observer_is_not_needed_and_changes_nothing() -> None:
    config = FitConfig(steps=3, learning_rate=0.01, weight_decay=0.1)
    torch.manual_seed(0)
    model = OpenMythos(CONFIG)
    fit(model, successor, config)
    assert all(map(torch.equal, weights(model), weights(trained(config)[0])))


def test_the_seed_decides_everything() -> None:
    config = FitConfig(steps=4, learning_rate=0.01, weight_decay=0.1)
    (one, first), (same, again), (other, _) = (trained(config, seed) for seed in (3, 3, 4))
    assert first == again
    assert all(map(torch.equal, weights(one), weights(same)))
    assert not torch.equal(one.embed.weight, other.embed.weight)


def test_targets_of_minus_100_do_not_count() -> None:
    """All targets but the first position's are ignored: accuracy is that of the first alone, and can reach 1."""

    def draw(step: int) -> Batch:
        ids, targets, _ = successor(step)
        return Batch(ids, torch.where(torch.arange(6) == 0, targets, -100), 2)

    _, steps = trained(FitConfig(steps=60, learning_rate=0.02, weight_decay=0.0, warmup=5), draw=draw)
    assert steps[-1].accuracy == 1.0


def test_a_loss_that_is_not_finite_is_an_error_naming_the_step_and_saves_the_weights_before_it() -> None:
    torch.manual_seed(0)
    model = OpenMythos(CONFIG)
    before: list[Tensor] = []

    def draw(step: int) -> Batch:
        if step == 2:
            before.extend(parameter.detach().clone() for parameter in model.parameters())
            with torch.no_grad():  # what an overflow would do
                model.norm.weight[0] = float("inf")
        return successor(step)

    config = FitConfig(steps=5, learning_rate=0.01, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at step 2; a lower learning_rate than 0\.01 may help"):
        fit(model, draw, config)
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        assert name == "norm.weight" or torch.equal(parameter, old), name


def test_the_rate_rises_over_the_warmup_then_falls_along_a_cosine_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def recording(optimizer: torch.optim.AdamW, *args: object) -> object:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    trained(FitConfig(steps=14, learning_rate=0.5, weight_decay=0.1, warmup=4))
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    cosine = [0.25 * (1 + math.cos(math.pi * part / 10)) for part in range(10)]
    assert rates[4:] == pytest.approx(cosine)
    assert rates[-1] < 0.02


def test_only_matrices_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no gradient to speak of, decay is all that moves a weight: gains and biases must stay."""
    model = OpenMythos(CONFIG)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, _: [p.grad.zero_() for p in parameters])
    fit(model, successor, FitConfig(steps=1, learning_rate=0.1, weight_decay=0.5, warmup=1))
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.95 if parameter.dim() >= 2 else 1.0)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_the_ponder_cost_shortens_thinking() -> None:
    """The task needs one loop; weighed heavily, the cost of loops makes positions stop at once."""

    def exits(weight: float) -> float:
        model, _ = trained(
            FitConfig(steps=80, learning_rate=0.02, weight_decay=0.0, ponder_weight=weight, ponder_share=1.0)
        )
        ids = random_ids(CONFIG, 8, 6, seed=99)
        with torch.no_grad():
            return float(model(ids, 8, full_output=True).exit_loops.float().mean())

    assert exits(1.0) < exits(0.0)


def test_steps_below_1_are_refused() -> None:
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        FitConfig(steps=0, learning_rate=0.01, weight_decay=0.1)
