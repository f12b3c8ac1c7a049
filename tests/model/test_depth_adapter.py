"""What differs from loop to loop stays sane at loops that training never saw."""

from __future__ import annotations

import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.model.depth_adapter import DepthAdapter, LoopEmbedding
from tiny import random_ids, tiny_config, tiny_model


def _randomised_adapter(scale: float) -> DepthAdapter:
    adapter = DepthAdapter(8, 3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_().mul_(scale)
    return adapter


@pytest.mark.parametrize("t", [0, 1, 7, 1000, 10**6])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_the_adapter_and_its_gradients_are_finite_at_any_loop(t: int, scale: float) -> None:
    adapter = _randomised_adapter(scale)
    adapter(torch.randn(2, 8), t).sum().backward()
    assert bool(adapter.scale(t).isfinite().all())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in adapter.parameters())


def test_the_adapter_settles() -> None:
    adapter = _randomised_adapter(1.0)
    torch.testing.assert_close(adapter.scale(1000), adapter.settled, atol=1e-6, rtol=0)
    torch.testing.assert_close(adapter.scale(0), adapter.settled + adapter.transient)


def test_scales_between_start_and_limit_never_leave_their_interval() -> None:
    adapter = _randomised_adapter(2.0)
    first, limit = adapter.scale(0), adapter.settled
    low, high = torch.minimum(first, limit) - 1e-6, torch.maximum(first, limit) + 1e-6
    for t in range(100):
        assert bool(((adapter.scale(t) >= low) & (adapter.scale(t) <= high)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loop_embedding_fades(dtype: torch.dtype) -> None:
    embedding = LoopEmbedding(8)
    with torch.no_grad():
        embedding.weight.normal_()
    embedding.to(dtype)
    sizes = [float(embedding(t).detach().float().norm()) for t in (0, 10, 100, 1000)]
    assert all(size == size for size in sizes)
    assert sizes[2] < 0.2 * sizes[0]
    assert sizes[3] < 1e-6
    assert not torch.equal(embedding(0), embedding(1))


@torch.no_grad()
def test_a_model_run_a_thousand_loops_stays_finite_and_settles() -> None:
    model = tiny_model(tiny_config(n_experts=0))
    for branch in (model.recurrent.block.attn.out, model.recurrent.block.ffn.down):
        branch.weight.mul_(0.1)  # small enough that the loop is a contraction
    e = model.encode(random_ids(model.config, 1, 4))
    context, h, states = model.context(4), e, []
    for t in range(1000):
        h = model.loop_step(h, e, t, context)
        states.append(h)
    assert bool(model.decode(h).isfinite().all())
    torch.testing.assert_close(states[999], states[900], atol=1e-4, rtol=0)


def test_a_fresh_adapter_and_embedding_change_nothing() -> None:
    """Both start silent, so that switching them on does not disturb the first steps."""
    config = tiny_config()
    model = OpenMythos(config).eval()
    plain = OpenMythos(config.replace(lora_rank=0, loop_embedding=False)).eval()
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    ids = random_ids(config, 2, 5)
    torch.testing.assert_close(plain(ids, 3), model(ids, 3))
