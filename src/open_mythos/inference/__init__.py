"""Serving a trained model: many requests at their own depths, computing only what is needed."""

from open_mythos.inference.cache import cache_bytes_needed
from open_mythos.inference.engine import Engine, Event, Stats
from open_mythos.inference.exit import PredictionChange, StableArgmax, StateChange
from open_mythos.inference.long_text import stream_long
from open_mythos.inference.request import Output
from open_mythos.inference.sampling import SamplingParams
from open_mythos.inference.speculation import Speculation
from open_mythos.model.cache_sharing import EveryLoop, FirstLoops, Modulo

__all__ = [
    "Engine",
    "Event",
    "EveryLoop",
    "FirstLoops",
    "Modulo",
    "Output",
    "PredictionChange",
    "SamplingParams",
    "Speculation",
    "StableArgmax",
    "StateChange",
    "Stats",
    "cache_bytes_needed",
    "stream_long",
]
