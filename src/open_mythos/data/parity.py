"""Cumulative parity: after every bit, is the number of ones so far odd?

Main entry: `Parity`.
"""

from __future__ import annotations

from dataclasses import dataclass

from open_mythos.data.sums import RunningSums


@dataclass(frozen=True)
class Parity(RunningSums):
    """Running sums modulo 2: ids are 1 and 2 for the bits 0 and 1, targets 1 plus the parity of the bits so far."""

    modulus: int = 2
