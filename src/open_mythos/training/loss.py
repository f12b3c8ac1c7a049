"""Cross-entropy in chunks of tokens, so that the (tokens, vocabulary) matrix never exists whole.

Main entry: `cross_entropy`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from open_mythos.data.batch import IGNORED

_CHUNK = 2**24
"""Logits that exist at a time. Each chunk adds to a whole gradient of the head: with sixteen times fewer, forward and
backward of 4096x384 features and 32,768 entries took 2.2 times as long on one thread (14.8 against 6.6 s of CPU time),
with four times fewer or more about the same (6.8 and 7.7), with all at once, nothing computed again, 5.3."""


class LossSums(NamedTuple):
    """Sums over counted tokens."""

    loss: Tensor
    """Cross-entropy, in nats."""
    z: Tensor
    """Squares of the log-sum-exp (z-loss: Chowdhery et al. 2022, arXiv 2204.02311, section 5)."""
    right: Tensor
    """Tokens whose most likely value is the target."""


def cross_entropy(
    features: Tensor, head: Tensor, targets: Tensor, *, with_z: bool = False, chunk: int = _CHUNK
) -> LossSums:
    """The sums for features (tokens, dim), head (vocab_size, dim) and targets (tokens,), each a float32 scalar.

    At most `chunk` logits exist at a time; where there would be more, they are computed again on the way back.
    """
    rows = max(1, chunk // head.shape[0])
    if features.shape[0] <= rows:
        return _sums(features, head, targets, with_z)
    parts = [
        LossSums(*checkpoint(_sums, x, head, y, with_z, use_reentrant=False))
        for x, y in zip(features.split(rows), targets.split(rows), strict=True)
    ]
    return LossSums(*(torch.stack(part).sum() for part in zip(*parts, strict=True)))


def _sums(features: Tensor, head: Tensor, targets: Tensor, with_z: bool) -> LossSums:
    logits = F.linear(features, head).float()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    counted = targets != IGNORED
    z = (logits.logsumexp(-1).square() * counted).sum() if with_z else torch.zeros_like(loss)
    right = ((logits.detach().argmax(-1) == targets) & counted).sum().float()
    return LossSums(loss, z, right)
