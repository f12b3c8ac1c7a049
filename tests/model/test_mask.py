"""What a query may see."""

from __future__ import annotations

import pytest
import torch

from open_mythos.model.mask import AttentionMask


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 8), (5, 5), (4, 9)])
def test_a_query_sees_itself_and_at_most_a_window_before_it(n_queries: int, n_keys: int, window: int | None) -> None:
    mask = AttentionMask(n_queries, n_keys, window, torch.device("cpu"), torch.float32)
    for query in range(n_queries):
        position = n_keys - n_queries + query
        visible = {key for key in range(n_keys) if key <= position and (window is None or key > position - window)}
        kept = range(mask.first_key, n_keys)
        row = [0.0] * len(kept) if mask.bias is None else mask.bias[query].tolist()
        assert {key for key, bias in zip(kept, row, strict=True) if bias == 0} == visible


def test_keys_that_no_query_sees_are_not_read() -> None:
    mask = AttentionMask(2, 100, 5, torch.device("cpu"), torch.float32)
    assert mask.first_key == 94


def test_a_causal_square_is_recognised() -> None:
    def square(n_queries: int, n_keys: int, window: int | None) -> bool:
        return AttentionMask(n_queries, n_keys, window, torch.device("cpu"), torch.float32).is_causal_square

    assert square(5, 5, None)
    assert square(5, 5, 5)
    assert not square(5, 5, 4)
    assert not square(4, 5, None)


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "window"), [(5, 5, None), (200, 230, 7), (300, 300, 64), (100, 100, 90)]
)
def test_the_parts_of_a_mask_see_what_the_whole_sees(n_queries: int, n_keys: int, window: int | None) -> None:
    mask = AttentionMask(n_queries, n_keys, window, torch.device("cpu"), torch.float32)
    assert mask.bias is not None
    rebuilt = torch.full_like(mask.bias, float("-inf"))
    for queries, keys, part in mask.parts:
        rebuilt[queries, keys] = part.bias
    assert torch.equal(rebuilt, mask.bias)


def test_a_narrow_window_reads_few_keys() -> None:
    """1024 positions with a window of 32: runs of 64 queries read at most 64 + 31 keys each."""
    mask = AttentionMask(1024, 1024, 32, torch.device("cpu"), torch.float32)
    assert sum(part.n_queries * (part.n_keys - part.first_key) for _, _, part in mask.parts) <= 1024 * 95
