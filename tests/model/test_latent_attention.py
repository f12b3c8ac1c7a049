"""The two ways of computing multi-head latent attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from open_mythos.model.cache import CacheAddress, Entries
from open_mythos.model.context import ForwardContext
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.mask import AttentionMask
from tiny import tiny_config


class _Past:
    """A `KVStore` that holds random entries of some earlier positions."""

    def __init__(self, length: int, widths: dict[str, tuple[int, ...]]) -> None:
        self.length = length
        self.entries = {name: torch.randn(2, length, *width) for name, width in widths.items()}

    def extend(self, address: CacheAddress, new: Entries, active: Tensor | None) -> Entries:
        return {name: torch.cat([self.entries[name], tensor], 1) for name, tensor in new.items()}


def _attention(window: int | None = None, **changes: object) -> MLAttention:
    attn = MLAttention(tiny_config("mla", **changes), window)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return attn


@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no sink"])
@pytest.mark.parametrize(("n_new", "n_past", "window"), [(1, 8, None), (6, 0, None), (4, 7, 3), (50, 3, 7)])
def test_absorbed_equals_rebuilt(
    n_new: int, n_past: int, window: int | None, sink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attn = _attention(window, attention_sink=sink)
    past = _Past(n_past, attn.config.cache_widths)
    x = torch.randn(2, n_new, attn.config.dim, requires_grad=True)
    results = []
    for absorbing in (True, False):
        monkeypatch.setattr(attn, "_absorbing_is_cheaper", lambda mask, absorbing=absorbing: absorbing)
        out = attn(x, ForwardContext(attn.config, n_new, x.device, x.dtype, past))
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *attn.parameters()])])
    for absorbed, rebuilt in zip(*results, strict=True):
        torch.testing.assert_close(absorbed, rebuilt, atol=1e-5, rtol=1e-4)


def test_decoding_attends_in_the_latent_space() -> None:
    """One new token over a long cache must not rebuild keys and values per head; a whole prompt should."""
    attn = _attention(kv_lora_rank=16, qk_nope_head_dim=16, v_head_dim=16)
    assert attn._absorbing_is_cheaper(AttentionMask(1, 500, None, torch.device("cpu"), torch.float32))
    assert not attn._absorbing_is_cheaper(AttentionMask(500, 500, None, torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("v_head_dim", [2, 10, 16])
@pytest.mark.parametrize("seq", [5, 50])
def test_values_may_be_narrower_or_wider_than_keys(v_head_dim: int, seq: int) -> None:
    """The CPU flash kernel wants keys and values of one width: padding the values alone cropped wider ones."""
    attn = _attention(v_head_dim=v_head_dim)
    assert attn(torch.randn(2, seq, attn.config.dim)).shape == (2, seq, attn.config.dim)
