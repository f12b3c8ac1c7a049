"""How the functions of this package are compiled, when first called, and on how many threads they run.

Main entries: `compiled`, `parallel`, `n_parts`, `Threads`. Importing this module imports Numba: half a second.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from numba import config, njit, set_num_threads, threading_layer  # type: ignore[attr-defined]
from numba.core.event import Event, Listener, register

_Function = TypeVar("_Function", bound=Callable[..., Any])

_log = logging.getLogger(__name__)

# Sums may be taken in any order, as vector instructions need it; NaN and infinity keep their meaning.
_REORDERED = {"reassoc", "contract", "nsz", "arcp"}

# Loops that say so go to several threads, and nothing else that could.
_LOOPS = {"prange": True, "comprehension": False, "reduction": False, "inplace_binop": False, "setitem": False}
_LOOPS |= {"numpy": False, "stencil": False, "fusion": False}

# Multiplications that take about as long as starting threads does.
_WORTH_A_THREAD = 2**15


def compiled(function: _Function, *, threads: bool = False) -> _Function:
    """A function of arrays and numbers, compiled and kept on disk.

    Arrays are best copied number by number there: assigning an array to a slice takes Numba ten seconds to compile.
    """
    options: dict[str, Any] = {
        "fastmath": _REORDERED,
        "error_model": "numpy",
        "no_cfunc_wrapper": True,
        "parallel": _LOOPS if threads else False,
    }
    try:
        dispatcher = njit(function, cache=True, **options)
    except RuntimeError:  # there is no folder that a cache could be written to
        return njit(function, **options)  # type: ignore[no-any-return]
    # By itself Numba looks at the function's own file only, and would keep what it calls as it was in another version.
    dispatcher._cache._cache_file._source_stamp = _stamp()
    return dispatcher  # type: ignore[no-any-return]


class _Notice(Listener):
    """Says once why nothing seems to happen."""

    def __init__(self) -> None:
        self._said = False

    def on_start(self, event: Event) -> None:
        module = event.data["dispatcher"].py_func.__module__ or ""
        if not self._said and module.startswith(__package__):
            self._said = True
            _log.warning("Compiling for this processor what computes few positions: once, for up to a minute.")

    def on_end(self, event: Event) -> None:
        pass


register("numba:compile", _Notice())


@cache
def _stamp(folder: Path = Path(__file__).parent) -> list[tuple[str, int, int]]:
    """Changes when one of the package's files does."""
    stats = [(file.name, file.stat()) for file in sorted(folder.glob("*.py"))]
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]


parallel = partial(compiled, threads=True)
"""The same for one that has `prange`."""


@compiled
def n_parts(multiplications: int, threads: int) -> int:
    """Into how many parts so much work is best divided."""
    return min(threads, 1 + multiplications // _WORTH_A_THREAD)


class Threads:
    """How many threads run the loops of this package."""

    n: int
    lock: AbstractContextManager[object]
    """To be held while they run."""

    def use(self) -> bool:
        """Let what this thread calls run on as many threads as PyTorch does, where there are as many.

        False, and nothing may be called, in a process forked from one that had started its threads.
        """
        pid, most, self.lock = _start()
        if pid != os.getpid():
            return False
        self.n = min(torch.get_num_threads(), most)
        set_num_threads(self.n)
        return True


@cache
def _start() -> tuple[int, int, AbstractContextManager[object]]:
    """Start Numba's threads: of which process they are, how many, and what to hold while they run."""
    before = torch.get_num_threads()
    set_num_threads(1)
    torch.set_num_threads(before)  # Numba's threads may be those of PyTorch, and then it has changed their number
    alone = threading_layer() == "workqueue"  # it ends the process when two threads use it at a time
    return os.getpid(), int(config.NUMBA_NUM_THREADS), Lock() if alone else nullcontext()  # type: ignore[attr-defined]
