"""Planned bytes equal measured ones; activations come within 10% of what autograd saves."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.analysis.memory_plan import plan_inference, plan_training
from open_mythos.config import MythosConfig
from open_mythos.model.many_rows import stand_ins
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_tiny, mythos_tutorial_gqa, mythos_tutorial_mla
from tiny import random_ids


class SavedBytes:
    """Counts the bytes of the storages that autograd saves within this context, the parameters aside."""

    def __init__(self, model: OpenMythos) -> None:
        self._known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._kept: dict[int, Tensor] = {}  # keeps each tensor alive, so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._known:
            self._kept.setdefault(address, tensor)
        return tensor

    @property
    def total(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


VARIANTS = {
    "tiny": mythos_tiny(),
    "tutorial-gqa": mythos_tutorial_gqa(),
    "tutorial-mla": mythos_tutorial_mla(),
    "dense": MythosConfig(),
    "dense-mla": MythosConfig(attn_type="mla", v_head_dim=32, recurrent_layers=2),
    "dropout": mythos_tiny().replace(dropout=0.1),
    "moe": MythosConfig(n_experts=16, expert_dim=48, n_experts_per_tok=4, qk_norm=False, halting="none"),
}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything goes through PyTorch's operations, as on an accelerator."""
    monkeypatch.setattr(stand_ins, "_serves", lambda *_: False)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("n_loops", [1, 4])
@pytest.mark.usefixtures("modules")
def test_activations_are_estimated_within_10_percent(config: MythosConfig, n_loops: int) -> None:
    model, ids = OpenMythos(config.replace(deeper_rate=0)), random_ids(config, 2, 64)
    with SavedBytes(model) as saved:
        loss_of(model(ids, n_loops), ids)
    estimate = plan_training(config, batch=2, seq_len=64, n_loops=n_loops).activations
    assert estimate == pytest.approx(saved.total, rel=0.1)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("n_loops", [1, 4])
def test_compiled_layers_keep_half_to_two_thirds_of_the_estimate(config: MythosConfig, n_loops: int) -> None:
    model, ids = OpenMythos(config.replace(deeper_rate=0)), random_ids(config, 2, 64)
    with SavedBytes(model) as saved:
        loss_of(model(ids, n_loops), ids)
    estimate = plan_training(config, batch=2, seq_len=64, n_loops=n_loops).activations
    assert 0.5 * estimate < saved.total < 0.67 * estimate


@pytest.mark.parametrize("changes", [{}, {"halting": "none"}])
@pytest.mark.parametrize("n_loops", [8, 32])
@pytest.mark.usefixtures("modules")
def test_checkpointed_loops_are_estimated_within_10_percent(changes: dict[str, Any], n_loops: int) -> None:
    """At the worst moment: what the forward pass kept, and one loop computed again."""
    config = mythos_tiny().replace(**changes)
    model, ids = OpenMythos(config), random_ids(config, 2, 64)
    context = model.context(64)
    with SavedBytes(model) as kept:
        e = model.encode(ids, context)
        state = model.recurrent(e, torch.full((2,), n_loops), context, recompute=True).state
        loss_of(model.decode(state, context), ids)
    with SavedBytes(model) as one_loop:
        model.loop_step(state.detach().requires_grad_(), e.detach(), 0)
    estimate = plan_training(config, batch=2, seq_len=64, n_loops=n_loops, checkpoint_loops=True).activations
    assert estimate == pytest.approx(kept.total + one_loop.total, rel=0.1)
    assert estimate < plan_training(config, batch=2, seq_len=64, n_loops=n_loops).activations / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"attn_type": "mla", "loop_embedding": False, "tie_embeddings": False}])
def test_weights_gradients_and_optimizer_are_exact(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    config = mythos_tiny().replace(**changes)
    model, ids = OpenMythos(config).to(dtype), random_ids(config, 1, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model(ids, 1), ids).backward()
    optimizer.step()
    plan = plan_training(config, seq_len=8, n_loops=1, dtype=dtype)
    assert plan.weights == nbytes([*model.parameters(), *model.buffers()])
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan.optimizer == nbytes(moments)
    assert plan.gradients == plan.optimizer // 2
    assert plan.total == plan.weights + plan.gradients + plan.optimizer + plan.activations


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_inference_defaults_to_the_configs_own_sizes() -> None:
    config = mythos_tiny()
    assert plan_inference(config) == plan_inference(config, batch=1, seq_len=128, n_loops=4)
    assert plan_inference(config).gradients == plan_inference(config).activations == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"n_loops": -1}, "n_loops is -1; it must be at least 1"),
        ({"seq_len": 129}, r"seq_len is 129; it must be from 1 to max_seq_len \(128\)"),
    ],
)
def test_bad_input_is_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_inference(mythos_tiny(), **sizes)
