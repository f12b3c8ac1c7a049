"""Streamed rows are those of a naive packing, and a stream resumed anywhere gives the same batches bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.strategies import some
from open_mythos.data.batch import Batch
from open_mythos.data.hub import open_hub, texts
from open_mythos.data.streaming import StreamedRows
from open_mythos.data.tokenizer_spec import byte_tokenizer, char_tokenizer
from reference.packing import ordered_rows

datasets = pytest.importorskip("datasets")
TOKENIZER = byte_tokenizer()
SKIPPED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 20 rows each, some of them empty; documents of 1 to 30 characters that name themselves."""
    root = tmp_path_factory.mktemp("stream")
    rng = random.Random(0)
    for file in range(3):
        rows = [f"{file}.{row} " + "é" * rng.randrange(14) if row % 9 else "" for row in range(20)]
        (root / f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return root


def open_stream(folder: Path) -> Any:
    return datasets.load_dataset("json", data_files=sorted(map(str, folder.iterdir())), split="train", streaming=True)


def source(folder: Path, **changes: Any) -> StreamedRows:
    sizes = {"seq_len": 16, "batch_size": 3, "seed": 1, "shuffle_buffer": 8, **changes}
    return StreamedRows(open_stream(folder).skip(SKIPPED), TOKENIZER, **sizes)


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def test_rows_in_the_stream_s_order_are_the_naive_packing(folder: Path) -> None:
    documents = [list(text.encode()) for text in texts(open_stream(folder).skip(SKIPPED))]
    # The stream starts again when it ends, and an end of text is between the two.
    expected = ordered_rows(documents * 3, TOKENIZER.end_of_text, 16)
    rows = source(folder, shuffle_buffer=1)
    n_steps = (len(expected) - 1) // 3
    found = list(map(rows.batch, range(n_steps)))
    assert [ids for batch in found for ids in batch.ids.tolist()] == [ids for ids, _ in expected[: 3 * n_steps]]
    assert [row for batch in found for row in batch.targets.tolist()] == [row for _, row in expected[: 3 * n_steps]]


def test_shuffling_changes_the_order_within_blocks_only_and_loses_nothing(folder: Path) -> None:
    documents = list(texts(open_stream(folder).skip(SKIPPED)))
    n_bytes = sum(len(text.encode()) + 1 for text in documents)
    rows = source(folder, seq_len=1, batch_size=n_bytes)
    epochs = [bytes(token % 256 for token in rows.batch(step).ids[:, 0].tolist()) for step in range(2)]
    # An end of text is 256, so it shows as a zero byte.
    orders = [epoch.decode().removesuffix("\0").split("\0") for epoch in epochs]
    assert [sorted(order) for order in orders] == [sorted(documents)] * 2
    assert orders[0] != documents
    assert orders[0] != orders[1]
    for start in range(0, len(documents), 8):
        assert sorted(orders[0][start : start + 8]) == sorted(documents[start : start + 8])


@settings(some, max_examples=30)
@given(stop=st.integers(0, 50), seq_len=st.integers(1, 40), batch_size=st.integers(1, 6), buffer=st.integers(1, 70))
def test_a_stream_resumes_bit_for_bit_anywhere(
    folder: Path, stop: int, seq_len: int, batch_size: int, buffer: int
) -> None:
    sizes = {"seq_len": seq_len, "batch_size": batch_size, "shuffle_buffer": buffer}
    rows = source(folder, **sizes)
    for step in range(stop):
        rows.batch(step)
    state = through_json(rows.state_dict())
    expected = [rows.batch(stop + more) for more in range(4)]
    again = source(folder, **sizes)
    again.load_state_dict(state)
    assert through_json(again.state_dict()) == state
    assert all(same(again.batch(stop + more), batch) for more, batch in enumerate(expected))


def test_a_run_that_is_interrupted_after_every_step_sees_the_same_batches(folder: Path) -> None:
    whole = source(folder)
    state = source(folder).state_dict()
    for step in range(16):
        rows = source(folder)
        rows.load_state_dict(through_json(state))
        assert same(rows.batch(step), whole.batch(step))
        state = rows.state_dict()


def test_a_source_can_be_sent_back_to_a_state_of_its_own(folder: Path) -> None:
    rows = source(folder)
    beginning = rows.state_dict()
    first = [rows.batch(step) for step in range(20)]
    rows.load_state_dict(beginning)
    assert all(same(rows.batch(step), batch) for step, batch in enumerate(first))


def test_a_state_holds_no_more_than_a_batch_of_tokens(folder: Path) -> None:
    rows = source(folder, shuffle_buffer=50)
    for step in range(20):
        rows.batch(step)
        assert len(rows.state_dict()["tokens"]) <= 3 * 16 + 1


def test_seeds_have_orders_of_their_own(folder: Path) -> None:
    assert not same(source(folder, seed=1).batch(0), source(folder, seed=2).batch(0))
    assert same(source(folder, seed=1).batch(0), source(folder, seed=1).batch(0))


def test_what_a_trainer_reads(folder: Path) -> None:
    rows = source(folder, bytes_per_token=1.5)
    assert (rows.vocab_size, rows.bytes_per_token) == (257, 1.5)
    rows.batch(0)
    assert rows.position(0) == "step 0 of a stream that is at step 1, in epoch 0, before block 1 of 8 documents"


def test_steps_out_of_order_are_refused(folder: Path) -> None:
    rows = source(folder)
    rows.batch(0)
    for step in (0, 2):
        with pytest.raises(ValueError, match=f"step is {step}; a stream is read in order, and its next step is 1"):
            rows.batch(step)


@pytest.mark.parametrize(("change", "was"), [({"seed": 2}, 1), ({"shuffle_buffer": 9}, 8)])
def test_a_state_of_other_settings_is_refused(folder: Path, change: dict[str, int], was: int) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; to resume it must be what it was, {was}"):
        source(folder, **change).load_state_dict(source(folder).state_dict())


def test_a_state_of_another_tokenizer_is_refused(folder: Path) -> None:
    other = StreamedRows(open_stream(folder), char_tokenizer(["a"]), seq_len=4, batch_size=1, shuffle_buffer=8, seed=1)
    with pytest.raises(ValueError, match=r"tokenizer is .*; to resume it must be what it was"):
        other.load_state_dict(source(folder).state_dict())


def test_streams_without_text_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the stream has no document to train on"):
        StreamedRows(open_stream(folder).skip(60), TOKENIZER, seq_len=4, batch_size=1).batch(0)
    (tmp_path / "x.jsonl").write_text('{"body": "a", "id": 1}\n')
    with pytest.raises(ValueError, match=r"row 1 from .* has no column 'text'; it has \['body', 'id'\]"):
        StreamedRows(open_stream(tmp_path), TOKENIZER, seq_len=4, batch_size=1).batch(0)
    with pytest.raises(ValueError, match="shuffle_buffer is 0; it must be at least 1"):
        source(folder, shuffle_buffer=0)


def test_names_that_the_hub_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data is 'hf:'; it must be 'hf:NAME' or 'hf:NAME:CONFIG'"):
        open_hub("hf:")
    gone = f"hf:{tmp_path / 'gone'}"
    with pytest.raises(ValueError, match=f"data is '{gone}', which the Hugging Face hub does not give"):
        open_hub(gone)


def test_without_datasets_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"data 'hf:x' needs datasets: pip install 'open-mythos\[train\]'"):
        open_hub("hf:x")
