"""`open_text` goes from words to batches, and reads the data again exactly when something has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.data import text_cache
from open_mythos.data.batch import IGNORED
from open_mythos.data.packing import TextRows
from open_mythos.data.text import SplitCounts, TextData, open_text
from open_mythos.data.tokenizer_spec import byte_tokenizer

SIZES = {"seq_len": 8, "batch_size": 2}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index:02}.txt").write_text(f"document {index}, and a few more words\n")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was opened to be read, in order."""
    opened: list[str] = []
    real = text_cache.split_documents
    monkeypatch.setattr(
        text_cache, "split_documents", lambda some, share: opened.append(some.spec) or real(some, share)
    )
    return opened


def equal(one: TextData, other: TextData) -> bool:
    batches = zip((one.train.batch(3), one.train.batch(50)), (other.train.batch(3), other.train.batch(50)), strict=True)
    return one.summary == other.summary and all(torch.equal(a.ids, b.ids) for a, b in batches)


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:270"])
def test_a_folder_becomes_two_splits_and_a_tokenizer(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    done: list[int] = []
    data = open_text(str(corpus), cache=tmp_path / "cache", tokenizer=tokenizer, on_progress=done.append, **SIZES)
    assert data.summary.train is not None
    assert (data.summary.train.documents, data.summary.held_out.documents) == (18, 2)
    assert done == [18, 20]
    texts = {path.read_text() for path in corpus.iterdir()}
    n_bytes = sum(len(text.encode()) for text in texts)
    assert data.summary.train.bytes + data.summary.held_out.bytes == n_bytes
    assert data.summary.vocab_size == data.train.vocab_size == data.held_out.vocab_size == data.tokenizer.vocab_size
    held_out = [token for batch in data.held_out.in_order() for token in batch.ids.flatten().tolist()]
    assert isinstance(data.train, TextRows)
    found = set()
    for tokens in (held_out, data.train.store.tokens.tolist()):
        document: list[int] = []
        for token in tokens:
            if token != data.tokenizer.end_of_text:
                document.append(token)
            elif document:
                found.add(data.tokenizer.decode(document))
                document = []
    assert found == texts


def test_a_single_file_is_cut_at_a_tenth_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("".join(f"{index:04} " for index in range(200)))
    data = open_text(str(path), cache=tmp_path / "cache", tokenizer="chars", **SIZES)
    assert data.summary.train == SplitCounts(documents=1, tokens=901, bytes=900)
    assert data.summary.held_out == SplitCounts(documents=1, tokens=101, bytes=100)
    counted = sum(int((batch.targets != IGNORED).sum()) for batch in data.held_out.in_order())
    assert counted == 100
    assert data.held_out.bytes_per_token == 1.0
    assert data.tokenizer.decode(next(iter(data.held_out.in_order())).ids[0].tolist()) == "0180 018"


def test_the_same_request_reads_nothing_again(corpus: Path, tmp_path: Path, reads: list[str]) -> None:
    first = open_text(str(corpus), cache=tmp_path / "cache", tokenizer="bpe:270", **SIZES)
    done: list[int] = []
    again = open_text(str(corpus), cache=tmp_path / "cache", tokenizer="bpe:270", on_progress=done.append, **SIZES)
    assert equal(first, again)
    assert len(reads) == 1
    assert done == []
    other_rows = open_text(str(corpus), cache=tmp_path / "cache", tokenizer="bpe:270", seq_len=5, batch_size=3, seed=7)
    assert other_rows.summary == first.summary
    assert len(reads) == 1


def test_the_cache_is_enough_when_the_data_has_vanished(corpus: Path, tmp_path: Path, reads: list[str]) -> None:
    first = open_text(str(corpus), cache=tmp_path / "cache", **SIZES)
    shutil.rmtree(corpus)
    assert equal(first, open_text(str(corpus), cache=tmp_path / "cache", **SIZES))
    with pytest.raises(ValueError, match="corpus', which does not exist"):
        open_text(str(corpus), cache=tmp_path / "cache", holdout=0.5, **SIZES)
    # The request that failed has left the cache as it was.
    assert equal(first, open_text(str(corpus), cache=tmp_path / "cache", **SIZES))
    assert len(reads) == 1


def test_the_cache_moves_with_its_folder(corpus: Path, tmp_path: Path, reads: list[str]) -> None:
    first = open_text(str(corpus), cache=tmp_path / "cache", **SIZES)
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert equal(first, open_text(str(corpus), cache=tmp_path / "moved", **SIZES))
    assert len(reads) == 1


@pytest.mark.parametrize("change", [{"holdout": 0.3}, {"tokenizer": "chars"}])
def test_another_request_reads_again(corpus: Path, tmp_path: Path, reads: list[str], change: dict[str, Any]) -> None:
    first = open_text(str(corpus), cache=tmp_path / "cache", **SIZES)
    other = open_text(str(corpus), cache=tmp_path / "cache", **SIZES, **change)
    assert len(reads) == 2
    assert other.summary.fingerprint != first.summary.fingerprint


def test_changed_added_and_damaged_files_are_read_again(corpus: Path, tmp_path: Path, reads: list[str]) -> None:
    cache = tmp_path / "cache"
    summaries = [open_text(str(corpus), cache=cache, **SIZES).summary]
    (corpus / "00.txt").write_text("another text, which is longer than the one before it")
    summaries.append(open_text(str(corpus), cache=cache, **SIZES).summary)
    (corpus / "new.txt").write_text("one more document")
    summaries.append(open_text(str(corpus), cache=cache, **SIZES).summary)
    assert len({summary.fingerprint for summary in summaries}) == len(reads) == 3
    for name in ("train.bin", "held_out.json", "tokenizer.json", "request.json"):
        (cache / name).write_text("{")
        assert open_text(str(corpus), cache=cache, **SIZES).summary == summaries[-1]
    assert len(reads) == 7


def test_a_file_that_is_touched_gives_the_same_fingerprint(corpus: Path, tmp_path: Path, reads: list[str]) -> None:
    first = open_text(str(corpus), cache=tmp_path / "cache", **SIZES)
    (corpus / "00.txt").touch()
    assert equal(first, open_text(str(corpus), cache=tmp_path / "cache", **SIZES))
    assert len(reads) == 2


def test_a_tokenizer_from_a_folder_is_followed(corpus: Path, tmp_path: Path, reads: list[str]) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    arguments: dict[str, Any] = {"cache": tmp_path / "cache", "tokenizer": str(tmp_path / "tokenizer"), **SIZES}
    first = open_text(str(corpus), **arguments)
    assert equal(first, open_text(str(corpus), **arguments))
    assert len(reads) == 1
    chars = open_text(str(corpus), cache=tmp_path / "other", tokenizer="chars", **SIZES).tokenizer
    chars.save(tmp_path / "tokenizer")
    assert open_text(str(corpus), **arguments).summary.vocab_size == chars.vocab_size
    assert len(reads) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": 1.5}, "holdout is 1.5; it must be a number between 0 and 1"),
        ({"seq_len": 0}, "seq_len is 0; it must be at least 1"),
        ({"held_out_rows": 0}, "held_out_rows is 0; it must be at least 1"),
        ({"tokenizer": "bpe:3"}, "tokenizer is 'bpe:3'; it must be"),
        ({"seq_len": 5000}, "seq_len is 5000, and the held-out split has"),
        ({"data": "hf:x", "tokenizer": "chars"}, "tokenizer is 'chars', and a stream"),
    ],
)
def test_what_cannot_be_is_refused(corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"data": str(corpus), "cache": tmp_path / "cache", **SIZES, **changes}
    with pytest.raises(ValueError, match=message):
        open_text(**arguments)


def test_a_cache_inside_the_data_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its JSON files would be documents of the next run."""
    monkeypatch.chdir(corpus)
    with pytest.raises(ValueError, match=r"cache is 'runs/cache', inside the data \(.*corpus'\)"):
        open_text(".", cache="runs/cache", **SIZES)


def test_a_bad_file_is_an_error_before_anything_is_written(corpus: Path, tmp_path: Path) -> None:
    (corpus / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bad\.txt has byte 0xff at offset 0"):
        open_text(str(corpus), cache=tmp_path / "cache", **SIZES)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:270"])
def test_a_dataset_by_name_is_streamed_behind_its_held_out_rows(tmp_path: Path, tokenizer: str) -> None:
    """A folder stands for the hub: `datasets` opens both by name, through the same call."""
    pytest.importorskip("datasets")
    (tmp_path / "named").mkdir()
    rows = "".join(json.dumps({"text": f"row {index} of the dataset"}) + "\n" for index in range(50))
    (tmp_path / "named" / "train.jsonl").write_text(rows)
    arguments: dict[str, Any] = {
        "data": f"hf:{tmp_path / 'named'}",
        "cache": tmp_path / "cache",
        "tokenizer": tokenizer,
        "held_out_rows": 10,
        "shuffle_buffer": 4,
        **SIZES,
    }
    first, again = open_text(**arguments), open_text(**arguments)
    assert first.summary == again.summary
    assert first.summary.train is None
    assert first.summary.held_out.documents == 10
    assert first.train.bytes_per_token == first.held_out.bytes_per_token
    batches = [first.train.batch(step) for step in range(5)]
    assert all(torch.equal(batch.ids, again.train.batch(step).ids) for step, batch in enumerate(batches))
    text = first.tokenizer.decode([token for batch in batches for token in batch.ids.flatten().tolist()])
    rows_seen = {int(part.split()[0]) for part in text.split("row ")[1:-1]}
    assert min(rows_seen) >= 10
