"""Checks of what users pass to a model; each raises `ValueError` naming the argument, its value and what is accepted.

Main entries: `check_ids`, `check_loops`, `check_sampling`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from open_mythos.config import MythosConfig


def check_ids(ids: Tensor, config: MythosConfig, cached: int) -> None:
    """Integer ids (batch, seq) within the vocabulary that fit into the context after `cached` positions.

    The range is checked on the CPU only: on an accelerator it would wait for the device in every call, and the
    embedding there asserts it by itself.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids has dtype {ids.dtype}; it must be torch.int64 or torch.int32")
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"input_ids has shape {tuple(ids.shape)}; it must be (batch, seq), both at least 1")
    if cached + ids.shape[1] > config.max_seq_len:
        what = f"{ids.shape[1]} new" + (f" and {cached} cached" if cached else "")
        raise ValueError(
            f"input_ids has {what} positions; together they must be at most max_seq_len ({config.max_seq_len})"
        )
    if ids.device.type == "cpu":
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"input_ids holds {wrong}; ids must be from 0 to vocab_size - 1 ({config.vocab_size - 1})")


def check_loops(
    n_loops: int | Tensor | None, ids: Tensor, config: MythosConfig, *, by_position: bool = False
) -> Tensor:
    """`n_loops` as an int32 tensor on the CPU: (batch,); with `by_position` also (batch, seq), if it has that shape."""
    batch = ids.shape[0] if ids.dim() else 0
    accepted = f"an integer, or an integer tensor of shape ({batch},)"
    if by_position:
        accepted += f" or {tuple(ids.shape)}"
    if n_loops is None:
        n_loops = config.max_loop_iters
    if isinstance(n_loops, Tensor):
        fits = n_loops.shape == (batch,) or (by_position and n_loops.shape == ids.shape)
        if n_loops.dtype.is_floating_point or n_loops.dtype == torch.bool or not fits:
            found = f"a {n_loops.dtype} tensor of shape {tuple(n_loops.shape)}"
            raise ValueError(f"n_loops is {found}; it must be {accepted}")
        loops = n_loops.to("cpu", torch.int32)
    elif isinstance(n_loops, int) and not isinstance(n_loops, bool):
        loops = torch.full((batch,), n_loops, dtype=torch.int32, device="cpu")
    else:
        raise ValueError(f"n_loops is {n_loops!r}; it must be {accepted}")
    if loops.numel() and int(loops.min()) < 1:
        raise ValueError(f"n_loops is {int(loops.min())}; it must be at least 1")
    return loops


def check_sampling(
    ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, config: MythosConfig
) -> None:
    """The arguments of `generate`."""
    limit = config.max_output_tokens
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or not 1 <= max_new_tokens <= limit:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens!r}; it must be an integer from 1 to max_output_tokens ({limit})"
        )
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature is {temperature!r}; it must be 0 (greedy) or a positive number")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k is {top_k!r}; it must be None or an integer of at least 1")
    check_ids(ids, config, 0)
    needed = ids.shape[1] + max_new_tokens
    if needed > config.max_seq_len:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens} after a prompt of {ids.shape[1]}; "
            f"together they must be at most max_seq_len ({config.max_seq_len})"
        )
