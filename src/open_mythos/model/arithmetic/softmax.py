"""Softmax and its gradient for as many queries as a register has numbers, in LLVM's own terms.

Main entries: `weigh`, `weigh_back`. An array is followed by where in it to begin. Scores are a row for each of n keys,
so many numbers apart as `row` says, and a column for each query: a register has one of each, and nothing is ever summed
up across a register. Queries come in groups of `group` columns that see the same keys: column c sees key j if
`age + c - j * group`, how many columns it is behind the first that sees it, is at least 0 and less than `reach`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from open_mythos.model.arithmetic.exponential import exponential, logarithm
from open_mythos.model.arithmetic.registers import REGISTER, WIDE, read, repeated, start_of, write

_NUMBER = ir.IntType(32)
_NUMBERS = ir.VectorType(_NUMBER, WIDE)
_ZEROS, _LEAST = ir.Constant(REGISTER, 0.0), ir.Constant(REGISTER, -math.inf)


def _weigh(
    _context: Any, scores: Any, first: Any, row: Any, n: Any, age: Any, group: Any, reach: Any, logs: Any, logs_at: Any
) -> Any:
    """Weights in place of the scores, 0 where a key is not seen; the logarithms of their sums to `logs`.

    Before, these are logits of what each query sees besides.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, logs = (start_of(context, builder, signature, args, k) for k in (0, 7))
        keys, logit = args[2:7], read(builder, logs)
        most = cgutils.alloca_once_value(builder, logit)
        with _each_key(builder, *keys) as (place, seen):
            score = builder.select(seen, read(builder, builder.gep(scores, [place])), _LEAST)
            higher = builder.fcmp_ordered(">", score, builder.load(most))
            builder.store(builder.select(higher, score, builder.load(most)), most)
        most = builder.load(most)
        total = cgutils.alloca_once_value(builder, exponential(builder, builder.fsub(logit, most)))
        with _each_key(builder, *keys) as (place, seen):
            target = builder.gep(scores, [place])
            weight = _weight(builder, target, most, seen)
            write(builder, weight, target)
            builder.store(builder.fadd(builder.load(total), weight), total)
        total = builder.load(total)
        write(builder, builder.fadd(most, logarithm(builder, total)), logs)
        part = builder.fdiv(ir.Constant(REGISTER, 1.0), total)
        with _each_key(builder, *keys) as (place, _):
            target = builder.gep(scores, [place])
            write(builder, builder.fmul(read(builder, target), part), target)
        return context.get_dummy_value()

    return types.void(scores, first, row, n, age, group, reach, logs, logs_at), generate


weigh: Callable[..., None] = intrinsic(_weigh)  # type: ignore[assignment]


def _weigh_back(
    _context: Any,
    scores: Any,
    first: Any,
    grads: Any,
    grads_at: Any,
    row: Any,
    n: Any,
    age: Any,
    group: Any,
    reach: Any,
    logits: Any,
    logits_at: Any,
    logs: Any,
    logs_at: Any,
) -> Any:
    """Weights again in place of the scores; the scores' gradients in place of the weights', the logits' in theirs."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, grads, logits, logs = (start_of(context, builder, signature, args, k) for k in (0, 2, 9, 11))
        keys, log = args[4:9], read(builder, logs)
        mean = cgutils.alloca_once_value(builder, _ZEROS)
        with _each_key(builder, *keys) as (place, seen):
            target = builder.gep(scores, [place])
            weight = _weight(builder, target, log, seen)
            write(builder, weight, target)
            grad = builder.select(seen, read(builder, builder.gep(grads, [place])), _ZEROS)
            builder.store(builder.fadd(builder.load(mean), builder.fmul(weight, grad)), mean)
        mean = builder.load(mean)
        with _each_key(builder, *keys) as (place, seen):
            weight, target = read(builder, builder.gep(scores, [place])), builder.gep(grads, [place])
            grad = builder.fmul(weight, builder.fsub(read(builder, target), mean))
            write(builder, builder.select(seen, grad, _ZEROS), target)
        weight = exponential(builder, builder.fsub(read(builder, logits), log))
        write(builder, builder.fneg(builder.fmul(weight, mean)), logits)
        return context.get_dummy_value()

    where = scores, first, grads, grads_at, row, n, age, group, reach, logits, logits_at, logs, logs_at
    return types.void(*where), generate


weigh_back: Callable[..., None] = intrinsic(_weigh_back)  # type: ignore[assignment]


@contextmanager
def _each_key(builder: Any, row: Any, n: Any, age: Any, group: Any, reach: Any) -> Iterator[tuple[Any, Any]]:
    """What is inside is done for every key: told where its row begins, and a mask of the queries that see it."""
    columns, bound = (
        ir.Constant(_NUMBERS, list(range(WIDE))),
        repeated(builder, builder.trunc(reach, _NUMBER), _NUMBERS),
    )
    with cgutils.for_range(builder, n) as loop:
        behind = builder.trunc(builder.sub(age, builder.mul(loop.index, group)), _NUMBER)
        behind = builder.add(columns, repeated(builder, behind, _NUMBERS))
        # Without a sign, what is less than 0 is more than any bound.
        yield builder.mul(loop.index, row), builder.icmp_unsigned("<", behind, bound)


def _weight(builder: Any, score: Any, by: Any, seen: Any) -> Any:
    """The exponential of the scores that lie there, less so much, where they are seen."""
    return builder.select(seen, exponential(builder, builder.fsub(read(builder, score), by)), _ZEROS)
