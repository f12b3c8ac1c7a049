"""The held-out split is disjoint, made by document, and the same for the same documents."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.strategies import some, texts
from open_mythos.data.split import content_hash, split_documents

documents = st.lists(texts(1, 4), min_size=2, max_size=12).filter(lambda found: len(set(found)) > 1)
shares = st.floats(0.01, 0.99)


@some
@given(documents, shares)
def test_every_document_is_on_one_side_and_so_are_its_copies(given_texts: list[str], holdout: float) -> None:
    split = split_documents(given_texts, holdout)
    train, held_out = list(split.train()), list(split.held_out())
    assert sorted(train + held_out) == sorted(given_texts)
    assert not set(train) & set(held_out)
    assert train
    assert held_out
    assert (len(train), len(held_out)) == (split.n_train, split.n_held_out)
    order = {text: index for index, text in enumerate(dict.fromkeys(given_texts))}
    assert [order[text] for text in dict.fromkeys(train)] == sorted(order[text] for text in set(train))


@some
@given(documents, shares, st.randoms())
def test_order_does_not_matter(given_texts: list[str], holdout: float, random: object) -> None:
    shuffled = list(given_texts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(split_documents(given_texts, holdout).held_out()) == set(split_documents(shuffled, holdout).held_out())


@pytest.mark.parametrize(("count", "holdout", "expected"), [(100, 0.1, 10), (100, 0.5, 50), (7, 0.1, 1), (2, 0.9, 1)])
def test_the_share_is_as_near_as_documents_allow(count: int, holdout: float, expected: int) -> None:
    assert split_documents([f"document {index}" for index in range(count)], holdout).n_held_out == expected


@some
@given(texts(2, 50), shares)
def test_a_single_document_is_cut_once_and_its_last_part_held_out(text: str, holdout: float) -> None:
    split = split_documents([text], holdout)
    (train,), (held_out,) = split.train(), split.held_out()
    assert train + held_out == text
    assert train
    assert held_out
    assert abs(len(train) - len(text) * (1 - holdout)) <= 1


def test_a_single_document_is_cut_at_its_share_of_characters() -> None:
    split = split_documents(["é" * 90 + "x" * 10], 0.1)
    assert (*split.train(), *split.held_out()) == ("é" * 90, "x" * 10)


def test_the_hash_is_the_same_everywhere() -> None:
    """The number is what blake2b gives; another one would move documents of caches made before."""
    assert content_hash("OpenMythos") == content_hash("Open" + "Mythos")
    assert content_hash("") == 0xE4A6A0577479B2B4


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_cannot_be_held_out_is_refused(holdout: float) -> None:
    with pytest.raises(ValueError, match=f"holdout is {holdout}; it must be a number between 0 and 1"):
        split_documents(["a", "b"], holdout)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["a"], "a single document of 1 character"),
        (["same"] * 3, "data holds 3 copies of one text"),
        ([], "data holds no document"),
    ],
)
def test_documents_of_which_no_two_parts_can_be_made_are_refused(documents: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_documents(documents)
