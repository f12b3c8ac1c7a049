"""Tokenizers give back the text they were given, in one piece or token by token, and after saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data.strategies import some, texts
from open_mythos.data.encode import encode_documents
from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.data.tokenizer_spec import bpe_tokenizer, byte_tokenizer, char_tokenizer, make_tokenizer

PROSE = "the cat sat on the mat. The cat's mat, isn't it? Nobody else has ever asked about those small brown animals.\n"
CORPUS = [PROSE * 20, "日本語 déjà vu 12345\n" * 10]
BYTES = byte_tokenizer()
BPE = bpe_tokenizer(CORPUS, 300)


@some
@given(texts())
def test_bytes_are_their_own_ids_for_any_text(text: str) -> None:
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES.decode(BYTES.encode(text)) == text


@some
@given(st.lists(texts(), max_size=5))
def test_byte_pairs_give_back_any_text(batch: list[str]) -> None:
    assert [BPE.decode(ids) for ids in BPE.encode_batch(batch)] == batch
    assert BPE.encode_batch(batch) == [BPE.encode(text) for text in batch]


@some
@given(texts(min_size=1))
def test_characters_give_back_any_text_of_theirs(text: str) -> None:
    tokenizer = char_tokenizer([text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.end_of_text == len(set(text)) == tokenizer.vocab_size - 1


def test_sizes_and_ends_of_text() -> None:
    assert (BYTES.vocab_size, BYTES.end_of_text) == (257, 256)
    assert (BPE.vocab_size, BPE.end_of_text) == (300, 299)
    assert BPE.decode([*BPE.encode("cat"), BPE.end_of_text]) == "cat"
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) / 2


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, char_tokenizer(["<|endoftx>"])])
def test_a_text_cannot_forge_an_end_of_text(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("<|endoftext|>")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == "<|endoftext|>"


@some
@given(st.lists(st.integers(0, 299), max_size=30))
def test_a_stream_of_any_ids_joins_to_the_whole(ids: list[int]) -> None:
    """Ids drawn at random are mostly broken UTF-8, as an untrained model's are."""
    for tokenizer in (BPE, BYTES):
        known = [token % tokenizer.vocab_size for token in ids]
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, known), stream.finish()]) == tokenizer.decode(known)


@some
@given(texts())
def test_a_stream_never_shows_part_of_a_character(text: str) -> None:
    stream = BYTES.stream()
    parts = [stream.push(token) for token in BYTES.encode(text)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
        assert stream.finish() == ""
        assert "".join(parts) == text


def test_a_stream_keeps_the_spaces_that_a_decoder_drops_at_the_start() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign = TextTokenizer(tokenizer)
    stream = foreign.stream()
    assert "".join(map(stream.push, foreign.encode("a b b"))) == foreign.decode(foreign.encode("a b b")) == "a b b"


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, char_tokenizer(CORPUS)])
def test_a_saved_tokenizer_is_the_same(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        again = TextTokenizer.load(path)
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
        assert again.encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert bpe_tokenizer(CORPUS, 300).fingerprint == BPE.fingerprint
    assert bpe_tokenizer(CORPUS, 290).fingerprint != BPE.fingerprint


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_a_foreign_end_of_text_is_found_by_its_name(name: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, name: 1, "b": 2}, unk_token="a"))
    foreign = TextTokenizer(tokenizer)
    assert (foreign.end_of_text, foreign.vocab_size) == (1, 3)


def test_a_foreign_tokenizer_without_an_end_of_text_is_given_one() -> None:
    foreign = TextTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")))
    assert foreign.end_of_text == foreign.tokenizer.token_to_id("<|endoftext|>") == 2
    assert foreign.vocab_size == 8
    assert foreign.decode([foreign.end_of_text]) == ""


def test_an_end_of_text_is_not_given_an_id_that_is_taken() -> None:
    with pytest.raises(ValueError, match="ids have gaps and no end of text"):
        TextTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 2}, unk_token="a")))


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents count as long from 64 characters on, and four pieces go into one call."""
    monkeypatch.setattr("open_mythos.data.encode._PIECE", 64)
    monkeypatch.setattr("open_mythos.data.encode._PORTION", 256)


@pytest.mark.usefixtures("_small_pieces")
def test_long_documents_are_encoded_in_pieces_without_loss() -> None:
    lines = "".join(f"line {index} of a long document é\n" for index in range(40))
    documents = ["short", lines, "x" * 700, "y" * 64, "last"]
    portions = list(encode_documents(documents, BYTES))
    tokens = [token for portion in portions for token in portion.tokens.tolist()]
    assert len(portions) > 5
    assert tokens == [token for text in documents for token in [*text.encode(), 256]]
    assert sum(portion.documents for portion in portions) == 5
    assert sum(portion.bytes for portion in portions) == sum(len(text.encode()) for text in documents)


@pytest.mark.usefixtures("_small_pieces")
def test_pieces_of_a_long_document_have_the_tokens_of_the_whole() -> None:
    """Byte pairs end where words do, and words end at a line's end that a word follows."""
    text = "the cat sat on the mat\n" * 100
    tokens = [token for portion in encode_documents([text], BPE) for token in portion.tokens.tolist()]
    assert tokens == [*BPE.encode(text), BPE.end_of_text]


def test_every_way_to_name_a_tokenizer(tmp_path: Path) -> None:
    seen: list[str] = []

    def make(spec: str) -> TextTokenizer:
        return make_tokenizer(spec, lambda: seen.append("train") or CORPUS[:1], lambda: seen.append("all") or CORPUS)

    assert make("bytes").fingerprint == BYTES.fingerprint
    assert seen == []
    assert make("bpe:280").vocab_size == 280
    assert make("chars").vocab_size == len(set("".join(CORPUS))) + 1
    assert seen == ["train", "all"]
    BPE.save(tmp_path)
    assert make(str(tmp_path)).fingerprint == make(str(tmp_path / "tokenizer.json")).fingerprint == BPE.fingerprint


def test_byte_pairs_of_little_text_are_fewer_than_asked_for() -> None:
    assert bpe_tokenizer(["ab"], 1000).vocab_size == 258


def test_a_name_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def from_pretrained(name: str) -> Tokenizer:
            if name != "some/name":
                raise Exception(f"no {name}")
            return Tokenizer.from_str(BPE.tokenizer.to_str())

    monkeypatch.setattr("open_mythos.data.tokenizer_spec.Tokenizer", Hub)
    assert make_tokenizer("some/name", list, list).fingerprint == BPE.fingerprint
    with pytest.raises(ValueError, match=r"tokenizer is 'byte', and the hub does not give it \(no byte\); it must be"):
        make_tokenizer("byte", list, list)


@pytest.mark.parametrize("spec", ["bpe:", "bpe:256", "bpe:-5", "bpe:1e3", "bpe:²57"])
def test_a_number_of_byte_pairs_that_cannot_be_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer is '{spec}'; it must be 'bytes', 'chars', 'bpe:N' with N of"):
        make_tokenizer(spec, list, list)


def test_a_character_without_a_token_is_named() -> None:
    with pytest.raises(ValueError, match="the text has 'é', which the tokenizer has no token for"):
        char_tokenizer(["abc"]).encode("caé")
    with pytest.raises(ValueError, match=r"the text has '\\ud800', which the tokenizer has no token for"):
        BYTES.encode("a\ud800")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer in .*; it must be a folder with tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that the tokenizers library reads"):
        TextTokenizer.load(tmp_path)
