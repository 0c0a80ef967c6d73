"""Casts to 8 bits on the CPU, whose scales are read from memory and whose amaxes are written there, so that a step can be replayed.

A cast tensor holds the values of its codes, in float32; its scale is undone by the product that it enters.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray

from octavo.engine.kernels.elements import share
from octavo.engine.kernels.launch import Kernel, inner, lane_kernel
from octavo.engine.kernels.memory import lanes_for
from octavo.engine.tensor import Tensor, empty
from octavo.formats import Format
from octavo.kernels.element import I32, MAGNITUDE, _real
from octavo.kernels.loops import _nearest_to_float32
from octavo.kernels.memory import at, atomic_max, wide_vectors
from octavo.kernels.scales import _raise, current_scale, roll_history
from octavo.reference import overflow_codes
from octavo.rounding import Overflow

__all__ = ["cast", "roll", "scale_now"]

F32 = np.float32
PIECE = 4096
"""Numbers cast at a time, in the nearest cache."""


@lane_kernel
def _cast(address, lane, lanes):
    """source, target, size, where the scale is or 0, where the amax goes or 0, five facts of the format, three values of it."""
    source, target, size, scale_at, amax_at, shift, least, limit, zero_sign, _ = carray(at(address), (10,), np.int64)
    top, over, infinite = carray(at(address + 80), (3,), np.float64)
    scale = carray(at(scale_at), (1,), np.float32)[0] if scale_at else F32(1)
    first, count = share(size, lane, lanes)
    peak = I32(0)
    for start in range(first, first + count, PIECE):
        part = min(PIECE, first + count - start)
        x_f = carray(at(source + 4 * start), (part,), np.float32)
        x_i = carray(at(source + 4 * start), (part,), np.int32)
        out = carray(at(target + 4 * start), (part,), np.float32)
        seen = _nearest_to_float32(
            x_f,
            x_i,
            out,
            scale,
            F32(1),
            I32(shift),
            I32(least),
            I32(limit),
            F32(top),
            F32(over),
            F32(infinite),
            I32(zero_sign),
        )
        peak = max(peak, seen)
    if amax_at and count > 0:
        atomic_max(amax_at, np.int64(peak))


@inner
def _peak(bits):
    wide_vectors()
    peak = I32(0)
    for i in range(bits.size):
        peak = max(peak, I32(bits[i] & MAGNITUDE))
    return peak


@lane_kernel
def _amax(address, lane, lanes):
    """source, size, where the amax goes (int64, raised to it as float32 bits)."""
    source, size, amax_at = carray(at(address), (3,), np.int64)
    first, count = share(size, lane, lanes)
    if count > 0:
        atomic_max(amax_at, np.int64(_peak(carray(at(source + 4 * first), (count,), np.int32))))


@lane_kernel
def _current(address, lane, lanes):
    """where the amax is, set to 0; where the scale goes; whether a power of two; format.max and epsilon, float64."""
    amax_at, scale_at, power_of_two = carray(at(address), (3,), np.int64)
    maximum, epsilon = carray(at(address + 24), (2,), np.float64)
    cell = carray(at(amax_at), (1,), np.int64)
    scale = current_scale(_real(I32(cell[0])), maximum, epsilon, power_of_two != 0)
    carray(at(scale_at), (1,), np.float32)[0] = F32(scale)
    cell[0] = 0


@lane_kernel
def _roll(address, lane, lanes):
    """history, steps, tensors, scales, where amaxes are (set to 0), maxima, whether by the most recent; 2**-margin, float64."""
    history, steps, tensors, scale, cells, maxima, most_recent = carray(at(address), (7,), np.int64)
    margin = carray(at(address + 56), (1,), np.float64)[0]
    rows = carray(at(history), (steps, tensors), np.float32)
    amaxes, found = np.empty(tensors, np.float32), carray(at(cells), (tensors,), np.int64)
    for t in range(tensors):
        amaxes[t] = _real(I32(found[t]))
        found[t] = 0
    _raise(rows[0], amaxes)
    scales = carray(at(scale), (tensors,), np.float32)
    roll_history(rows, scales.copy(), scales, carray(at(maxima), (tensors,), np.float32), margin, most_recent != 0)


cast_kernel = Kernel("cast", _cast, "<10q3d")
amax_kernel = Kernel("amax", _amax, "<3q")
current_kernel = Kernel("current_scale", _current, "<3q2d")
roll_kernel = Kernel("roll_history", _roll, "<7qd")


@functools.lru_cache(maxsize=256)
def _facts(format: Format, overflow: Overflow) -> tuple[Any, ...]:
    """What the cast needs to know of a format, rounding to nearest even; see `octavo.kernels.loops`."""
    m = format.mantissa_bits
    finite, infinite = overflow_codes(format, overflow)
    values = format.values
    limit = ((format.max_code >> m) - format.bias + 129) << 23
    sign = -0x80000000 if format.has_negative_zero else 0
    facts = ((23 - m) << 23, (128 - format.bias) << 23, limit, sign, 0)
    return (*facts, float(values[format.max_code]), float(values[finite]), float(values[infinite]))


def cast(x: Tensor, format: Format, overflow: Overflow, *, scale: int, amax: int) -> Tensor:
    """The values of `encode(x * scale)`, to nearest even: float32, of x's shape.

    x: contiguous float32.  scale: the address of a float32, or 0 for 1.  amax: of an int64 that is raised to the bits of amax(|x|), as a
    float32, NaN above Inf; or 0.
    """
    out = empty(x.shape)
    cast_kernel(lanes_for(x.size), x.address, out.address, x.size, scale, amax, *_facts(format, overflow))
    return out


def scale_now(x: Tensor, maximum: float, epsilon: float, power_of_two: bool, *, cell: int, scale: int) -> None:
    """Write the scale of current scaling of x to `scale`, by way of the int64 at `cell`, which is 0 before and after."""
    amax_kernel(lanes_for(x.size), x.address, x.size, cell)
    current_kernel(1, cell, scale, power_of_two, maximum, epsilon)


def roll(history: Tensor, scales: Tensor, amaxes: Tensor, maxima: Tensor, margin: float, most_recent: bool) -> None:
    """`octavo.scaling.roll_history` in place, of the amaxes gathered in int64 [tensors], which become 0.

    history: float32 [steps, tensors]; scales, maxima: float32 [tensors]; margin: 2**-margin.
    """
    steps, tensors = history.shape
    addresses = scales.address, amaxes.address, maxima.address
    roll_kernel(1, history.address, steps, tensors, *addresses, most_recent, margin)
