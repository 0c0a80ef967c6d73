"""Chains of kernels in one call from Python: the casts of a small layer, the scales between them and its matrix products.

A chain is one piece of memory: a head (`Head`), a step (`Step`) for each kernel, and the kernels' own arguments, found by their
distance from the start so that the memory can be copied for each call.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from octavo.kernels.loops import AMAX, F32, SCALE, _bits64, _real64, kernel
from octavo.kernels.memory import at as _at
from octavo.kernels.scales import current_scale

__all__ = ["Between", "Head", "Product", "Step", "between", "chain", "product"]


class Head(enum.IntEnum):
    """What a chain starts with."""

    PARALLEL = 0
    """The address of `GOMP_parallel`."""
    STEPS = 1
    """How many steps follow."""


class Step(enum.IntEnum):
    """A step, `Step.WORDS` words from the head or the step before."""

    KERNEL = 0
    ARGUMENTS = 1
    """Bytes from the start of the chain."""
    THREADS = 2
    WORDS = 3


class Between(enum.IntEnum):
    """Arguments of `between`: where they lie is in bytes from this block."""

    FROM = 0
    """The arguments of an `amax` that ran."""
    TO = 1
    """The arguments of the cast that will take its scale from there."""
    MAXIMUM = 2
    EPSILON = 3
    POWER_OF_TWO = 4


class Product(enum.IntEnum):
    """Arguments of `product`: C[m, n] = factor / scale / scale * A @ B + bias, of bfloat16 operands, in float32."""

    GEMM = 0
    """The address of `cblas_gemm_bf16bf16f32`."""
    A_ORDER = 1
    B_ORDER = 2
    M = 3
    N = 4
    K = 5
    A_STRIDE = 6
    B_STRIDE = 7
    FIRST = 8
    """Bytes from this block to the arguments of a cast whose scale is undone; 0 for none."""
    SECOND = 9
    A = 10
    B = 11
    C = 12
    BIAS = 13
    """An address, or 0."""
    FACTOR = 14


PARALLEL, STEPS = int(Head.PARALLEL), int(Head.STEPS)
KERNEL, ARGUMENTS, THREADS, WORDS = (int(slot) for slot in Step)
FROM, TO, MAXIMUM, EPSILON, POWER_OF_TWO = (int(slot) for slot in Between)
GEMM, A_ORDER, B_ORDER, M, N, K, A_STRIDE, B_STRIDE, FIRST, SECOND, A, B, C, BIAS, FACTOR = (int(s) for s in Product)


def _caller(returns_nothing_of: str) -> Any:
    """A compiled `f(address, *arguments)` that calls the C function there; one letter an argument: i int32, f float32, p int64."""
    letters = {"i": ir.IntType(32), "f": ir.FloatType(), "p": ir.IntType(64)}
    seen = {"i": types.int32, "f": types.float32, "p": types.int64}

    @intrinsic
    def call(typing_context, address, arguments):
        def generate(context, builder, signature, values):
            kinds = [letters[letter] for letter in returns_nothing_of]
            function = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), kinds).as_pointer())
            builder.call(function, [builder.extract_value(values[1], i) for i in range(len(kinds))])
            return context.get_dummy_value()

        return types.void(types.int64, types.Tuple([seen[letter] for letter in returns_nothing_of])), generate

    return call


_call, _call_parallel, _call_gemm = _caller("p"), _caller("ppii"), _caller("iiiiiifpipifpi")


@kernel
def chain(address):
    """Run each step and wait for it."""
    head = carray(_at(address), (2,), np.int64)
    for step in range(head[STEPS]):
        p = carray(_at(address + 16 + 8 * WORDS * step), (WORDS,), np.int64)
        if p[THREADS] > 1:
            _call_parallel(head[PARALLEL], (p[KERNEL], address + p[ARGUMENTS], np.int32(p[THREADS]), np.int32(0)))
        else:
            _call(p[KERNEL], (address + p[ARGUMENTS],))


@kernel
def between(address):
    """The scale of a tensor's own amax, from the amax kernel to the cast."""
    p = carray(_at(address), (5,), np.int64)
    amax = carray(_at(address + p[FROM]), (AMAX + 1,), np.int64)[AMAX]
    scale = current_scale(
        np.int32(amax).view(np.float32), _real64(p[MAXIMUM]), _real64(p[EPSILON]), p[POWER_OF_TWO] != 0
    )
    carray(_at(address + p[TO]), (SCALE + 1,), np.int64)[SCALE] = _bits64(scale)


@kernel
def product(address):
    """A matrix product on oneMKL's bfloat16 units."""
    p = carray(_at(address), (FACTOR + 1,), np.int64)
    factor = _real64(p[FACTOR])
    for slot in (FIRST, SECOND):
        if p[slot]:
            scale = _real64(carray(_at(address + p[slot]), (SCALE + 1,), np.int64)[SCALE])
            factor *= np.float64(F32(1.0 / scale))
    c = carray(_at(p[C]), (p[M], p[N]), np.float32)
    if p[BIAS]:
        bias = carray(_at(p[BIAS]), (p[N],), np.float32)
        for i in range(p[M]):
            c[i] = bias
    i32 = np.int32
    _call_gemm(
        p[GEMM],
        (
            i32(101),
            i32(p[A_ORDER]),
            i32(p[B_ORDER]),
            i32(p[M]),
            i32(p[N]),
            i32(p[K]),
            F32(factor),
            p[A],
            i32(p[A_STRIDE]),
            p[B],
            i32(p[B_STRIDE]),
            F32(1.0) if p[BIAS] else F32(0.0),
            p[C],
            i32(p[N]),
        ),
    )
