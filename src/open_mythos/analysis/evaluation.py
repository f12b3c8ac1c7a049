"""How analysis looks at a model without leaving a trace.

Main entry: `evaluating`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from open_mythos.model.mythos import OpenMythos


@contextmanager
def evaluating(model: OpenMythos) -> Iterator[None]:
    """The model in evaluation mode, then back as it was: in training mode a forward would move the routers' biases."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
