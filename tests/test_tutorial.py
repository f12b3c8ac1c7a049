"""The contract of the published tutorial (DESIGN section 3): names, arguments and the hooks it puts into the model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.main import ACTHalting, GQAttention, LTIInjection, MLAttention, MoEFFN, MythosConfig, OpenMythos

VOCAB = 16
pytestmark = pytest.mark.usefixtures("one_thread")


def _config(attn_type: str, **changes: Any) -> MythosConfig:
    base = {
        "vocab_size": VOCAB,
        "dim": 32,
        "n_heads": 4,
        "max_seq_len": 64,
        "max_loop_iters": 8,
        "prelude_layers": 1,
        "coda_layers": 1,
        "n_experts": 4,
        "n_shared_experts": 1,
        "n_experts_per_tok": 2,
        "expert_dim": 16,
        "lora_rank": 4,
        "act_threshold": 0.99,
        "attn_type": attn_type,
    }
    latent = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    own = {"n_kv_heads": 2} if attn_type == "gqa" else {"n_kv_heads": 4, **latent}
    return MythosConfig(**{**base, **own, **changes})


@pytest.fixture(params=["gqa", "mla"])
def model(request: pytest.FixtureRequest) -> OpenMythos:
    return OpenMythos(_config(request.param))


def _ids(batch: int = 2, seq: int = 12) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq))


def test_the_parts_have_the_tutorials_names_and_types(model: OpenMythos) -> None:
    assert isinstance(model.recurrent.act, ACTHalting)
    assert isinstance(model.recurrent.block.ffn, MoEFFN)
    assert isinstance(model.recurrent.injection, LTIInjection)
    assert isinstance(model.recurrent.block.attn, MLAttention if model.config.attn_type == "mla" else GQAttention)


def test_a_plain_dict_is_a_cache_of_dicts_of_tensors(model: OpenMythos) -> None:
    cache: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        model(_ids(1, 24), n_loops=4, kv_cache=cache)
    assert sum(t.element_size() * t.numel() for entry in cache.values() for t in entry.values()) > 0
    assert all(isinstance(key, str) for key in cache)


def test_with_the_tutorials_sizes_mla_shrinks_the_cache_at_least_2_6_times() -> None:
    sizes = {"dim": 128, "expert_dim": 64, "lora_rank": 8, "max_seq_len": 128, "vocab_size": 256}
    latent = {"kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    stored = {}
    for attn_type in ("gqa", "mla"):
        cache: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            OpenMythos(_config(attn_type, **sizes, **latent))(torch.randint(0, 256, (1, 64)), n_loops=4, kv_cache=cache)
        stored[attn_type] = sum(t.element_size() * t.numel() for entry in cache.values() for t in entry.values())
    assert stored["gqa"] / stored["mla"] >= 2.6


def test_a_is_a_vector_inside_the_unit_interval_even_after_abuse(model: OpenMythos) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    for _ in range(8):
        loss = model(_ids(), n_loops=2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    A = model.recurrent.injection.get_A()
    assert A.shape == (32,)
    assert A.min() > 0
    assert A.max() < 1


def test_a_halting_hook_sees_one_call_per_loop(model: OpenMythos) -> None:
    """The tutorial replaces `forward` on the instance, in training mode, and stacks what it sees."""
    trace: list[Tensor] = []
    original = model.recurrent.act.forward

    def hook(self: ACTHalting, h: Tensor) -> Tensor:
        p = original(h)
        trace.append(p.detach())
        return p

    model.recurrent.act.forward = hook.__get__(model.recurrent.act, ACTHalting)
    with torch.no_grad():
        model.eval()(_ids(1, 12), n_loops=16)
    model.recurrent.act.forward = original
    assert torch.stack(trace).shape == (16, 1, 12)
    assert all(bool(((p >= 0) & (p <= 1)).all()) for p in trace)
    model(_ids(1, 12), n_loops=3)
    assert len(trace) == 16


def test_an_expert_hook_sees_every_token_of_every_loop(model: OpenMythos) -> None:
    hits: Counter[int] = Counter()
    ffn = model.recurrent.block.ffn
    original = ffn.forward

    def hook(self: MoEFFN, x: Tensor) -> Tensor:
        logits = self.router(x.view(-1, x.shape[-1])) + self.router_bias
        for expert in F.softmax(logits, -1).topk(self.topk, -1).indices.flatten().tolist():
            hits[expert] += 1
        return original(x)

    ffn.forward = hook.__get__(ffn, MoEFFN)
    with torch.no_grad():
        model.eval()(_ids(3, 10), n_loops=5)
    ffn.forward = original
    assert sum(hits.values()) == 5 * 30 * model.config.n_experts_per_tok


def test_what_a_hook_counts_is_what_the_model_does(model: OpenMythos) -> None:
    """`router(x) + router_bias` ranks the experts: the tutorial's count equals the model's own."""
    ffn = model.recurrent.block.ffn
    ffn.router_bias.normal_()
    x = torch.randn(50, 32)
    ranked = (ffn.router(x) + ffn.router_bias).topk(ffn.topk, -1).indices.flatten().bincount(minlength=4)
    assert torch.equal(ranked, ffn.load(ffn.route(x)))


def test_a_plain_training_loop_learns_and_balances() -> None:
    """No trainer, no auxiliary loss: next bit of a period-2 sequence, as the tutorial trains."""
    model = OpenMythos(_config("gqa", lora_rank=0))
    model.recurrent.block.ffn.router_bias.copy_(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    bits = (torch.arange(16) % 2).expand(8, 16) + 1
    losses, loads = [], []
    for _ in range(60):
        found = model(bits[:, :-1], n_loops=2, full_output=True)
        loss = F.cross_entropy(found.logits.reshape(-1, VOCAB), bits[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        loads.append(found.expert_load.sum((0, 1)))
    assert losses[-1] < 0.1 * losses[0]
    load = torch.stack(loads[-20:]).sum(0)
    assert load[2:].sum() > 0.25 * load.sum(), "two experts had a third or less at first, of ten seeds"


@pytest.mark.parametrize("n_loops", [1, 4, 12])
def test_generate_takes_the_tutorials_arguments(model: OpenMythos, n_loops: int) -> None:
    prompt = torch.tensor([[1, 2, 1, 1, 2, 2, 1, 2]])
    out = model.generate(prompt, max_new_tokens=8, n_loops=n_loops, temperature=0.1, top_k=2)
    assert out.shape == (1, 16)
    assert out[:, :8].equal(prompt)
    assert int(out.max()) < VOCAB


def test_n_loops_is_a_knob_per_sequence(model: OpenMythos) -> None:
    model.eval()
    ids = _ids(3)
    logits = model(ids, n_loops=torch.tensor([1, 4, 2]))
    assert logits.shape == (3, 12, VOCAB)
    torch.testing.assert_close(logits[1:2], model(ids[1:2], n_loops=4), atol=1e-5, rtol=1e-5)
