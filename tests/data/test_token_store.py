"""A token store holds what the tokenizer made of the documents, and is made again exactly when it must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from open_mythos.data.token_store import TokenStore, build_store
from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.data.tokenizer_spec import byte_tokenizer, char_tokenizer

DOCUMENTS = ["first é", "second", "日本"]


def must_not_be_read() -> Iterator[str]:
    raise AssertionError("the documents were read again")
    yield ""


def test_tokens_and_counts(tmp_path: Path) -> None:
    done: list[int] = []
    store = build_store(tmp_path, "train", DOCUMENTS, byte_tokenizer(), "data", done.append)
    assert store.tokens.tolist() == [token for text in DOCUMENTS for token in [*text.encode(), 256]]
    assert store.tokens.dtype == np.uint16
    assert isinstance(store.tokens, np.memmap)
    n_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert (store.info.documents, store.info.bytes, store.info.tokens) == (3, n_bytes, n_bytes + 3)
    assert (store.info.vocab_size, store.info.end_of_text) == (257, 256)
    assert store.info.bytes_per_token == 1.0
    assert done == [3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "train.json"]


def test_ids_that_do_not_fit_in_two_bytes_are_kept_in_four(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(Tokenizer(models.WordLevel({"a": 70_000, "</s>": 1}, unk_token="a")))
    store = build_store(tmp_path, "train", ["a"], tokenizer, "data")
    assert store.tokens.dtype == np.uint32
    assert store.tokens.tolist() == [70_000, 1]


def test_a_store_is_reused_for_the_same_data_and_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    store = build_store(tmp_path, "train", DOCUMENTS, tokenizer, "data")
    again = build_store(tmp_path, "train", must_not_be_read(), tokenizer, "data")
    assert again.info == store.info
    assert again.tokens.tolist() == store.tokens.tolist()


def test_a_store_is_made_again_for_other_data_or_another_tokenizer(tmp_path: Path) -> None:
    build_store(tmp_path, "train", DOCUMENTS, byte_tokenizer(), "data")
    assert build_store(tmp_path, "train", ["x"], byte_tokenizer(), "other").tokens.tolist() == [120, 256]
    assert build_store(tmp_path, "train", ["x"], char_tokenizer(["x"]), "other").tokens.tolist() == [0, 1]


@pytest.mark.parametrize("damage", ["cut", "no tokens", "no json", "other fields", "missing fields"])
def test_a_damaged_store_is_made_again(tmp_path: Path, damage: str) -> None:
    build_store(tmp_path, "train", DOCUMENTS, byte_tokenizer(), "data")
    tokens, info = tmp_path / "train.bin", tmp_path / "train.json"
    if damage == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif damage == "no tokens":
        tokens.unlink()
    elif damage == "no json":
        info.write_text("{")
    elif damage == "other fields":
        info.write_text(json.dumps({"a": 1}))
    else:
        info.write_text("[]")
    assert TokenStore.open(tmp_path, "train", tokenizer=byte_tokenizer().fingerprint, data="data") is None
    assert build_store(tmp_path, "train", DOCUMENTS, byte_tokenizer(), "data").info.documents == 3


def test_a_store_whose_making_fails_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_mythos.data.encode._PORTION", 10)

    def failing() -> Iterator[str]:
        yield "x" * 20
        raise OSError("the disk is gone")

    build_store(tmp_path, "train", DOCUMENTS, byte_tokenizer(), "data")
    with pytest.raises(OSError, match="the disk is gone"):
        build_store(tmp_path, "train", failing(), byte_tokenizer(), "other")
    for data in ("data", "other"):
        assert TokenStore.open(tmp_path, "train", tokenizer=byte_tokenizer().fingerprint, data=data) is None


def test_a_store_that_is_open_outlives_the_next_one(tmp_path: Path) -> None:
    store = build_store(tmp_path, "train", DOCUMENTS, byte_tokenizer(), "data")
    before = store.tokens.tolist()
    build_store(tmp_path, "train", ["y"], byte_tokenizer(), "other")
    assert store.tokens.tolist() == before


def test_the_content_hash_tells_the_tokens_alone(tmp_path: Path) -> None:
    stores = [
        build_store(tmp_path / name, name, documents, byte_tokenizer(), name)
        for name, documents in [("a", ["x", "y"]), ("b", ["x", "y"]), ("c", ["y", "x"])]
    ]
    assert stores[0].info.content == stores[1].info.content != stores[2].info.content


def test_no_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no document"):
        build_store(tmp_path, "train", [], byte_tokenizer(), "data")
