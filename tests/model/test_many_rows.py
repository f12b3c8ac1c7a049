"""Layers in compiled code give the numbers and the gradients of the modules that they stand in for."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_mythos import OpenMythos
from open_mythos.model.arithmetic import exponential
from open_mythos.model.arithmetic.compiled import Threads
from open_mythos.model.attention import GQAttention
from open_mythos.model.cache import CacheAddress
from open_mythos.model.many_rows import function, plan, products, stand_ins
from open_mythos.model.many_rows.attention import attend, attend_back
from open_mythos.training.depth import LoopPlan
from open_mythos.training.objective import Objective
from tiny import random_ids, tiny_config, tiny_model

VARIANTS: list[dict[str, Any]] = [
    {},
    {"halting": "none"},
    {"halting": "act", "act_threshold": 0.6},
    {"window": 3, "outer_window": 2},
    {"window": 1},
    {"recurrent_layers": 2, "window": 4},
    {"prelude_layers": 2, "coda_layers": 2, "n_experts": 0, "lora_rank": 0, "loop_embedding": False},
    {"n_experts": 8, "n_experts_per_tok": 3, "router_score": "sigmoid", "routed_scale": 1.7},
    {"n_experts": 8, "n_shared_experts": 0, "n_experts_per_tok": 1},
    {"n_experts": 3, "n_experts_per_tok": 3, "routed_scale": 0.0},
    {"use_rope": False, "attention_sink": False, "qk_norm": False, "tie_embeddings": False},
    {"n_kv_heads": 4, "ffn_dim": 23, "expert_dim": 19},
    {"dropout": 0.3},
    {"dropout": 0.1, "recurrent_layers": 2, "state_init": "noise"},
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for every stage, loop or layer by itself that compiled code has computed."""
    made: list[object] = []
    run = function._Stage.run

    def spied(self: function._Stage, *args: Any) -> Tensor:
        made.append(self)
        return run(self, *args)

    monkeypatch.setattr(function._Stage, "run", spied)
    return made


def by_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "_serves", lambda *_: False)


def run(model: OpenMythos, ids: Tensor, n_loops: int | Tensor) -> dict[str, Tensor]:
    """All that a pass gives, and the gradient of every parameter."""
    model.zero_grad()
    torch.manual_seed(11)
    found = model(ids, n_loops, full_output=True)
    weights = torch.randn(found.logits.shape, generator=torch.Generator().manual_seed(3))
    ((found.logits * weights).sum() + found.ponder_cost).backward()
    seen = {"logits": found.logits.detach(), "exits": found.exit_loops, "ponder": found.ponder_cost.detach()}
    if found.expert_load is not None:
        seen["load"] = found.expert_load
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**seen, **grads}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = 2e-5 * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, atol=bound, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("n_loops", [1, 3, [4, 1, 3]], ids=str)
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "tiny")
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_pass_and_its_gradients_equal_those_of_the_modules(
    attn_type: str, changes: dict[str, Any], n_loops: Any, calls: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_config(attn_type, **changes)).train()
    other = copy.deepcopy(model)  # a pass in training moves the routers' biases
    ids, loops = random_ids(model.config, 3, 13), torch.tensor(n_loops) if isinstance(n_loops, list) else n_loops
    found = run(model, ids, loops)
    assert calls
    by_modules(monkeypatch)
    assert_same(found, run(other, ids, loops))


def test_each_layer_drops_out_by_its_own_share_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config("gqa", recurrent_layers=3, dropout=0.5))
    ids, (first, second, third) = random_ids(model.config, 3, 13), model.recurrent.blocks
    without = run(model, ids, 2)
    first.dropout.train().p = 0.25
    second.dropout.train().p = 0.0
    assert not third.dropout.training
    found = run(model, ids, 2)
    assert not torch.equal(found["logits"], without["logits"])
    by_modules(monkeypatch)
    assert_same(found, run(model, ids, 2))


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_stage_is_one_call_and_a_loop_another(attn_type: str, calls: list[object]) -> None:
    model = tiny_model(tiny_config(attn_type, prelude_layers=2, recurrent_layers=2, coda_layers=3))
    model(random_ids(model.config, 2, 9), 3)
    assert len(calls) == 1 + 3 + 1


@pytest.mark.parametrize(
    ("hooked", "n_calls"),
    [
        ("prelude_norm", 1 + 2 + 1),
        ("norm", 1 + 2 + 1),
        ("recurrent.act", 1 + 2 + 1),
        ("recurrent.injection", 1 + 2 + 1),
        ("recurrent.adapter.down", 1 + 2 + 1),
        ("recurrent.blocks.0", 1 + 2 + 1),
        ("recurrent.blocks.0.ffn", 1 + 1),
        ("coda.0.attn", 1 + 2),
        ("recurrent", 1 + 2 + 1),
    ],
)
def test_hooks_around_layers_run_and_layers_are_compiled_as_before(
    hooked: str, n_calls: int, calls: list[object]
) -> None:
    model = tiny_model(tiny_config("gqa"))
    ids, seen = random_ids(model.config, 2, 9), list[object]()
    expected = model(ids, 2)
    calls.clear()
    model.get_submodule(hooked).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(ids, 2), expected)
    assert seen
    assert len(calls) == n_calls


@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_single_loop_in_which_some_have_halted(attn_type: str, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In loop 0, others see what these compute there; later, what they computed in their last loop."""
    model = tiny_model(tiny_config(attn_type, recurrent_layers=2))
    h, e, weights = torch.randn(3, 2, 7, model.config.dim).unbind()
    active = torch.arange(14).view(2, 7) % 3 > 0

    def found() -> dict[str, Tensor]:
        model.zero_grad()
        state, given, context = h.clone().requires_grad_(), e.clone().requires_grad_(), model.context(7)
        if t:
            model.loop_step(state, given, 0, context)
        after = model.loop_step(state, given, t, context, active)
        (after * weights).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"after": after.detach(), "h": state.grad, "e": given.grad, **grads}

    ours = found()
    by_modules(monkeypatch)
    assert_same(ours, found())


def test_stages_may_share_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config("gqa"))
    model.coda = model.prelude
    ids = random_ids(model.config, 2, 9)
    found = model(ids, 2)
    by_modules(monkeypatch)
    torch.testing.assert_close(found, model(ids, 2))


@pytest.mark.parametrize(
    "name",
    [
        *("norm.weight", "prelude_norm.weight", "recurrent.injection.B", "recurrent.injection.log_a"),
        *("recurrent.adapter.settled", "recurrent.adapter.transient", "recurrent.adapter.decay_logit"),
    ],
)
def test_weights_of_one_number_count_for_every_channel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config("gqa"))
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, torch.nn.Parameter(torch.full((1,), 0.7)))
    if own == "log_a":
        model.recurrent.injection.log_dt = torch.nn.Parameter(torch.zeros(1))
    ids = random_ids(model.config, 2, 9)
    found = model(ids, 2)
    by_modules(monkeypatch)
    torch.testing.assert_close(found, model(ids, 2))


def test_weights_of_other_sizes_are_refused() -> None:
    model = tiny_model(tiny_config("gqa"))
    ids = random_ids(model.config, 2, 9)
    model.recurrent.act.halt.weight = torch.nn.Parameter(torch.zeros(1, 5))
    with pytest.raises(RuntimeError):
        model(ids, 2)
    model = tiny_model(tiny_config("gqa"))
    model.norm.weight = torch.nn.Parameter(torch.zeros(7))
    with pytest.raises(RuntimeError):
        model(ids, 2)


def test_a_loop_may_be_without_layers() -> None:
    model = tiny_model(tiny_config("gqa", lora_rank=0, loop_embedding=False))
    model.recurrent.blocks = torch.nn.ModuleList()
    h, e = torch.randn(2, 1, 4, model.config.dim).unbind()
    assert torch.equal(model.loop_step(h, e, 0), model.recurrent.injection(h, e))


def test_without_gradients_layers_share_their_memory() -> None:
    config = tiny_config("gqa", prelude_layers=6)
    model, x = tiny_model(config), torch.zeros(2, 9, config.dim)
    with torch.no_grad():
        model.encode(random_ids(config, 2, 9))
        model.recurrent(x, torch.tensor([1, 1]), model.context(9))
    six = plan._plans[model.prelude][1]
    kept, not_kept = six.layout(x, 1), six.layout(x, 1, keep=False)
    assert not_kept.sizes.kept == 0
    assert not_kept.sizes.scratch < kept.sizes.scratch + kept.sizes.kept / 3


def test_layouts_of_many_shapes_are_not_all_remembered() -> None:
    config = tiny_config("gqa", max_seq_len=128)
    model = tiny_model(config)
    for seq in range(1, 80):
        model(random_ids(config, 1, seq), 1)
    assert len(plan._plans[model.recurrent][1]._layouts) <= plan._MOST_LAYOUTS


def test_who_is_not_asked_has_no_gradient() -> None:
    model = tiny_model(tiny_config("gqa"))
    h, e = torch.randn(2, 2, 7, model.config.dim).unbind()
    model.loop_step(h, e, 0).sum().backward()
    assert model.recurrent.act.halt.weight.grad is None
    assert model.recurrent.act.halt.bias.grad is None
    assert model.recurrent.injection.B.grad is not None


def test_the_ponder_cost_alone_has_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config("gqa", act_threshold=0.6))
    ids = random_ids(model.config, 2, 9)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, 4, full_output=True).ponder_cost.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    by_modules(monkeypatch)
    expected = gradients()
    assert {name for name, grad in expected.items() if grad.any()} <= found.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected.get(name, torch.zeros_like(grad)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_pass_that_halts_may_be_gone_back_twice_on_other_threads(recompute: bool) -> None:
    model = tiny_model(tiny_config("gqa", act_threshold=0.6))
    ids, parameters = random_ids(model.config, 3, 9), list(model.parameters())
    context = model.context(9)
    result = model.recurrent(model.encode(ids, context), torch.full((3,), 4), context, recompute=recompute)
    total = result.state.square().sum() + result.ponder_cost
    before = torch.get_num_threads()
    once = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    try:
        torch.set_num_threads(3 - before if before in (1, 2) else 1)
        again = torch.autograd.grad(total, parameters, allow_unused=True)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(once, again, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_norm_that_was_replaced_is_what_counts() -> None:
    model = tiny_model(tiny_config("gqa", halting="none"))
    ids = random_ids(model.config, 2, 9)
    model.prelude_norm = torch.nn.Identity()  # type: ignore[assignment]
    e = model.encode(ids)
    x = model.prelude[0](model.embed(ids) * model.config.dim**0.5, model.context(9), CacheAddress("prelude", 0))
    assert torch.equal(e, x)


def test_a_state_of_zeros_halts_with_the_gradients_of_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size has no direction in which it grows."""
    model = tiny_model(tiny_config("gqa", loop_embedding=False))
    zeros = torch.zeros(1, 3, model.config.dim)

    def gradients() -> list[Tensor]:
        h, context = zeros.clone().requires_grad_(), model.context(3)
        state = model.loop_step(h, zeros, 0, context)
        p = model.recurrent.halting_probabilities(state, context)
        assert p is not None
        return [p.detach(), *torch.autograd.grad((p * torch.arange(3)).sum(), [h, model.recurrent.act.halt.bias])]

    found = gradients()
    by_modules(monkeypatch)
    for one, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (1, 150), (2, 70), (40, 2)])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_any_shape(attn_type: str, window: int | None, batch: int, seq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(attn_type, window=window, outer_window=window, max_seq_len=256)
    model = tiny_model(config).train()
    other, ids = copy.deepcopy(model), random_ids(config, batch, seq)
    found = run(model, ids, 2)
    by_modules(monkeypatch)
    assert_same(found, run(other, ids, 2))


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("how", [{"recompute": True}, {"with_movement": True}])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_objective_with_loops_that_begin_later(
    attn_type: str, how: dict[str, bool], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_config(attn_type, dropout=dropout)).train()
    ids = random_ids(model.config, 3, 12)
    depths = LoopPlan(torch.tensor([4, 2, 3]), 2)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        sums = Objective(model, **how)(ids, ids, depths)
        (sums.loss + sums.ponder + sums.movement).backward()
        return {
            "loss": sums.loss.detach(),
            **{k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None},
        }

    found = gradients()
    by_modules(monkeypatch)
    assert_same(found, gradients())


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_threads_drop_out_the_same(attn_type: str) -> None:
    """Each multiplies rows of its own."""
    model = tiny_model(tiny_config(attn_type, dropout=0.3, balance_rate=0.0)).train()
    ids, before = random_ids(model.config, 3, 13), torch.get_num_threads()
    found = run(model, ids, 2)
    try:
        torch.set_num_threads(2)
        assert_same(run(model, ids, 2), found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_threads_change_no_number_and_companions_neither(attn_type: str) -> None:
    model = tiny_model(tiny_config(attn_type, n_experts=8, lora_rank=5, recurrent_layers=2))
    h, e = torch.randn(2, 5, 12, model.config.dim).unbind()
    ids = random_ids(model.config, 5, 12)

    def found(who: slice, seq: int) -> list[Tensor]:
        context = model.context(seq)
        state = model.loop_step(h[who, :seq], e[who, :seq], 3, context)
        assert context.halting is not None
        return [model.encode(ids[who, :seq]), state, context.halting.probabilities]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = found(slice(0, 5), 12)
        torch.set_num_threads(2)
        for one, other in zip(found(slice(0, 5), 12), alone, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(found(slice(2, 3), 7), alone, strict=True):
            assert torch.equal(one, other[2:3, :7])
    finally:
        torch.set_num_threads(before)


def test_passes_may_be_interleaved_and_gone_back_twice() -> None:
    model = tiny_model(tiny_config("gqa", halting="none"))
    ids = random_ids(model.config, 2, 9)
    expected = run(model, ids, 2)["logits"]
    first, second = model(ids, 2), model(ids.flip(1), 2)
    weights = torch.randn_like(first)
    parameters = [p for p in model.parameters() if p.requires_grad]
    once = torch.autograd.grad((first * weights).sum(), parameters, retain_graph=True, allow_unused=True)
    torch.autograd.grad((second * weights).sum(), parameters, allow_unused=True)
    model(ids.roll(1, 1), 2)
    again = torch.autograd.grad((first * weights).sum(), parameters, allow_unused=True)
    assert torch.equal(first, expected)
    for a, b in zip(once, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_what_a_pass_keeps_is_used_again() -> None:
    model = tiny_model(tiny_config("gqa"))
    ids = random_ids(model.config, 2, 9)
    for _ in range(3):
        model(ids, 4).sum().backward()
        gc.collect()
    free = plan._plans[model.recurrent][1].pool.free
    assert len(free) == 4  # one for each loop, of the first pass
    for seq in (3, 12, 5):
        model(random_ids(model.config, 2, seq), 4)
        gc.collect()
        assert len(free) == 4
    assert max(memory.size for memory in free) < 2 * min(memory.size for memory in free)


def test_weights_may_move_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config("mla"))
    ids = random_ids(model.config, 2, 9)
    model(ids, 2)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    model.recurrent.block.ffn.router_bias = torch.randn(4)
    other, found = copy.deepcopy(model), run(model, ids, 2)
    by_modules(monkeypatch)
    assert_same(found, run(other, ids, 2))


@pytest.mark.parametrize("name", ["attn.out.weight", "attn.qk_gain", "ffn.gate"])
def test_parameters_may_be_replaced_between_passes(name: str) -> None:
    model = tiny_model(tiny_config("gqa"))
    ids = random_ids(model.config, 2, 9)
    model(ids, 2)
    block = model.recurrent.block
    before = model(ids, 2)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(model(ids, 2), before)
    model(ids, 2).sum().backward()
    assert block.get_parameter(name).grad is not None
    block.get_parameter(name).data = block.get_parameter(name).data * 3
    after = model(ids, 2)
    assert not torch.allclose(after, before)
    assert torch.equal(after, copy.deepcopy(model)(ids, 2))


def test_a_window_may_change_between_passes() -> None:
    model, narrow = (tiny_model(tiny_config("gqa", window=window)) for window in (None, 2))
    ids = random_ids(model.config, 2, 9)
    model(ids, 2)
    model.recurrent.block.attn.window = 2
    assert torch.equal(model(ids, 2), narrow(ids, 2))


def test_weights_may_be_gone_between_the_two_ways() -> None:
    """As where they are sharded: their memory is given back, and comes again elsewhere."""
    model = tiny_model(tiny_config("gqa", halting="none"))
    ids, weights = random_ids(model.config, 2, 9), list(model.recurrent.blocks.parameters())
    expected = run(model, ids, 2)
    model.zero_grad()
    kept = [weight.detach().clone() for weight in weights]
    total = (model(ids, 2) * torch.randn(2, 9, 17, generator=torch.Generator().manual_seed(3))).sum()
    for weight in weights:
        weight.untyped_storage().resize_(0)
    in_their_place = [torch.full_like(weight, torch.nan) for weight in kept]
    for weight, old in zip(weights, kept, strict=True):
        weight.untyped_storage().resize_(4 * old.numel())
        with torch.autograd._unsafe_preserve_version_counter(weight):
            weight.data.copy_(old)
    total.backward()
    del in_their_place
    for name, parameter in model.recurrent.blocks.named_parameters():
        assert torch.equal(parameter.grad, expected[f"recurrent.blocks.{name}"])  # type: ignore[arg-type]


def test_a_weight_that_is_computed_gets_its_gradient(calls: list[object]) -> None:
    model = tiny_model(tiny_config("gqa", prelude_layers=0, coda_layers=0))
    out = model.recurrent.block.attn.out
    half = (out.weight / 2).detach().requires_grad_()
    del out.weight
    out.weight = half * 2  # type: ignore[assignment]
    model(random_ids(model.config, 2, 9), 2).sum().backward()
    assert half.grad is not None
    assert not calls


def test_without_gradients_nothing_is_kept() -> None:
    model = tiny_model(tiny_config("mla", halting="none"))
    ids = random_ids(model.config, 2, 9)
    expected = model(ids, 3).detach()
    free = plan._plans[model.recurrent][1].pool.free
    gc.collect()
    free.clear()
    with torch.no_grad():
        assert torch.equal(model(ids, 3), expected)
    gc.collect()
    assert not free


def test_other_defaults_change_nothing() -> None:
    model = tiny_model(tiny_config("gqa", qk_norm=False, halting="none"))
    ids = random_ids(model.config, 3, 30)
    expected = run(model, ids, 2)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        function._scratch.buffer = torch.empty(0, dtype=torch.float32)
        model.zero_grad()
        logits = model(ids, 2)
        logits.float().sum().backward()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(logits.detach(), expected["logits"])


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model(tiny_config("gqa"))
    ids = random_ids(model.config, 2, 9)
    with pytest.raises(RuntimeError):
        model.encode(ids, model.context(4))
    with pytest.raises(RuntimeError):
        model.prelude[0](torch.zeros(4, 9, 3), model.context(9), CacheAddress("prelude", 0))
    for shape in ((2, 9, 5), (2, 8, 16), (3, 9, 16)):
        with pytest.raises(RuntimeError):
            model.loop_step(torch.zeros(2, 9, 16), torch.zeros(shape), 0)


def test_forward_mode_without_gradients_goes_through_the_modules() -> None:
    model = tiny_model(tiny_config("gqa"))
    x = torch.randn(1, 5, 16)

    def layer(x: Tensor) -> Tensor:
        return model.prelude[0](x, model.context(5), CacheAddress("prelude", 0))  # type: ignore[no-any-return]

    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert tangent is not None
    torch.testing.assert_close((layer(x + 5e-3) - layer(x - 5e-3)) / 1e-2, tangent, atol=2e-2, rtol=2e-2)


def test_frozen_weights_get_no_gradient_and_inputs_alone_do() -> None:
    model = tiny_model(tiny_config("gqa"))
    model.requires_grad_(False)
    model.embed.weight.requires_grad_(True)
    model(random_ids(model.config, 2, 9), 2).sum().backward()
    assert model.embed.weight.grad is not None
    assert all(p.grad is None for p in model.recurrent.parameters())


def test_what_is_not_known_goes_through_the_modules(calls: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config("gqa"))
    ids = random_ids(model.config, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, 1)
    with sdpa_kernel(SDPBackend.MATH):
        model(ids, 1)
    copy.deepcopy(model).double()(ids, 1)
    seen: list[object] = []
    hooks = [layer.attn.register_forward_hook(lambda *_: seen.append(1)) for layer in (model.prelude[0], model.coda[0])]
    hooks.append(model.recurrent.block.ffn.register_full_backward_hook(lambda *_: seen.append(1)))
    model(ids, 1).sum().backward()
    assert len(seen) == 3
    assert not calls
    with monkeypatch.context() as patch:
        forward = GQAttention.forward
        patch.setattr(GQAttention, "forward", lambda *args: forward(*args))
        for hook in hooks:
            hook.remove()
        model(ids, 1)
    assert not calls
    model.recurrent.block.register_forward_hook(lambda *_: seen.append(1))
    model(ids, 1)
    assert len(calls) == 3, "a layer's own hooks run as ever"
    assert len(seen) == 4


def test_a_second_derivative_is_refused_outside_of_its_context() -> None:
    model = tiny_model(tiny_config("gqa"))
    loss = model(random_ids(model.config, 1, 5), 1).square().sum()
    (grad,) = torch.autograd.grad(loss, [model.recurrent.block.attn.out.weight], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        grad.sum().backward()


def test_what_is_not_finite_stays_so() -> None:
    model = tiny_model(tiny_config("gqa"))
    with torch.no_grad():
        model.recurrent.block.attn.qkv.weight[0, 0] = torch.nan
    assert model(random_ids(model.config, 1, 5), 1).isnan().all()


@pytest.mark.parametrize("add", [False, True])
def test_products_of_any_size_equal_numpys(add: bool) -> None:
    assert Threads().use()
    rng = np.random.default_rng(0)
    for _ in range(60):
        rows, columns, depth = (int(n) for n in rng.integers(1, (400, 150, 400)))
        x, w, y = (rng.standard_normal(s, dtype=np.float32) for s in ((rows, depth), (depth, columns), (rows, columns)))
        for product, other in ((products.by, w), (products.by_turned, np.ascontiguousarray(w.T))):
            out = y.copy()
            product(x, other, out, add)
            np.testing.assert_allclose(out, x @ w + add * y, atol=1e-4)
        first, end = sorted(int(n) for n in rng.integers(0, depth + 1, 2))
        out = w.copy()
        products.across(x, y, first, end, out, add)
        expected = w.copy()
        expected[first:end] = (x.T @ y + add * w)[first:end]
        np.testing.assert_allclose(out, expected, atol=1e-4)


def attention(
    q: Any, k: Any, v: Any, window: int, scale: float, sink: Any, grad: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What comes out, log-sum-exps, and the gradients of q, k, v and the sink: one key head, in float64."""
    q, k, v, sink, grad = (x.astype(np.float64) for x in (q, k, v, sink, grad))
    behind = np.arange(len(q))[:, None] - np.arange(len(q))
    scores = np.where((behind >= 0) & (behind < window), scale * np.einsum("ihd,jd->hij", q, k), -np.inf)
    logits = np.broadcast_to(sink[:, None, None] if sink.size else -np.inf, (*scores.shape[:2], 1))
    whole = np.concatenate([scores, logits], -1)
    lse = np.log(np.exp(whole - whole.max(-1, keepdims=True)).sum(-1)) + whole.max(-1)
    weights, shares = np.exp(scores - lse[..., None]), np.exp(logits[..., 0] - lse)
    slopes = np.einsum("ihd,jd->hij", grad, v)
    means = (weights * slopes).sum(-1)
    slopes = scale * weights * (slopes - means[..., None])
    dq, dk = np.einsum("hij,jd->ihd", slopes, k), np.einsum("hij,ihd->jd", slopes, q)
    dv = np.einsum("hij,ihd->jd", weights, grad)
    return np.einsum("hij,jd->ihd", weights, v), lse, dq, dk, dv, -(shares * means).sum(-1)


def test_attention_of_any_size_equals_numpys_and_does_not_look_ahead() -> None:
    assert Threads().use()
    rng = np.random.default_rng(0)
    for trial in range(40):
        n, dim, width = (int(size) for size in rng.integers(1, (201, 70, 70)))
        n_kv, group = (int(size) for size in rng.integers(1, (4, 6)))
        window, scale = (1, n // 2 + 1, n, 2**40)[trial % 4], np.float32(dim**-0.5)
        q, grad = (rng.standard_normal((n, n_kv * group, size), dtype=np.float32) for size in (dim, width))
        k, v = (rng.standard_normal((n, n_kv, size), dtype=np.float32) for size in (dim, width))
        k[-1] *= 1e4
        sink = rng.standard_normal(n_kv * group if trial % 3 else 0, dtype=np.float32)
        out, dq, dk, dv = (np.full_like(x, np.nan) for x in (grad, q, k, v))
        lse, dsink = np.full((n_kv * group, n), np.nan, np.float32), np.full(n_kv * group, np.nan, np.float32)
        part = int(rng.integers(1, n + 1))
        alone, lse_alone = np.empty_like(out[:part]), np.empty_like(lse[:, :part])
        for head in range(n_kv):
            attend(q, k, v, head, window, scale, sink, out, lse)
            attend(q[:part], k[:part], v[:part], head, window, scale, sink, alone, lse_alone)
            attend_back(q, k, v, head, window, scale, sink, lse, grad, dq, dk, dv, dsink)
            own = slice(head * group, (head + 1) * group)
            expected = attention(q[:, own], k[:, head], v[:, head], window, scale, sink[own], grad[:, own])
            found = (out[:, own], lse[own], dq[:, own], dk[:, head], dv[:, head], dsink[own])
            for value, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(value, other, atol=2e-5 * max(1, np.abs(other).max()))
            np.testing.assert_allclose(lse[own], expected[1], atol=2e-5, rtol=2e-5)
        assert np.array_equal(alone, out[:part])
        assert np.array_equal(lse_alone, lse[:, :part])


def test_what_is_not_a_number_stays_in_its_row() -> None:
    assert Threads().use()
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((30, heads, 8), dtype=np.float32) for heads in (3, 1, 1))
    q[20, 1] = np.nan
    out, lse = np.empty_like(q), np.empty((3, 30), np.float32)
    attend(q, k, v, 0, 30, np.float32(1), np.zeros(3, np.float32), out, lse)
    assert np.argwhere(np.isnan(lse)).tolist() == [[1, 20]]
    assert np.isnan(out[20, 1]).all()
    assert np.isnan(out).sum() == out.shape[2]


def test_logarithms() -> None:
    """Of how many keys of equal scores a query sees."""
    assert Threads().use()
    n = 3000
    q, lse = np.zeros((n, 1, 4), np.float32), np.empty((1, n), np.float32)
    attend(q, q, q, 0, n, np.float32(1), np.empty(0, np.float32), np.empty_like(q), lse)
    np.testing.assert_allclose(lse[0], np.log(np.arange(1, n + 1)), rtol=2.5e-7)


def test_exponentials() -> None:
    x = np.concatenate([np.linspace(-87, 88, 9001), np.random.default_rng(0).normal(size=1000)]).astype(np.float32)
    found = np.array([exponential.exp(value) for value in x])
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=2.5e-7)
    assert np.isnan(exponential.exp(np.float32(np.nan)))
    assert exponential.exp(np.float32(-np.inf)) < 1e-37
