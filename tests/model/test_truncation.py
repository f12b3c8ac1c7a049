"""Gradients through the last loops only, and loops computed again on the way back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from open_mythos import OpenMythos
from tiny import random_ids, tiny_config, tiny_model

KINDS = [
    pytest.param({}, id="act"),
    pytest.param({"halting": "none"}, id="last-state"),
    pytest.param({"halting": "none", "state_init": "zeros", "attn_type": "mla"}, id="mla-zeros"),
    pytest.param({"recurrent_layers": 2, "window": 3}, id="two-layers"),
]


def _gradients(model: OpenMythos, ids: Tensor, loops: list[int], **how: object) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of their summed squares and of the movement, if it is measured."""
    model.zero_grad()
    context = model.context(ids.shape[1])
    e = model.encode(ids, context)
    result = model.recurrent(e, torch.tensor(loops, dtype=torch.int32), context, **how)
    logits = model.decode(result.state, context)
    (logits.square().sum() + (0 if result.movement is None else result.movement)).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Absent and zero are the same gradient."""
    for name in found.keys() | expected.keys():
        one, other = found.get(name), expected.get(name)
        one = torch.zeros_like(other) if one is None else one
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=1e-4, msg=name)


def _detached(model: OpenMythos, ids: Tensor, n_loops: int, grad_loops: int) -> dict[str, Tensor]:
    """The same for one sequence of a model without halting, loop by loop, as the definition has it."""
    model.zero_grad()
    e = model.encode(ids)
    h = model.recurrent.initial_state(e)
    context = model.context(ids.shape[1])
    for t in range(n_loops):
        if t == n_loops - grad_loops > 0:
            h = h.detach()
            context.injected = None
        with torch.set_grad_enabled(t >= n_loops - grad_loops):
            h = model.loop_step(h, e, t, context)
    model.decode(h).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_enough_gradient_loops_are_all_of_them(kind: dict) -> None:
    model = tiny_model(tiny_config(**kind))
    ids, loops = random_ids(model.config, 3, 7), [4, 2, 5]
    logits, expected = _gradients(model, ids, loops)
    truncated, found = _gradients(model, ids, loops, grad_loops=5)
    torch.testing.assert_close(truncated, logits, atol=1e-5, rtol=1e-5)
    _assert_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS[1:3])
@pytest.mark.parametrize("grad_loops", [1, 2, 3])
def test_a_batch_of_unequal_depths_learns_what_each_sequence_would_alone(kind: dict, grad_loops: int) -> None:
    model = tiny_model(tiny_config(**kind))
    ids, loops = random_ids(model.config, 3, 7), [5, 1, 3]
    logits, found = _gradients(model, ids, loops, grad_loops=grad_loops)
    torch.testing.assert_close(logits, model(ids, torch.tensor(loops)).detach(), atol=1e-5, rtol=1e-5)
    expected: dict[str, Tensor] = {}
    for row, n_loops in zip(ids, loops, strict=True):
        alone = _detached(model, row.unsqueeze(0), n_loops, min(grad_loops, n_loops))
        expected = {name: expected.get(name, 0) + gradient for name, gradient in alone.items()}
    _assert_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad_loops", [None, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("measure_movement", [False, True])
def test_computing_loops_again_changes_no_gradient(
    kind: dict, grad_loops: int | None, training: bool, measure_movement: bool
) -> None:
    how = {"grad_loops": grad_loops, "measure_movement": measure_movement}
    model = tiny_model(tiny_config(**kind, dropout=0.2)).train(training)
    ids, loops = random_ids(model.config, 3, 7), [4, 2, 5]
    torch.manual_seed(3)
    logits, expected = _gradients(model, ids, loops, **how)
    torch.manual_seed(3)
    again, found = _gradients(model, ids, loops, **how, recompute=True)
    assert torch.equal(again, logits)
    _assert_equal(found, expected)


@pytest.mark.parametrize("grad_loops", [None, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_movement_is_what_one_loop_more_would_do(grad_loops: int | None, recompute: bool) -> None:
    """Each sequence's own next loop, whose index counts; the load of its experts does not."""
    model = tiny_model(tiny_config(halting="none", n_experts=4, lora_rank=2, loop_embedding=True))
    ids, loops = random_ids(model.config, 3, 7), torch.tensor([4, 2, 5])
    context = model.context(7)
    context.expert_load = {}
    how = {"grad_loops": grad_loops, "recompute": recompute, "measure_movement": True}
    movement = model.recurrent(model.encode(ids, context), loops, context, **how).movement
    here, there = (model(ids, n, full_output=True).state for n in (loops, loops + 1))
    torch.testing.assert_close(movement, (there - here).square().mean())
    movement.backward()
    assert len(context.stacked_load()) == 5


def test_with_act_the_movement_is_the_last_loops_and_not_the_means() -> None:
    model = tiny_model(tiny_config(halting="act"))
    with torch.no_grad():
        model.recurrent.act.halt.weight.zero_()
        model.recurrent.act.halt.bias.fill_(-2.0)
    context, e = model.context(7), model.encode(random_ids(model.config, 2, 7))
    h = model.recurrent.initial_state(e)
    for t in range(3):
        h = model.loop_step(h, e, t)
    result = model.recurrent(e, torch.tensor([3, 3]), context, measure_movement=True)
    torch.testing.assert_close(result.movement, (model.loop_step(h, e, 3) - h).square().mean())
    assert not torch.allclose(result.state, h, atol=1e-3)


def test_truncation_keeps_fewer_tensors_than_full_gradients() -> None:
    """What is kept for the way back grows with `grad_loops`, not with the loops; with `recompute`, hardly at all."""
    model = tiny_model(tiny_config(halting="none", lora_rank=0, loop_embedding=False)).train()
    ids = random_ids(model.config, 4, 16)

    def kept(loops: int, **how: object) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            context = model.context(16)
            model.recurrent(model.encode(ids, context), torch.full((4,), loops), context, **how)
        return total

    assert kept(16, grad_loops=2) == kept(8, grad_loops=2) < kept(8) / 2.5
    one_state = 4 * 16 * 16
    assert kept(16, recompute=True) - kept(8, recompute=True) <= 8 * 2 * one_state
