"""The loss in chunks is the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from open_mythos.data.batch import IGNORED
from open_mythos.training.loss import cross_entropy


@pytest.mark.parametrize("chunk", [10**9, 7 * 11, 11, 1])
@pytest.mark.parametrize("with_z", [False, True])
def test_chunks_change_neither_sums_nor_gradients(chunk: int, with_z: bool) -> None:
    torch.manual_seed(0)
    features = torch.randn(30, 5, requires_grad=True)
    head = torch.randn(11, 5, requires_grad=True)
    targets = torch.randint(0, 11, (30,))
    targets[::4] = IGNORED
    logits = features @ head.T
    counted = targets != IGNORED
    expected = F.cross_entropy(logits[counted], targets[counted], reduction="sum")
    z = logits[counted].exp().sum(-1).log().square().sum()
    gradients = torch.autograd.grad(expected + 0.1 * with_z * z, (features, head))

    sums = cross_entropy(features, head, targets, with_z=with_z, chunk=chunk)
    torch.testing.assert_close(sums.loss, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sums.z, z if with_z else torch.tensor(0.0), atol=1e-4, rtol=1e-5)
    assert int(sums.right) == int((logits.argmax(-1) == targets)[counted].sum())
    found = torch.autograd.grad(sums.loss + 0.1 * sums.z, (features, head))
    torch.testing.assert_close(found, gradients, atol=1e-4, rtol=1e-4)


def test_the_whole_matrix_never_exists() -> None:
    """The largest tensor that forward and backward allocate is a chunk, not (tokens, vocabulary)."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    features, head = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    with Watch():
        cross_entropy(features, head, torch.randint(0, 1000, (64,)), with_z=True, chunk=8000).loss.backward()
    assert largest == 8000


def test_nothing_counted_is_a_loss_of_zero() -> None:
    sums = cross_entropy(torch.randn(4, 3), torch.randn(7, 3), torch.full((4,), IGNORED), with_z=True)
    assert [float(value) for value in sums] == [0, 0, 0]
