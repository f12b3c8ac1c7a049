"""Debug mode: name the layer where a number first stops being finite.

Main entries: `check_finite`, `non_finite_weights`. Every module's inputs and outputs are read, so a forward pass is
slower, and on an accelerator it waits for the device at every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """NaN or infinity in a weight or an activation; `layer` is the module's or the weight's name."""

    def __init__(self, message: str, layer: str) -> None:
        super().__init__(message)
        self.layer = layer


@contextmanager
def check_finite(model: nn.Module) -> Iterator[None]:
    """Within this context, non-finite weights (checked on entry) and activations raise `NonFiniteError`.

    Activations are checked where modules hand them over, innermost first. So the layer named is the one that made the
    number out of finite ones, or, for what is computed between modules, the next one to receive it.
    """
    found = non_finite_weights(model)
    if found:
        raise NonFiniteError(f"weights are not finite in {', '.join(found)}; the first is {found[0]}", found[0])
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            watch = _Watch(name or type(module).__name__)
            hooks.callback(module.register_forward_pre_hook(watch.inputs, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(watch.output).remove)
        yield


def non_finite_weights(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold NaN or infinity, in the model's order."""
    return [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if not _is_finite(tensor)]


class _Watch:
    """The hooks of one module; it counts the module's calls, since a looped layer is called once per loop."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, 0

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self._check((args, kwargs), "input")

    def output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._check(output, "output")

    def _check(self, value: Any, what: str) -> None:
        if not all(map(_is_finite, _tensors(value))):
            raise NonFiniteError(
                f"activations first stop being finite in the {what} of {self.name}, in its call number {self.calls}",
                self.name,
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
