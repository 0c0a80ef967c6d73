"""Chains of kernels in one call from Python: the casts of a small layer, the scales between them and its matrix products.

A chain is one piece of memory: a head (`Head`), a step (`Step`) for each kernel, and the kernels' own arguments, found by their
distance from the start so that the memory can be copied for each call.
"""

from __future__ import annotations

import enum

import numpy as np
from numba import carray

from octavo.kernels.element import _bits64, _real64, kernel
from octavo.kernels.loops import AMAX, SCALE
from octavo.kernels.memory import at as _at
from octavo.kernels.products import caller
from octavo.kernels.scales import current_scale

__all__ = ["Between", "Head", "Step", "between", "chain"]


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


PARALLEL, STEPS = int(Head.PARALLEL), int(Head.STEPS)
KERNEL, ARGUMENTS, THREADS, WORDS = (int(slot) for slot in Step)
FROM, TO, MAXIMUM, EPSILON, POWER_OF_TWO = (int(slot) for slot in Between)

_call, _call_parallel = caller("p"), caller("ppii")


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
