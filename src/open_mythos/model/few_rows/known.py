"""Which modules are what their classes say, so that something else may compute what they would.

Main entries: `collect`, `has_global_hooks`, `compiles`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.model.attention import GQAttention
from open_mythos.model.block import Block
from open_mythos.model.depth_adapter import DepthAdapter, LoopEmbedding
from open_mythos.model.experts import MoEFFN
from open_mythos.model.feed_forward import SwiGLU
from open_mythos.model.halting import ACTHalting
from open_mythos.model.injection import LTIInjection
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock

_KNOWN: set[type[nn.Module]] = {
    *(RecurrentBlock, LTIInjection, LoopEmbedding, DepthAdapter, ACTHalting),
    *(Block, GQAttention, MLAttention, MoEFFN, SwiGLU, RMSNorm),
    *(nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList),
}

_FORWARD: dict[type[nn.Module], Any] = {kind: kind.forward for kind in _KNOWN}

# What asks for its stand-in where it computes, so that its own hooks run as ever.
_ASKS_ITSELF = (Block, RecurrentBlock)
_STOOD_IN_FOR = (*_ASKS_ITSELF, RMSNorm, ACTHalting)
WHOLES = (nn.Linear, nn.Embedding, nn.ModuleList)
"""Heads and stages: the model asks for their stand-ins, so they have one only where nothing is hooked to them."""


def collect(module: nn.Module, plain: list[nn.Module]) -> bool:
    """Add to `plain` the module and its parts where all in them is known; whether the module is, and has no hooks."""
    parts = [collect(part, plain) for part in module._modules.values() if part is not None]
    known = all(parts) and _is_known(module)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooked = any(hooks)
    if known and isinstance(module, _STOOD_IN_FOR) and (not hooked or isinstance(module, _ASKS_ITSELF)):
        plain.append(module)
    return known and not hooked


def _is_known(module: nn.Module) -> bool:
    """Whether the module, leaving its parts aside, is what its class says, and its weights are plain arrays."""
    kind = type(module)
    if kind not in _KNOWN or kind.forward is not _FORWARD[kind] or is_patched(module):
        return False
    kinds = {type(value) for value in vars(module).values()}
    if module._compiled_call_impl is not None or any(issubclass(each, Tensor) for each in kinds):
        return False  # wrappers put a weight's views in its place
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return False
    if type(module) is not ACTHalting:
        for part in module._modules.values():
            if part is not None and part._parameters.get("bias") is not None:
                return False
    if isinstance(module, MoEFFN) and not _is_plain(module.router_bias, Tensor):
        return False
    return all(_is_plain(weight, nn.Parameter) for weight in module._parameters.values() if weight is not None)


def _is_plain(weight: Tensor, kind: type[Tensor]) -> bool:
    on_cpu = weight.is_cpu and weight.dtype == torch.float32
    return on_cpu and type(weight) is kind and weight.is_contiguous()


def is_patched(module: nn.Module) -> bool:
    """Whether the module has methods of its own in place of its class's."""
    return not _methods(type(module)).isdisjoint(vars(module))  # type: ignore[arg-type]


@cache
def _methods(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))


def has_global_hooks() -> bool:
    hooks = nn.modules.module
    forward = hooks._global_forward_hooks, hooks._global_forward_pre_hooks
    return any((*forward, hooks._global_backward_hooks, hooks._global_backward_pre_hooks))


def compiles() -> bool:
    """Whether Numba, which this imports, compiles: in half a second."""
    from numba import config

    return not config.DISABLE_JIT  # type: ignore[attr-defined]
