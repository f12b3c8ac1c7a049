"""Serving a trained model: many requests at their own depths, computing only what is needed."""

from open_mythos.inference.engine import Engine, Event, Stats, cache_bytes_needed
from open_mythos.inference.exit import PredictionChange, StableArgmax, StateChange
from open_mythos.inference.long_text import stream_long
from open_mythos.inference.request import Output
from open_mythos.inference.sampling import SamplingParams

__all__ = [
    "Engine",
    "Event",
    "Output",
    "PredictionChange",
    "SamplingParams",
    "StableArgmax",
    "StateChange",
    "Stats",
    "cache_bytes_needed",
    "stream_long",
]
