"""How this package and those built of it are compiled, when first called, and on how many threads they run.

Main entries: `compiled`, `parallel`, `shared`, `n_parts`, `Threads`. Importing this imports Numba: half a second.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import config, get_num_threads, njit, set_num_threads, threading_layer, types  # type: ignore[attr-defined]
from numba.core import cgutils, sigutils
from numba.core.event import Event, Listener, register
from numba.extending import intrinsic

_Function = TypeVar("_Function", bound=Callable[..., Any])

_log = logging.getLogger(__name__)

# Sums may be taken in any order, as vector instructions need it; NaN and infinity keep their meaning.
_REORDERED = {"reassoc", "contract", "nsz", "arcp"}

# Loops that say so go to several threads, and nothing else that could.
_LOOPS = {"prange": True, "comprehension": False, "reduction": False, "inplace_binop": False, "setitem": False}
_LOOPS |= {"numpy": False, "stencil": False, "fusion": False}

# Kinds of parameters of shared functions, in Numba's words.
VECTOR, MATRIX, STACK = "float32[::1]", "float32[:, ::1]", "float32[:, :, ::1]"
INDEX, STACK_OF_INDICES = "int64[::1]", "int64[:, :, ::1]"

# Packages whose functions call one another.
_COMPILED = ("arithmetic", "few_rows", "many_rows")

# Multiplications that take about as long as starting threads does.
_WORTH_A_THREAD = 2**15

# glibc gives memory back to the system as soon as more is free than twice the largest piece that it ever mapped and
# freed, up to 32 MB; what a pass needs for a moment then comes back page by page, in every pass. Whoever would rather
# have the memory sets MALLOC_TRIM_THRESHOLD_.
_FREED_ONCE = 31 * 2**20


def compiled(function: _Function, *, threads: bool = False, by_name: bool = False) -> _Function:
    """A function of arrays and numbers, compiled and kept on disk.

    Arrays are best copied number by number there: assigning an array to a slice takes Numba ten seconds to compile.
    """
    options: dict[str, Any] = {
        "fastmath": _REORDERED,
        "error_model": "numpy",
        "no_cfunc_wrapper": not by_name,
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
        if not self._said and module.startswith(__package__.rpartition(".")[0]):
            self._said = True
            _log.warning("Compiling the layers for this processor: once, for about a minute.")

    def on_end(self, event: Event) -> None:
        pass


register("numba:compile", _Notice())


@cache
def _stamp(folder: Path = Path(__file__).parent.parent) -> list[tuple[str, int, int]]:
    """Changes when a file of the packages that are compiled does."""
    files = sorted(file for part in _COMPILED for file in folder.glob(f"{part}/*.py"))
    stats = [(file.name, file.stat()) for file in files]
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]


parallel = partial(compiled, threads=True)
"""The same for one that has `prange`."""


_to_be_named: dict[str, list[Callable[[], None]]] = {package: [] for package in _COMPILED}
"""What gives each package's shared functions their names, where it has not been done yet."""
_naming = Lock()


def shared(*kinds: str | types.Type) -> Callable[[_Function], _Function]:
    """A function that others call by its name, so that it is compiled once and not again with each of them.

    It can be called by compiled functions only, of its own package or any if it is one of `arithmetic`, after
    `Threads.use`, which gives it its name: before that a call ends the process. `kinds` are those of its parameters, in
    Numba's words or as its types; it returns nothing.
    """

    def wrap(function: _Function) -> _Function:
        arguments, returned = sigutils.normalize_signature(types.void(*(_kind(kind) for kind in kinds)))
        name = f"{function.__module__}.{function.__qualname__}"
        dispatcher: Any = compiled(function, by_name=True)

        def give_name() -> None:
            dispatcher.compile(arguments)
            found = dispatcher.get_compile_result(returned(*arguments))
            address = found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name)
            llvmlite.binding.add_symbol(name, address)

        def call(_context: Any, *_arguments: Any) -> Any:
            def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
                kind = ir.FunctionType(ir.VoidType(), [context.get_value_type(argument) for argument in arguments])
                builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)
                return context.get_dummy_value()

            return returned(*arguments), generate

        context = inspect.Parameter("_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(function).parameters.values()
        call.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
        _to_be_named[function.__module__.split(".")[-2]].append(give_name)
        return intrinsic(call)  # type: ignore[return-value]

    return wrap


def _kind(kind: str | types.Type) -> types.Type:
    if isinstance(kind, types.Type):
        return kind
    (parsed,), _ = sigutils.normalize_signature(f"void({kind})")
    return parsed


def _name_all(package: str) -> None:
    with _naming:
        while waiting := _to_be_named[package]:  # in the order in which they were written: some call others
            waiting[0]()
            del waiting[0]


@compiled
def n_parts(multiplications: int, threads: int) -> int:
    """Into how many parts so much work is best divided."""
    return min(threads, 1 + multiplications // _WORTH_A_THREAD)


class Threads:
    """How many threads run the loops of compiled functions."""

    n: int
    lock: AbstractContextManager[object]
    """To be held while they run."""

    def use(self, package: str = "arithmetic") -> bool:
        """Let what this thread calls of a package run, on as many threads as PyTorch does, where there are as many.

        What it shares is then compiled. False, and nothing may be called, in a process forked from one that had started
        its threads.
        """
        pid, most, self.lock = _start()
        if pid != os.getpid():
            return False
        self.n = min(torch.get_num_threads(), most)
        if get_num_threads() != self.n:
            set_num_threads(self.n)
        for needed in ("arithmetic", package):
            if _to_be_named[needed]:
                _name_all(needed)
        return True


@cache
def _start() -> tuple[int, int, AbstractContextManager[object]]:
    """Start Numba's threads: of which process they are, how many, and what to hold while they run."""
    np.empty(_FREED_ONCE, np.uint8)  # and at once it is freed: that is all that it is for
    before = torch.get_num_threads()
    set_num_threads(1)
    torch.set_num_threads(before)  # Numba's threads may be those of PyTorch, and then it has changed their number
    alone = threading_layer() == "workqueue"  # it ends the process when two threads use it at a time
    return os.getpid(), int(config.NUMBA_NUM_THREADS), Lock() if alone else nullcontext()  # type: ignore[attr-defined]
