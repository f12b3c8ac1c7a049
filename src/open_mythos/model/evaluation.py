"""Modules in evaluation mode for a while, without leaving a trace.

Main entry: `evaluating`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode, then every module's own mode again: parts that were frozen in evaluation mode remain so.

    In training mode a forward pass would move the routers' biases.
    """
    in_training = [module for module in modules if module.training]
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
