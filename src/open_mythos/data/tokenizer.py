"""Text to ids and back.

Main entries: `TextTokenizer`, a thin wrapper around `tokenizers.Tokenizer` that knows its end-of-text token, and
`TextStream`, which decodes ids as they come. Special tokens spelled out in a text are encoded as ordinary text, so no
document can forge the end of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end▁of▁sentence|>")
"""Tokens that end a text in the tokenizers of the ecosystem; the first that a tokenizer has is taken."""


class TextTokenizer:
    """A `tokenizers.Tokenizer` with an end-of-text token; one that has none of the common names is given one.

    `vocab_size` is one more than the largest id, `end_of_text` the id of that token, `fingerprint` a hash of it all.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not any(tokenizer.token_to_id(name) is not None for name in END_OF_TEXT_NAMES):
            tokenizer.add_special_tokens([END_OF_TEXT])
        tokenizer.encode_special_tokens = True
        vocab = tokenizer.get_vocab()
        ids = list(vocab.values())
        self.tokenizer = tokenizer
        self.vocab_size = max(ids) + 1
        self.end_of_text = next(vocab[name] for name in END_OF_TEXT_NAMES if name in vocab)
        if ids.count(self.end_of_text) > 1:  # the library gives the first id after as many as there are tokens
            raise ValueError("the tokenizer's ids have gaps and no end of text; give it one of its own")
        self.fingerprint = sha256(tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with no token added; `ValueError` naming the first character that has none."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts; much faster than one by one."""
        try:
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception for an unknown token, TypeError for surrogates
            raise self._explained(texts, error) from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; special tokens have none, and bytes that are not UTF-8 give U+FFFD."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A decoder for ids that come one at a time."""
        return TextStream(self)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` into a folder, beside its place and then moved there."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f".{TOKENIZER_FILE}.partial"
        try:
            self.tokenizer.save(str(partial))
        except Exception as error:  # the library raises bare Exception
            raise OSError(f"{directory / TOKENIZER_FILE} could not be written: {error}") from error
        partial.replace(directory / TOKENIZER_FILE)

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """The tokenizer of a folder with a `tokenizer.json`, or of such a file."""
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no tokenizer in {path}; it must be a folder with {TOKENIZER_FILE}, or its file")
        try:
            return cls(Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from error

    def _explained(self, texts: Sequence[str], error: Exception) -> ValueError:
        characters = sorted(set().union(*texts))
        unknown = [c for c in characters if "\ud800" <= c <= "\udfff" or self.tokenizer.token_to_id(c) is None]
        if not unknown:
            return ValueError(f"the text cannot be encoded: {error}")
        return ValueError(
            f"the text has {unknown[0]!r}, which the tokenizer has no token for; it must consist of characters that "
            "were in the data the tokenizer was made from (a 'bytes' or 'bpe:N' tokenizer takes any text)"
        )


class TextStream:
    """Text of ids that come one at a time: the parts, `finish` included, join to what `decode` gives for all of them.

    A character can be spread over several ids, so a part is held back while it ends in an unfinished character. Each
    part is decoded behind the one before it, because some tokenizers drop a space at the start of a text.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._held.append(token)
        text = self._text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._before, self._held = self._held, []
        return text

    @property
    def readable(self) -> str:
        """The whole characters of what is held back."""
        return self._text().rstrip("\ufffd") if self._held else ""

    def finish(self) -> str:
        """What is still held back."""
        text = self._text()
        self._before, self._held = [], []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._held)[len(before) :]
