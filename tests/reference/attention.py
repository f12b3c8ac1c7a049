"""Softmax attention of one sequence, one query and one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, sink: Tensor | None = None
) -> Tensor:
    """q (queries, heads, width), k and v (keys, key heads, width) to (queries, heads, value width).

    The queries are the last positions of the keys; head h reads key head `h * key heads // heads`.
    """
    n_queries, n_heads, _ = q.shape
    n_keys, n_key_heads, _ = k.shape
    rows = []
    for query in range(n_queries):
        position = n_keys - n_queries + query
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(n_heads):
            key_head = head * n_key_heads // n_heads
            scores = [scale * torch.dot(q[query, head], k[key, key_head]) for key in range(first, position + 1)]
            if sink is not None:
                scores.append(sink[head])
            weights = torch.stack(scores).softmax(0)[: position + 1 - first]
            rows.append(weights @ v[first : position + 1, key_head])
    return torch.stack(rows).view(n_queries, n_heads, -1)
