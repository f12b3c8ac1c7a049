"""The training loop: its figures, accumulation, memory saving, and what happens when numbers go wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from open_mythos.data.batch import Batch
from open_mythos.training.depth import Fixed, LogNormalPoisson, LoopPlan, Uniform
from open_mythos.training.metering import Meter, OnItsWay, StepSums, scalars
from open_mythos.training.objective import Objective
from open_mythos.training.optim import OptimConfig
from open_mythos.training.schedule import Schedule
from open_mythos.training.trainer import NonFiniteLossError, TrainerConfig
from training.runs import small_model, small_source, trained

FAST = OptimConfig(learning_rate=1e-2)


def _weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def _assert_close(one, other, **tolerance) -> None:
    for name, tensor in _weights(one).items():
        torch.testing.assert_close(tensor, other.model.state_dict()[name], msg=name, **tolerance)


def test_a_step_is_the_one_that_plain_pytorch_takes() -> None:
    """Three steps at a fixed depth with AdamW, clipping and balancing, against the same written out."""
    optim = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
    trainer, told = trained(depth=Fixed(loops=3), steps=3, optim=optim, schedule=Schedule(shape="wsd", warmup=0))
    model, source = small_model(deeper_rate=0).train(), small_source()
    free = [
        p
        for n, p in model.named_parameters()
        if p.dim() < 2 or n.endswith(("qk_gain", "halt.weight", "loop_embedding.weight"))
    ]
    decayed = [p for p in model.parameters() if not any(p is one for one in free)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99))
    for step in range(3):
        batch = source.batch(step)
        loss = F.cross_entropy(model(batch.ids, 3).flatten(0, 1), batch.targets.flatten())
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * trainer.config.schedule.factor(step, 3)
        adamw.step()
        assert told.losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert told.records[step].grad_norm == pytest.approx(float(norm), rel=1e-4)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_the_loss_falls() -> None:
    """At three times the rate it does, too, but is large again now and then: by seed, whatever computes the layers."""
    optim = OptimConfig(learning_rate=1e-3)
    _, told = trained(steps=150, depth=Fixed(loops=3), optim=optim, source=small_source(32))
    assert sum(told.losses[-10:]) < 0.6 * sum(told.losses[:10])


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_accumulated_micro_batches_are_one_batch(micro_batch: int) -> None:
    whole, told = trained()
    parts, told_in_parts = trained(micro_batch=micro_batch)
    assert told_in_parts.losses == pytest.approx(told.losses, rel=1e-5)
    _assert_close(parts, whole, atol=1e-5, rtol=1e-3)
    for one, other in zip(told_in_parts.records[:3], told.records[:3], strict=True):
        torch.testing.assert_close(torch.tensor(one.load), torch.tensor(other.load), atol=1e-6, rtol=0)
    biases = [n for n in whole.model.state_dict() if n.endswith("router_bias")]
    assert all(bool(whole.model.state_dict()[name].any()) for name in biases)


def test_targets_that_do_not_count_are_weighed_right_across_micro_batches() -> None:
    """One row has a single target, the other eight: the mean is over targets, not over rows."""

    class Uneven:
        vocab_size, bytes_per_token = 3, None

        def batch(self, step: int) -> Batch:
            ids = torch.randint(1, 3, (2, 8), generator=torch.Generator().manual_seed(step))
            targets = ids.clone()
            targets[0, 1:] = -100
            return Batch(ids, targets)

        def position(self, step: int) -> str:
            return ""

        def state_dict(self) -> dict:
            return {}

        def load_state_dict(self, state: dict) -> None:
            pass

    _, told = trained(source=Uneven(), depth=Fixed(loops=2))
    _, in_parts = trained(source=Uneven(), depth=Fixed(loops=2), micro_batch=1)
    assert in_parts.losses == pytest.approx(told.losses, rel=1e-5)


def test_recomputing_changes_no_number() -> None:
    plain, told = trained(model=small_model(dropout=0.1))
    saving, told_again = trained(model=small_model(dropout=0.1), recompute=True)
    assert told_again.losses == pytest.approx(told.losses, rel=1e-6)
    _assert_close(saving, plain, atol=1e-6, rtol=1e-4)


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    model = {"dropout": 0.1, "state_init": "noise"}
    first, again = trained(model=small_model(**model))[1], trained(model=small_model(**model))[1]
    torch.manual_seed(77)  # the global state has no part in it
    other = trained(model=small_model(**model), seed=1)[1]
    assert first.losses == again.losses
    assert first.losses != other.losses


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("halting", ["act", "none"])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_every_kind_of_model_and_optimizer_trains(kind: str, halting: str, attn_type: str) -> None:
    depth = LogNormalPoisson(mean=3, grad_loops=2)
    model = small_model(halting=halting, attn_type=attn_type, n_experts=0, lora_rank=2, loop_embedding=True)
    _, told = trained(model=model, depth=depth, optim=OptimConfig(kind=kind), z_weight=1e-4, ponder_weight=1e-3)
    assert len(told.losses) == 6
    assert all(math.isfinite(loss) for loss in told.losses)
    assert all(record.load is None for record in told.records)


def test_the_figures_of_a_step() -> None:
    trainer, told = trained(depth=Uniform(least=2, most=2), steps=3)
    for index, record in enumerate(told.records):
        assert record.step == index
        assert record.mean_loops == record.mean_exit_loops == 2
        assert 0 <= record.accuracy <= 1
        assert record.bits_per_byte is None
        assert 0 < record.tokens_per_second < 100_000  # the last one too, which is read right after the one before
        assert 0 < record.flop_utilisation < 1
        assert 0 < record.a_low <= record.a_mean + 1e-6 <= record.a_high + 2e-6 < 1
        assert record.state_norm > 0
        assert (len(record.load), len(record.load[0]), len(record.load[0][0])) == (2, 1, 4)
        assert all(sum(shares) == pytest.approx(1) for layers in record.load for shares in layers)
    assert not trainer.model.training


def test_the_ponder_cost_teaches_to_stop_earlier() -> None:
    def late_exits(weight: float) -> float:
        model = small_model()
        with torch.no_grad():
            model.recurrent.act.halt.bias.fill_(-1.0)
        _, told = trained(model=model, depth=Fixed(loops=6), steps=30, ponder_weight=weight, optim=FAST)
        return sum(record.mean_exit_loops for record in told.records[-5:])

    assert late_exits(0.5) < 0.8 * late_exits(0.0)


def test_the_settle_weight_teaches_states_to_rest() -> None:
    def last_movement(weight: float) -> float | None:
        _, told = trained(
            model=small_model(halting="none"), depth=Fixed(loops=4), steps=40, settle_weight=weight, optim=FAST
        )
        return told.records[-1].movement

    assert last_movement(1.0) < 0.5 * last_movement(1e-9)
    assert last_movement(0.0) is None


def test_micro_batches_settle_as_one_batch() -> None:
    whole, in_parts = (trained(micro_batch=size, settle_weight=0.5)[1] for size in (None, 3))
    assert in_parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for one, other in zip(in_parts.records, whole.records, strict=True):
        assert one.movement == pytest.approx(other.movement, rel=1e-3)


def test_the_flops_of_settling_are_those_that_pytorch_counts() -> None:
    config, ids = small_model(halting="none").config, torch.ones(4, 12, dtype=torch.int64)
    plan = LoopPlan(torch.full((4,), 3, dtype=torch.int32), None)
    counted, told = [], []
    for with_movement in (False, True):
        objective = Objective(small_model(halting="none"), with_movement=with_movement)
        with FlopCounterMode(display=False) as counter:
            sums = objective(ids, ids, plan)
            (sums.loss + sums.movement).backward()
        counted.append(counter.get_total_flops())
        step = StepSums(0, OnItsWay([scalars(sums)]), 48, 48, plan, 0.0, 1.0, skipped=False)
        told.append(Meter(config, 1.0, None, with_movement=with_movement)._flops(step))
    assert told[1] / told[0] == pytest.approx(counted[1] / counted[0], rel=0.05)


class _Poisoned:
    """Parity whose batches from some step on make the weights' gradients explode."""

    vocab_size, bytes_per_token = 3, None

    def __init__(self, model, bad: set[int]) -> None:
        self._source, self._model, self._bad = small_source(), model, bad

    def batch(self, step: int) -> Batch:
        if step in self._bad:
            handle = self._model.norm.register_forward_hook(lambda module, args, out: out * float("nan"))
            self._handle = handle
        elif hasattr(self, "_handle"):
            self._handle.remove()
        return self._source.batch(step)

    def position(self, step: int) -> str:
        return f"row {step * 8}"

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(NonFiniteLossError, match=r"nan.* at step 4 \(row 32\); the last good checkpoint is of step 3"):
        trained(model=model, source=_Poisoned(model, {4, 5}), checkpoints=tmp_path, checkpoint_every=3, steps=8)
    resumed, told = trained(checkpoints=tmp_path, steps=8)
    assert told.messages == ["Resuming after step 3."]
    assert [record.step for record in told.records] == [3, 4, 5, 6, 7]
    assert all(bool(tensor.isfinite().all()) for tensor in resumed.model.state_dict().values())


def test_no_checkpoint_yet_is_said_too() -> None:
    model = small_model()
    with pytest.raises(NonFiniteLossError, match="no checkpoint has been written yet"):
        trained(model=model, source=_Poisoned(model, {0}))


def test_a_step_that_is_not_finite_is_skipped_if_asked() -> None:
    model = small_model()
    trainer, told = trained(model=model, source=_Poisoned(model, {2}), non_finite="skip")
    assert [record.skipped for record in told.records] == [False, False, True, False, False, False]
    assert math.isnan(told.losses[2])
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.model.state_dict().values())


def test_sweeps_come_at_their_steps_and_at_the_end() -> None:
    seen = []

    def sweep(model, final: bool):
        seen.append((model.training, final))
        return [{"length": 4, "n_loops": 1, "loss": 1.0, "accuracy": None, "exact_match": None}]

    _, told = trained(sweep=sweep, sweep_every=4, steps=6)
    assert [step for step, _ in told.sweeps] == [4, 6]
    assert [final for _, final in seen] == [False, True]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("seed", -1),
        ("clip", 0.0),
        ("micro_batch", 0),
        ("checkpoint_every", 0),
        ("sweep_every", -1),
        ("z_weight", -1.0),
        ("ponder_weight", -1.0),
        ("settle_weight", -0.5),
    ],
)
def test_wrong_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        TrainerConfig(**{field: value})


def test_bfloat16_products_train_too() -> None:
    _, plain = trained(depth=Fixed(loops=2))
    _, told = trained(depth=Fixed(loops=2), precision="bfloat16")
    assert told.losses == pytest.approx(plain.losses, rel=0.05)
    assert told.losses != plain.losses


@pytest.mark.slow
def test_compiled_feed_forwards_change_no_number() -> None:
    for more in ({}, {"settle_weight": 0.1, "recompute": True}):
        _, plain = trained(depth=Fixed(loops=3), steps=3, **more)
        _, told = trained(depth=Fixed(loops=3), steps=3, **more, compiled=True)
        assert told.losses == pytest.approx(plain.losses, rel=1e-5)
    with pytest.raises(ValueError, match="n_experts must be at most twice n_experts_per_tok"):
        trained(model=small_model(n_experts=16), compiled=True)


def test_a_run_that_only_skips_is_given_up() -> None:
    model = small_model()
    with pytest.raises(NonFiniteLossError):
        trained(model=model, source=_Poisoned(model, set(range(100))), non_finite="skip", steps=100)


def test_json_has_no_nan_and_bears_damaged_lines(tmp_path: Path) -> None:
    from open_mythos.training.records import JsonLines, read_metrics

    log = JsonLines(tmp_path, 0)
    log.on_sweep(1, [{"length": 4, "loss": math.nan}])
    log.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n")
    JsonLines(tmp_path, 5).close()
    assert read_metrics(tmp_path) == [{"step": 1, "sweep": [{"length": 4, "loss": None}]}]


def test_grouped_products_are_in_the_type_of_autocast() -> None:
    from open_mythos.model.experts import _product_dtype

    x = torch.zeros(2)
    assert _product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert _product_dtype(x) == torch.bfloat16
    _, plain = trained(model=small_model(n_experts=16), depth=Fixed(loops=2))
    _, told = trained(model=small_model(n_experts=16), depth=Fixed(loops=2), precision="bfloat16")
    assert told.losses == pytest.approx(plain.losses, rel=0.05)


def test_gradients_through_the_last_loops_are_the_same_in_bfloat16() -> None:
    """Autocast keeps weights that it has cast; those cast without a gradient must not serve the loops with one."""
    kinds = {"depth": Uniform(least=3, most=5, grad_loops=2), "precision": "bfloat16", "steps": 1}
    _, told = trained(**kinds)
    _, plain = trained(**{**kinds, "precision": "float32"})
    assert told.records[0].grad_norm == pytest.approx(plain.records[0].grad_norm, rel=0.05)
