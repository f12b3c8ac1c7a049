"""The tokenizer that a word on the command line names: made from the data, or opened.

Main entry: `make_tokenizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from open_mythos.data.tokenizer import TOKENIZER_FILE, TextTokenizer

ACCEPTED = (
    "'bytes', 'chars', 'bpe:N' with N of at least 257, a folder with a tokenizer.json, such a file, or the name of a "
    "tokenizer on the Hugging Face hub"
)
Texts = Callable[[], Iterable[str]]


def make_tokenizer(spec: str, train: Texts, everything: Texts) -> TextTokenizer:
    """The tokenizer that a spec names; `train` and `everything` give the documents that some of them are made from.

    - `bytes`: ids 0 to 255 are the bytes of UTF-8, 256 ends a text; encodes every text without loss.
    - `chars`: one id per character of all documents, sorted, held-out ones too so that they can be encoded; the next
      id ends a text. A character that is not among them is an error.
    - `bpe:N`: byte pairs merged in the training documents until there are N entries, 256 bytes and the end of text
      included (fewer where the documents are too small); encodes every text without loss.
    - a folder or file: a `tokenizer.json` of the tokenizers library.
    - anything else: the name of a tokenizer on the Hugging Face hub.
    """
    if spec == "bytes":
        return byte_tokenizer()
    if spec == "chars":
        return char_tokenizer(everything())
    if spec.startswith("bpe:"):
        return bpe_tokenizer(train(), bpe_size(spec))
    if Path(spec).exists():
        return TextTokenizer.load(spec)
    try:
        return TextTokenizer(Tokenizer.from_pretrained(spec))
    except Exception as error:  # the library raises bare Exception, whether the name, the network or the file is wrong
        raise ValueError(f"tokenizer is {spec!r}, and the hub does not give it ({error}); it must be {ACCEPTED}") from (
            error
        )


def resolve_tokenizer(spec: str) -> str:
    """The spec with the path of a file or folder made absolute, so that it means the same from everywhere."""
    if spec in ("bytes", "chars"):
        return spec
    if spec.startswith("bpe:"):
        return f"bpe:{bpe_size(spec)}"
    path = Path(spec).expanduser()
    return str(path.resolve()) if path.exists() else spec


def tokenizer_files(spec: str) -> list[Path]:
    """The file that a resolved spec names, if it names one that is there."""
    path = Path(spec)
    if not path.is_absolute():
        return []
    return [file for file in (path, path / TOKENIZER_FILE) if file.is_file()]


def bpe_size(spec: str) -> int:
    """The N of `bpe:N`."""
    number = spec.removeprefix("bpe:")
    if not (number.isascii() and number.isdigit() and int(number) >= 257):
        raise ValueError(f"tokenizer is {spec!r}; it must be {ACCEPTED}")
    return int(number)


def byte_tokenizer() -> TextTokenizer:
    """A token per byte of UTF-8, each with the byte's value as its id."""
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    return TextTokenizer(_byte_level(models.BPE(vocab=vocab, merges=[]), words=False))


def char_tokenizer(documents: Iterable[str]) -> TextTokenizer:
    """A token per character that the documents have, sorted."""
    characters: set[str] = set()
    for document in documents:
        characters.update(document)
    vocab = {character: index for index, character in enumerate(sorted(characters))}
    # Its unknown token is not in the vocabulary: the library then refuses an unknown character instead of hiding it.
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return TextTokenizer(tokenizer)


def bpe_tokenizer(documents: Iterable[str], size: int) -> TextTokenizer:
    """Byte-level byte-pair encoding, with words split as GPT-2 does; the end of text is its last entry."""
    tokenizer = _byte_level(models.BPE(), words=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return TextTokenizer(tokenizer)


def _byte_level(model: models.Model, words: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers, as GPT-2 chose them.

    A byte that is a printable character of Latin-1 stands for itself; the others take the code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
