"""The text of a request's new tokens, as they come, up to the first stop string.

Main entry: `DecodedText`.
"""

from __future__ import annotations

from collections.abc import Sequence

from open_mythos.data.tokenizer import TextTokenizer


class DecodedText:
    """Hands out text once it is certain: whole characters that cannot turn out to be the beginning of a stop string.

    What `push` and `finish` return joins to the text before the stop string, or to all of it where none came.
    """

    def __init__(self, tokenizer: TextTokenizer, stop_strings: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string has come; nothing more is taken then."""
        self._stream, self._stops = tokenizer.stream(), tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._kept = ""
        """What has not been handed out."""

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        if self.stopped:
            return ""
        self._kept += self._stream.push(token)
        readable = self._kept + self._stream.readable
        found = [at for at in (readable.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._hand_out(readable[: min(found)])
        certain = len(self._kept) - self._suspect()
        text, self._kept = self._kept[:certain], self._kept[certain:]
        return text

    def finish(self) -> str:
        """What is still held back."""
        return "" if self.stopped else self._hand_out(self._kept + self._stream.finish())

    def _hand_out(self, text: str) -> str:
        self._kept = ""
        return text

    def _suspect(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        most = min(self._longest - 1, len(self._kept))
        ends = (self._kept[len(self._kept) - n :] for n in range(most, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)
