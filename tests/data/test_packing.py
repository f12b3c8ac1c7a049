"""Rows are those of a naive packing, every token is counted once, and no target crosses a document's end."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.strategies import END, numbered_documents, some, store_of
from open_mythos.data.batch import IGNORED, Batch
from open_mythos.data.packing import TextRows
from reference.packing import epoch_rows, ordered_rows


def rows_of(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    return [
        (ids.tolist(), targets.tolist())
        for batch in batches
        for ids, targets in zip(batch.ids, batch.targets, strict=True)
    ]


@st.composite
def sources(draw: st.DrawFn) -> tuple[list[list[int]], TextRows]:
    documents = draw(numbered_documents())
    store = store_of(documents)
    seq_len = draw(st.integers(1, min(9, store.info.tokens)))
    rows = TextRows(store, seq_len=seq_len, batch_size=draw(st.integers(1, 7)), seed=draw(st.integers(0, 99)))
    return documents, rows


@some
@given(sources())
def test_an_epoch_is_a_permutation_of_naively_packed_rows(case: tuple[list[list[int]], TextRows]) -> None:
    documents, source = case
    epochs = 3
    n_steps = -(-epochs * source.rows_per_epoch // source.batch_size)
    found = rows_of([source.batch(step) for step in range(n_steps)])
    for epoch in range(epochs):
        rows = sorted(found[epoch * source.rows_per_epoch : (epoch + 1) * source.rows_per_epoch])
        possible = (epoch_rows(documents, END, source.seq_len, offset) for offset in range(source.seq_len))
        assert any(rows == sorted(expected) for expected in possible)


@some
@given(sources())
def test_an_epoch_counts_every_token_once_and_leaves_out_less_than_a_row(
    case: tuple[list[list[int]], TextRows],
) -> None:
    """A token's id is its own here, so ids that were counted are tokens that were counted."""
    documents, source = case
    rows = rows_of([source.batch(step) for step in range(source.rows_per_epoch)])[: source.rows_per_epoch]
    first = {document[0] for document in documents}
    counted = Counter(target for _, targets in rows for target in targets if target not in (IGNORED, END))
    asked = {token for document in documents for token in document} - first
    assert max(counted.values(), default=1) == 1
    assert counted.keys() <= asked
    places = len(rows) * source.seq_len
    assert source.store.info.tokens - places < source.seq_len
    assert len(asked) - len(counted) <= source.store.info.tokens - places


@some
@given(sources())
def test_no_target_crosses_the_end_of_a_document(case: tuple[list[list[int]], TextRows]) -> None:
    documents, source = case
    follows = {
        before: after for document in documents for before, after in zip(document, [*document[1:], END], strict=True)
    }
    batches = [source.batch(step) for step in range(6)]
    for ids, targets in rows_of([*batches, *source.in_order()]):
        for token, target in zip(ids, targets, strict=True):
            assert target == (IGNORED if token == END else follows[token])


@some
@given(sources())
def test_in_order_is_the_naive_packing_and_counts_every_token_once(case: tuple[list[list[int]], TextRows]) -> None:
    documents, source = case
    batches = list(source.in_order())
    rows = rows_of(batches)
    assert rows == ordered_rows(documents, END, source.seq_len)
    assert [len(batch.ids) for batch in batches[:-1]] == [source.batch_size] * (len(batches) - 1)
    counted = [target for _, targets in rows for target in targets if target != IGNORED]
    assert counted == [token for document in documents for token in [*document[1:], END]]
    assert len(counted) * source.bytes_per_token == pytest.approx(source.store.info.bytes)
    assert rows_of(list(source.in_order(2))) == rows[:2]


@some
@given(sources(), st.permutations(range(8)))
def test_a_batch_is_a_function_of_its_step_alone(case: tuple[list[list[int]], TextRows], steps: list[int]) -> None:
    _, source = case
    again = TextRows(source.store, seq_len=source.seq_len, batch_size=source.batch_size, seed=source.seed)
    found = {step: source.batch(step) for step in steps}
    for step in range(8):
        expected = again.batch(step)
        assert torch.equal(found[step].ids, expected.ids)
        assert torch.equal(found[step].targets, expected.targets)


def test_epochs_and_seeds_have_orders_and_offsets_of_their_own() -> None:
    """Of 64 rows, two equal permutations have a chance of about 1e-89."""
    documents = [list(range(1, 1001))]
    source = TextRows(store_of(documents), seq_len=15, batch_size=1)
    one, two = ([source.batch(step + epoch * source.rows_per_epoch) for step in range(64)] for epoch in (0, 1))
    other = TextRows(store_of(documents), seq_len=15, batch_size=1, seed=1)
    assert rows_of(one) != rows_of(two)
    assert rows_of(one) != rows_of([other.batch(step) for step in range(64)])
    offsets = [{(int(batch.ids[0, 0]) - 1) % 15 for batch in epoch} for epoch in (one, two)]
    assert [len(offset) for offset in offsets] == [1, 1]
    assert offsets[0] != offsets[1]


def test_a_batch_larger_than_an_epoch_is_made_of_several() -> None:
    source = TextRows(store_of([[1, 2, 3]]), seq_len=2, batch_size=5)
    assert source.rows_per_epoch == 2
    assert source.batch(0).ids.shape == (5, 2)


def test_types_and_what_a_trainer_reads() -> None:
    source = TextRows(store_of([[1, 2, 3], [4]]), seq_len=4, batch_size=2)
    batch = source.batch(0)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert batch.difficulty is None
    assert source.vocab_size == 5
    assert source.bytes_per_token == 1.0
    assert set(source.state_dict()) == {"content"}
    source.load_state_dict(source.state_dict())
    assert source.position(1).startswith("epoch 2 of the training split, rows from 0 of 1 in that epoch's order")


def test_the_order_is_drawn_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a step costs its own rows, however many there are."""
    drawn = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or real(seed))
    source = TextRows(store_of([[1] * 999]), seq_len=10, batch_size=7, seed=5)
    for step in range(28):
        source.batch(step)
    assert drawn == [(5, 0), (5, 1)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seq_len": 0, "batch_size": 1}, "seq_len is 0; it must be at least 1"),
        ({"seq_len": 4, "batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"seq_len": 4, "batch_size": 1, "seed": -1}, "seed is -1; it must be at least 0"),
        ({"seq_len": 5, "batch_size": 1, "split": "held-out"}, "seq_len is 5, and the held-out split has 4 tokens"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextRows(store_of([[1, 2, 3]]), **sizes)


def test_what_cannot_be_asked_of_rows_is_refused() -> None:
    source = TextRows(store_of([[1, 2, 3]]), seq_len=4, batch_size=1)
    with pytest.raises(ValueError, match="step is -1; it must be at least 0"):
        source.batch(-1)
    with pytest.raises(ValueError, match="max_rows is 0; it must be None or at least 1"):
        next(source.in_order(0))
    with pytest.raises(ValueError, match=r"other tokens than when the checkpoint was written"):
        source.load_state_dict({"epoch": 1})
