"""Generating goes through `FewRowsBlocks` where positions are few, and gives the logits of the full forward."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos.model import mythos
from open_mythos.model.cache import CacheAddress
from open_mythos.model.context import ForwardContext
from open_mythos.model.few_rows import stand_ins
from open_mythos.model.few_rows.block import FewRowsBlocks, Given
from open_mythos.model.few_rows.token import FewRowsToken
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.rows import Rows
from open_mythos.model.sequence_store import SequenceStore
from tiny import Doubled, random_ids, tiny_config, tiny_model

SEQ = 14
VARIANTS: list[dict[str, Any]] = [
    {},
    {"halting": "none"},
    {"window": 3, "outer_window": 2},
    {"window": 1},
    {"recurrent_layers": 2, "window": 4},
    {"prelude_layers": 0, "coda_layers": 0},
    {"prelude_layers": 2, "coda_layers": 2, "n_experts": 0, "lora_rank": 0, "loop_embedding": False},
    {"n_experts": 8, "n_experts_per_tok": 3, "router_score": "sigmoid", "routed_scale": 1.7},
    {"n_experts": 8, "n_shared_experts": 0, "n_experts_per_tok": 1},
    {"n_shared_experts": 2},
    {"use_rope": False, "attention_sink": False, "qk_norm": False, "tie_embeddings": False},
    {"n_kv_heads": 4, "state_init": "zeros"},
    {"halting": "settled", "settle_tolerance": 0.3, "lora_rank": 0, "loop_embedding": False},
]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Makes `generate` take given tokens, in order, in place of samples; collects the logits it would sample from."""
    seen: list[Tensor] = []

    def take(logits: Tensor, ids: Any, *_: Any) -> Tensor:
        seen.append(logits.clone())
        return torch.as_tensor(ids)[:, len(seen) - 1 : len(seen)]

    monkeypatch.setattr(mythos, "_sample", take)
    monkeypatch.setattr(mythos, "check_sampling", lambda *_: None)
    return seen


@torch.no_grad()
def assert_every_step_equals_the_full_forward(
    model: OpenMythos, n_loops: int, forced: list[Tensor], prompt: int = 1, batch: int = 1
) -> None:
    ids = random_ids(model.config, batch, SEQ)
    model.generate(ids[:, :prompt], SEQ - prompt, n_loops, temperature=ids[:, prompt:])  # type: ignore[arg-type]
    expected = model(ids, n_loops)[:, prompt - 1 : -1]
    torch.testing.assert_close(torch.stack(forced, 1), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("n_loops", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "tiny")
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_every_step_equals_the_full_forward(
    attn_type: str, changes: dict[str, Any], n_loops: int, forced: list[Tensor]
) -> None:
    model = tiny_model(tiny_config(attn_type, **changes))
    assert_every_step_equals_the_full_forward(model, n_loops, forced)


@pytest.mark.parametrize(("few", "pairs"), [(0, 4096), (6, 4096), (64, 4096), (64, 10)])
@pytest.mark.parametrize(("prompt", "batch"), [(5, 1), (13, 1), (1, 3), (4, 2)])
@pytest.mark.parametrize("coda_layers", [1, 2])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_prompts_and_batches_share_the_store(
    attn_type: str,
    coda_layers: int,
    prompt: int,
    batch: int,
    few: int,
    pairs: int,
    forced: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With prompts and tokens that are many, only prompts, none of either, and tokens once what they see is much."""
    monkeypatch.setattr(stand_ins, "_MOST", few)
    monkeypatch.setattr(stand_ins, "_MOST_KEYS", 128)
    monkeypatch.setattr(stand_ins, "_MOST_PAIRS", pairs)
    model = tiny_model(tiny_config(attn_type, window=4, coda_layers=coda_layers))
    assert_every_step_equals_the_full_forward(model, 6, forced, prompt, batch)


@torch.no_grad()
@pytest.mark.parametrize("last", [1, 2, 5, 9])
@pytest.mark.parametrize("changes", [{}, {"coda_layers": 3}, {"coda_layers": 0}, {"use_rope": False}])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_what_is_asked_for_is_what_it_is_among_all(attn_type: str, changes: dict[str, Any], last: int) -> None:
    """The coda's last layer then computes nothing else, but stores every position's keys and values."""
    model = tiny_model(tiny_config(attn_type, **changes))
    h = torch.randn(3, 9, model.config.dim)
    found = []
    for asked in (None, last):
        context = model.context(9, SequenceStore(model.config, 3, 9, h))
        context.stand_ins = stand_ins.FewRows(model).stand_ins(27, 9)
        assert model.coda in context.stand_ins
        store, features = context.store, model.features(h, context, last=asked)[:, -last:]
        stored = [slot.seen(slice(0, 9)) for slot in store._slots.values()]  # type: ignore[attr-defined]
        found.append([features, *(tensor for entries in stored for tensor in entries.values())])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_asking_for_some_leaves_nothing_behind() -> None:
    model = tiny_model(tiny_config(coda_layers=2))
    h = torch.randn(1, 6, model.config.dim)
    context = model.context(6, SequenceStore(model.config, 1, 6, h))
    context.stand_ins = stand_ins.FewRows(model).stand_ins(6, 6)
    before, _ = model.features(h, context), model.features(h, context, last=1)
    torch.testing.assert_close(model.features(h, context), before)


def test_lists_of_other_modules_do_not_matter() -> None:
    model = tiny_model(tiny_config())
    ids = random_ids(model.config, 1, 4)
    expected = model.generate(ids, 3, 3, temperature=0)
    model.probes = torch.nn.ModuleList([torch.nn.Linear(model.config.dim, 2, bias=False)])
    assert torch.equal(model.generate(ids, 3, 3, temperature=0), expected)


@torch.no_grad()
def test_the_models_here_halt_at_different_loops() -> None:
    """Otherwise the tests above would not see a position that takes rows of a loop it never ran."""
    for attn_type in ("gqa", "mla"):
        model = tiny_model(tiny_config(attn_type))
        exit_loops = model(random_ids(model.config, 1, SEQ), 6, full_output=True).exit_loops
        assert exit_loops.unique().numel() >= 3


def _count_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    original = FewRowsBlocks.given

    def counted(
        self: FewRowsBlocks,
        context: ForwardContext,
        first: CacheAddress,
        n_loops: int = 1,
        wanted: Rows | None = None,
    ) -> Given:
        calls.extend([None] * n_loops)
        return original(self, context, first, n_loops, wanted)

    monkeypatch.setattr(FewRowsBlocks, "given", counted)
    return calls


@pytest.mark.parametrize("batch", [1, 3])
def test_float32_on_a_cpu_takes_the_fast_way(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prelude, coda and three loops for the prompt and each of four tokens; a prompt that is not short goes another."""
    calls = _count_calls(monkeypatch)
    model = tiny_model(tiny_config(halting="none"))
    model.generate(random_ids(model.config, batch, 4), 5, n_loops=3)
    assert len(calls) == 5 * (1 + 3 + 1)
    monkeypatch.setattr(stand_ins, "_MOST", 4 * batch - 1)
    model.generate(random_ids(model.config, batch, 4), 5, n_loops=3)
    assert len(calls) == 9 * (1 + 3 + 1)
    monkeypatch.setattr(stand_ins, "_MOST_KEYS", 0)
    monkeypatch.setattr(stand_ins, "_MOST_PAIRS", 6 * batch)
    model.generate(random_ids(model.config, batch, 4), 5, n_loops=3)
    assert len(calls) == 11 * (1 + 3 + 1), "tokens that see 5 and 6 keys, and not those that see 7 and 8"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_take_the_general_way(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _count_calls(monkeypatch)
    model = tiny_model(tiny_config()).to(dtype)
    assert model.generate(random_ids(model.config, 1, 4), 3, n_loops=3, temperature=0).shape == (1, 7)
    assert not calls


def test_other_types_do_without_numba() -> None:
    code = (
        "import sys, torch; from open_mythos import MythosConfig, OpenMythos; "
        "model = OpenMythos(MythosConfig(vocab_size=8, dim=16)).bfloat16(); "
        "model.generate(torch.tensor([[1, 2]]), 3, n_loops=2); assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class _Subclass(Tensor):
    """Float32 on a CPU by what it says, and something else inside, as quantisation libraries make them."""


def _with_bias(model: OpenMythos) -> None:
    model.recurrent.adapter.down = torch.nn.Linear(16, model.config.lora_rank, bias=True)
    model.recurrent.block.attn.out = torch.nn.Linear(16, 16, bias=True)


def _with_a_subclass(model: OpenMythos) -> None:
    out = model.recurrent.block.attn.out
    out.weight = torch.nn.Parameter(out.weight.data.as_subclass(_Subclass))


@pytest.mark.parametrize("change", [_with_bias, _with_a_subclass], ids=["bias", "subclass"])
@torch.no_grad()
def test_what_only_looks_plain_computes_for_itself(
    change: Callable[[OpenMythos], None], forced: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_config())
    change(model)
    calls = _count_calls(monkeypatch)
    assert_every_step_equals_the_full_forward(model, 3, forced)
    assert len(calls) == (SEQ - 1) * 2, "prelude and coda, no loops"


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("prompt", [1, 12])
def test_several_threads_give_what_one_gives(attn_type: str, prompt: int, forced: list[Tensor]) -> None:
    """In a model that is large enough for work to be divided."""
    model = tiny_model(tiny_config(attn_type, dim=128, expert_dim=96, n_experts=6, n_kv_heads=2))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_every_step_equals_the_full_forward(model, 3, forced, prompt)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_hooks_of_any_part_run_for_every_token(forced: list[Tensor]) -> None:
    model = tiny_model(tiny_config(halting="none"))
    seen: list[int] = []
    for part in (model.embed, model.norm, model.recurrent.block):
        handle = part.register_forward_hook(lambda *_: seen.append(1))
        assert_every_step_equals_the_full_forward(model, 3, forced)
        handle.remove()
        assert len(seen) >= SEQ - 1
        seen.clear()
        forced.clear()


def _transpose_in_memory(model: OpenMythos, name: str) -> None:
    module = model.get_submodule(name)
    module.weight = torch.nn.Parameter(module.weight.data.T.contiguous().T)


def _limit_embeddings(model: OpenMythos) -> None:
    model.embed.max_norm = 0.5


def _bias_routers(model: OpenMythos, bias: Tensor) -> None:
    for block in model.recurrent.blocks:
        block.ffn.router_bias = bias


def _double(name: str) -> Callable[[OpenMythos], None]:
    def change(model: OpenMythos) -> None:
        owner, _, method = name.rpartition(".")
        module = model.get_submodule(owner)
        original = getattr(module, method)
        setattr(module, method, lambda *arguments, **options: 2 * original(*arguments, **options))

    return change


CHANGES: dict[str, Callable[[OpenMythos], None]] = {
    **{
        f"{name} in columns": partial(_transpose_in_memory, name=name)
        for name in ("embed", "head", "prelude.0.attn.out", "recurrent.blocks.0.ffn.router", "coda.0.ffn.gate")
    },
    "embeddings of a limited norm": _limit_embeddings,
    "biases of another type": lambda model: _bias_routers(model, torch.randn(4).double()),
    "biases with gaps": lambda model: _bias_routers(model, torch.randn(8)[::2]),
    "another window": lambda model: setattr(model.get_submodule("recurrent.blocks.1.attn"), "window", 2),
    "another outer window": lambda model: setattr(model.get_submodule("coda.1.attn"), "window", 2),
    "a norm that is none": lambda model: setattr(model, "prelude_norm", torch.nn.Dropout(0.0)),
    **{f"another {name}": _double(name) for name in ("encode", "decode", "recurrent.step", "recurrent.initial_state")},
}


@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_somebody_changed_stays_changed(
    change: Callable[[OpenMythos], None], prompt: int, forced: list[Tensor]
) -> None:
    model = tiny_model(tiny_config(tie_embeddings=False, halting="none", recurrent_layers=2, coda_layers=2))
    change(model)
    assert_every_step_equals_the_full_forward(model, 3, forced, prompt)


@torch.no_grad()
def test_states_may_lie_in_memory_as_they_like(forced: list[Tensor]) -> None:
    model = tiny_model(tiny_config(prelude_layers=2))
    model.prelude[0].register_forward_hook(lambda *seen: seen[-1].mT.contiguous().mT)
    assert_every_step_equals_the_full_forward(model, 3, forced, prompt=5)


def test_weights_in_other_memory_leave_a_stream_what_it_has() -> None:
    """Their old memory, known by its address alone, was somebody else's then."""
    model = tiny_model(tiny_config(dim=64, halting="none", max_seq_len=64))
    ids = random_ids(model.config, 1, 4)
    expected = [int(token) for token in model.stream(ids, 12, n_loops=2, temperature=0)]
    found, others = list[int](), list[Tensor]()
    for token in model.stream(ids, 12, n_loops=2, temperature=0):
        found.append(int(token))
        for weight in model.parameters():
            weight.data = weight.data.clone()
            others += [torch.full_like(weight, 1e3) for _ in range(3)]
    assert found == expected


class _OtherHead(OpenMythos):
    """A model whose logits come from elsewhere."""

    @property
    def head_weight(self) -> Tensor:
        return 2 * self.embed.weight


def test_a_head_of_its_own_is_used() -> None:
    torch.manual_seed(0)
    model = _OtherHead(tiny_config(halting="none")).eval()
    ids = random_ids(model.config, 1, 4)
    logits: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mythos, "_sample", lambda seen, *_: logits.append(seen) or ids[:, :1])
        model.generate(ids, 2, n_loops=2)
    torch.testing.assert_close(logits[0], model(ids, 2)[:, -1], atol=2e-5, rtol=1e-5)


def test_autocast_takes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _count_calls(monkeypatch)
    model = tiny_model(tiny_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(random_ids(model.config, 1, 4), 3, n_loops=2).shape == (1, 7)
    assert not calls


def test_tokens_of_a_plain_model_go_through_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """One position after the other does; prompts, batches, models that halt when settled and hooked ones do not."""
    runs: list[None] = []
    original = FewRowsToken.run
    monkeypatch.setattr(FewRowsToken, "run", lambda *arguments: runs.append(None) or original(*arguments))
    model = tiny_model(tiny_config())
    model.generate(random_ids(model.config, 1, 4), 5, n_loops=3)
    assert len(runs) == 4
    model.generate(random_ids(model.config, 2, 4), 5, n_loops=3)
    settled = tiny_model(tiny_config(halting="settled", lora_rank=0, loop_embedding=False))
    settled.generate(random_ids(model.config, 1, 4), 5, n_loops=3)
    model.coda[0].register_forward_hook(lambda *_: None)
    model.generate(random_ids(model.config, 1, 4), 5, n_loops=3)
    assert len(runs) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_generates() -> None:
    """OpenMP ends a child that uses its parent's threads."""
    _run_alone("child = os.fork()\nmodel.generate(ids, 3, n_loops=2)\nchild and check(os.waitpid(child, 0)[1])")


def test_without_a_compiler_everything_works() -> None:
    _run_alone("assert 'open_mythos.model.arithmetic.compiled' not in sys.modules", NUMBA_DISABLE_JIT="1")


def test_several_threads_may_generate_where_numba_has_its_own_only() -> None:
    """Its `workqueue` ends the process when two threads use it at a time."""
    code = (
        "work = lambda: [model.generate(ids, 12, n_loops=2) for _ in range(4)]\n"
        "with ThreadPoolExecutor(3) as pool:\n    [future.result() for future in [pool.submit(work) for _ in range(3)]]"
    )
    _run_alone(code, NUMBA_THREADING_LAYER="workqueue")


def _run_alone(code: str, **environment: str) -> None:
    """Run code that uses `model` and `ids`, after a call of `generate`, in a process of its own."""
    before = (
        "import os, sys, torch\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from open_mythos import MythosConfig, OpenMythos\n"
        "torch.set_num_threads(1)\n"
        "def check(status): assert status == 0, status\n"
        "model, ids = OpenMythos(MythosConfig(vocab_size=8, dim=16)).eval(), torch.tensor([[1, 2]])\n"
        "model.generate(ids, 3, n_loops=2)\n"
    )
    subprocess.run([sys.executable, "-c", before + code], check=True, env={**os.environ, **environment}, timeout=300)


def test_hooks_of_all_modules_see_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, seen = _count_calls(monkeypatch), set[torch.nn.Module]()
    model = tiny_model(tiny_config())
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        model.generate(random_ids(model.config, 1, 4), 3, n_loops=2)
    finally:
        handle.remove()
    assert not calls
    assert {model.embed, model.prelude[0].attn.qkv, model.recurrent.block.ffn, model.norm} <= seen


def test_models_with_methods_of_their_own_keep_them() -> None:
    torch.manual_seed(0)
    model = Doubled(tiny_config(halting="none")).eval()
    new = model.generate(random_ids(model.config, 1, 4), 8, n_loops=3, temperature=0)
    assert torch.equal(model(new, 3)[:, 3:-1].argmax(-1), new[:, 4:])


def test_the_default_type_is_nobodys_business() -> None:
    model, before = tiny_model(tiny_config()), torch.get_default_dtype()
    expected = model.generate(random_ids(model.config, 1, 4), 3, n_loops=2, temperature=0)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model.generate(random_ids(model.config, 1, 4), 3, n_loops=2, temperature=0), expected)
    finally:
        torch.set_default_dtype(before)


class _Wrapped(torch.nn.Linear):
    """A linear layer that does more than its weight says, as adapters and quantised layers do."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 - super().forward(x)


@torch.no_grad()
def test_blocks_with_unknown_parts_compute_for_themselves(forced: list[Tensor]) -> None:
    model = tiny_model(tiny_config())
    block = model.recurrent.block
    wrapped = _Wrapped(16, 16, bias=False)
    wrapped.weight.copy_(block.attn.out.weight)
    block.attn.out = wrapped
    block.ffn.shared.register_forward_hook(lambda _module, _inputs, out: -out)
    assert_every_step_equals_the_full_forward(model, 4, forced)


def test_what_was_generated_can_be_trained_on() -> None:
    """Tensors of inference mode may not be saved for a backward pass."""
    model = tiny_model(tiny_config()).train()
    ids = model.generate(random_ids(model.config, 1, 4), 3, n_loops=3)
    model(ids, 3).sum().backward()
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize("batch", [1, 2])
def test_streamed_tokens_are_those_generated_and_nothing_is_switched_meanwhile(batch: int) -> None:
    model = tiny_model(tiny_config()).train()
    ids = random_ids(model.config, batch, 4)
    streamed = []
    for new in model.stream(ids, 5, n_loops=3, temperature=0):
        assert model.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not new.is_inference()
        streamed.append(new)
    assert torch.equal(torch.cat([ids, *streamed], 1), model.generate(ids, 5, n_loops=3, temperature=0))


def test_weights_changed_between_two_calls_are_seen() -> None:
    model = tiny_model(tiny_config())
    ids = random_ids(model.config, 1, 4)
    model.generate(ids, 2, n_loops=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    expected = model(model.generate(ids, 6, n_loops=2, temperature=0), 2)[:, 3:-1].argmax(-1)
    assert torch.equal(model.generate(ids, 6, n_loops=2, temperature=0)[:, 4:], expected)
