"""Layers in a row and what stands around them, over many positions, forward and backward, on several threads.

Main entries: `forward`, `backward`. Every step goes to all threads, a part to each. What stands around the layers is
done with their first and last steps, while a part's rows are in its cache: to start threads would cost as much.
"""

from __future__ import annotations

from typing import Any

from numba import prange

from open_mythos.model.arithmetic.compiled import compiled, parallel
from open_mythos.model.arithmetic.vectors import add_to
from open_mythos.model.many_rows.around import begin, begin_back, finish, finish_back
from open_mythos.model.many_rows.layer import (
    attend,
    attend_back,
    feed,
    feed_back,
    project,
    project_back,
    weights_back,
)
from open_mythos.model.many_rows.views import numbers_at


@parallel
def forward(layers: Any, passes: Any, arounds: Any) -> None:
    parts, last = passes[0].parts, layers.shape[0] - 1
    for k in range(last + 1):
        for part in prange(parts):
            if k == 0:
                begin(arounds, passes, part)
            project(layers, passes, k, part)
        for part in prange(parts):
            attend(layers, passes, k, part)
        for part in prange(parts):
            feed(layers, passes, k, part)
            if k == last:
                finish(arounds, passes, part)


@parallel
def backward(layers: Any, grads: Any, passes: Any, arounds: Any) -> None:
    parts, last = passes[0].parts, layers.shape[0] - 1
    for done in range(last + 1):
        k = last - done
        for part in prange(parts):
            if k == last:
                finish_back(arounds, passes, part)
            feed_back(layers, passes, k, part)
        for part in prange(parts):
            attend_back(layers, passes, k, part)
        for part in prange(parts):
            project_back(layers, passes, k, part)
            if k == 0:
                begin_back(arounds, passes, part)
        for part in prange(parts):
            weights_back(layers, grads, passes, k, part)
        _sum_up(passes[k].gains, passes[k].n_gains, parts)
        _sum_up(passes[k].dsink, passes[k].n_heads, passes[k].batch)
    _sum_up(arounds[0].gains, arounds[0].n_gains, parts)


@compiled
def _sum_up(lines: int, width: int, n: int) -> None:
    """Add up n lines of numbers, to the first."""
    total = numbers_at(lines, 0, width)
    for line in range(1, n):
        add_to(numbers_at(lines, line * width, (line + 1) * width), total)
