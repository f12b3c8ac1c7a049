"""A text on the screen as it is made, each token in the colour of its depth if asked for.

Main entry: `Display`. Standard output gets the text and nothing else; what is said about it goes to standard error.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from itertools import pairwise
from math import log

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.inference.engine import Event, Stats

_SCALE = ((58, 134, 200), (38, 157, 142), (120, 160, 50), (214, 140, 30), (222, 84, 56), (200, 60, 130))
"""From one loop to the most, blue to red: of like lightness, to be read on dark and on light."""
_STEPS = 8
"""Up to so many depths, a legend has an entry for each."""


class Display:
    """Writes one text."""

    def __init__(self, tokenizer: TextTokenizer, n_loops: int, show_exits: bool) -> None:
        self._out, self._notes = Console(highlight=False), Console(stderr=True, highlight=False)
        self._n_loops, self._show_exits = n_loops, show_exits
        self._pieces, self._stream = deque[tuple[str, int]](), tokenizer.stream()
        self._exits: list[int] = []

    def begin(self, prompt: str) -> None:
        """Write the prompt, behind a legend of the colours."""
        if self._show_exits:
            self._notes.print(self._legend("loops per token"), end="\n\n")
        self._write(prompt, Style(bold=True))

    def show(self, event: Event) -> None:
        """Write what has become certain of the text."""
        if event.token is not None and event.exit_loops is not None:
            self._exits.append(event.exit_loops)
            self._pieces.append((self._stream.push(event.token), event.exit_loops))
        if not self._show_exits:
            self._write(event.text or "", Style())
            return
        for text, loops in self._by_depth(event.text or ""):
            self._write(text, depth_style(loops, self._n_loops))

    def end(self, stats: Stats) -> None:
        """End the line, and say how deep and how fast it was."""
        self._write("\n", Style())
        if self._show_exits:
            mean = sum(self._exits) / len(self._exits)
            told = f"mean {mean:.2f} of at most {self._n_loops} loops"
            self._notes.print("", self._legend(told, Counter(self._exits)), sep="\n")
        if self._notes.is_terminal:
            self._notes.print(summary(stats, self._exits))

    def _by_depth(self, text: str) -> list[tuple[str, int]]:
        """The text in pieces, each with the loops of its token: some of it may be of tokens before the last one."""
        parts = []
        while text and self._pieces:
            piece, loops = self._pieces.popleft()
            part, rest = piece[: len(text)], piece[len(text) :]
            parts.append((part, loops))
            text = text[len(part) :]
            if rest:
                self._pieces.appendleft((rest, loops))
        return [*parts, (text, self._exits[-1])] if text else parts

    def _write(self, text: str, style: Style) -> None:
        if self._out.is_terminal:
            self._out.print(Text(text, style), end="", soft_wrap=True)
        else:  # nothing may change the text
            print(text, end="", flush=True)

    def _legend(self, told: str, counts: Counter[int] | None = None) -> Text:
        """A block of every depth's colour; with counts, the share of each that occurs."""
        legend, ranges = Text().append(told, "dim"), _ranges(self._n_loops)
        if counts is not None and len(counts) <= _STEPS:
            ranges = [(loops, loops) for loops in sorted(counts)]
        for low, high in ranges:
            name = f" {low}" if low == high else f" {low}-{high}"
            if counts is not None:
                found = sum(counts[loops] for loops in range(low, high + 1))
                if not found:
                    continue
                name += f": {found / counts.total():.0%}"
            legend.append("  ■", depth_style((low * high) ** 0.5, self._n_loops)).append(name, "dim")
        return legend


def depth_style(loops: float, n_loops: int) -> Style:
    """The colour of a depth between one loop and `n_loops`, by its logarithm: most tokens stop after a few."""
    at = log(loops) / log(max(2, n_loops)) * (len(_SCALE) - 1)
    low = min(int(at), len(_SCALE) - 2)
    mixed = (a + (b - a) * (at - low) for a, b in zip(_SCALE[low], _SCALE[low + 1], strict=True))
    return Style(color=Color.from_rgb(*map(round, mixed)))


def summary(stats: Stats, exits: Sequence[int]) -> Text:
    """Speed and depth in one line."""
    loops = sum(exits) / max(1, len(exits))
    told = f"{len(exits)} tokens in {stats.seconds:.1f} s, {stats.tokens_per_second:.1f} tokens/s"
    return Text(f"{told}, {loops:.2f} loops per token", "dim")


def _ranges(n_loops: int) -> list[tuple[int, int]]:
    """Depths 1 to `n_loops` in ranges: each by itself where they are few, otherwise two ranges for every doubling."""
    if n_loops <= _STEPS:
        return [(loops, loops) for loops in range(1, n_loops + 1)]
    ends = [1, 2, *(end for octave in range(1, n_loops.bit_length()) for end in (3 << (octave - 1), 4 << (octave - 1)))]
    ends = [end for end in ends if end < n_loops]
    return [(low + 1, high) for low, high in pairwise([0, *ends, n_loops])]
