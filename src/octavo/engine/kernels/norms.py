"""A tensor brought to length 1."""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from octavo.engine.kernels.launch import Kernel, inner, lane_kernel, refuse
from octavo.engine.kernels.memory import contiguous, fast, like
from octavo.engine.tensor import Tensor
from octavo.kernels.memory import at, wide_vectors

__all__ = ["unit"]

WIDTH = 16
"""Sums that are kept apart, so that they fill vectors; they are added in turn."""


@inner
def _squares(x, sums):
    """Add the squares to WIDTH sums in float64."""
    wide_vectors()
    for row in range(x.size // WIDTH):
        for j in range(WIDTH):
            number = np.float64(x[row * WIDTH + j])
            sums[j] += number * number
    for j in range(x.size // WIDTH * WIDTH, x.size):
        sums[0] += np.float64(x[j]) * np.float64(x[j])


@lane_kernel
def _unit(address, lane, lanes):
    """x, out, size: for one lane."""
    wide_vectors()
    x, out, size = carray(at(address), (3,), np.int64)
    source, into = carray(at(x), (size,), np.float32), carray(at(out), (size,), np.float32)
    sums = np.zeros(WIDTH, np.float64)
    _squares(source, sums)
    total = 0.0
    for j in range(WIDTH):
        total += sums[j]
    factor = 1 / math.sqrt(total) if total != 0 else 0.0
    for i in range(size):
        into[i] = np.float32(np.float64(source[i]) * factor)


_unit_kernel = Kernel("unit", _unit, "<3q")


def unit(x: Tensor) -> Tensor:
    """Compiled for float32, by NumPy for the rest."""
    if x.dtype.kind != "f":
        raise ValueError(f"octavo::unit takes floating-point numbers; got {x.dtype}: convert them first")
    x = contiguous(x)
    out = like(x)
    if fast(x):
        _unit_kernel(1, x.address, out.address, x.size)
    else:
        refuse(f"unit of {x.dtype} runs in NumPy")
        norm = np.linalg.norm(x.array.astype(np.float64))
        np.multiply(x.array, 1 / norm if norm != 0 else 0.0, out=out.array, casting="same_kind")
    return out
