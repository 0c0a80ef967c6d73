"""Matrix products added up as Hopper's tensor cores add them: 14-bit sums, bit for bit.

A register holds float32's exponents and 13 fraction bits: a multiple of 2**(max(e, -126) - 13), for e the exponent of its magnitude.
One step takes 32 products along the contracted axis (the last step what is left) to the register r, 0 at first:

    terms   r and the products, each exact
    e       the largest exponent among the terms other than 0, at least -126
    cut     each term toward zero to a multiple of 2**(e - 13)
    sum     of the cut terms, exact
    r       the sum cut toward zero to 14 significant bits; 2**128 and more is Inf; a sum of zero is +0

A NaN among the terms, or Inf of both signs, makes r NaN; Inf of one sign makes it that Inf.  `HOPPER_FAST` is r after the last step.
`HOPPER_SPLIT` starts r again from 0 every 128 elements and adds what it was to a float32, to nearest even.

Sources: DeepSeek-V3, arXiv 2412.19437, sections 3.3.2 (promotion every 128 elements) and 3.5.2 (32 products, aligned to the largest
exponent, 14 bits kept, the rest cut off).  The register is as wide; that it takes part in the alignment is our reading.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from octavo.kernels import threads
from octavo.kernels.element import F32, I32, INF, MAGNITUDE, compiled, kernel
from octavo.kernels.memory import at as _at
from octavo.kernels.memory import atomic_add as _atomic_add
from octavo.kernels.memory import wide_vectors as _wide_vectors
from octavo.table import Accumulator

__all__ = ["matmul"]

STEP, SPLIT = 32, 128
"""Products that meet the register at once, and elements between two additions in float32."""
LANES, ROWS, UNROLL = 64, 16, 8
"""Columns of the result in a tile, rows that a thread takes at a time, products handled between two looks at a tile's state."""
SERIAL = 1 << 20
"""Below this many multiplications waking a second thread costs more than it saves."""


class Slot(enum.IntEnum):
    """Where each of the kernel's arguments lies: addresses, sizes, and the counter from which threads draw their work."""

    LEFT = 0
    RIGHT = 1
    RESULT = 2
    M = 3
    TILES = 4
    STEPS = 5
    STEPS_TO_SPLIT = 6
    NEXT = 7


# Numba takes module-level integers as constants, but not the members of an enum.
LEFT, RIGHT, RESULT, M, TILES, STEPS, STEPS_TO_SPLIT, NEXT = (int(slot) for slot in Slot)
SLOTS = len(Slot)

I64, F64 = np.int64, np.float64
LOWEST = I32(27 << 23)
"""2**-100, under which 2**(13 - e) may leave float32: `_meet` passes such terms on to `_meet_apart`."""


@compiled
def _bits(value):
    return F32(value).view(np.int32)


@compiled
def _real(bits):
    return I32(bits).view(np.float32)


@compiled
def _peaks(a, b, register, peaks):
    """The bits of each column's largest |term|, which order as magnitudes do, NaN on top; whether one calls for `_meet_apart`."""
    _wide_vectors()
    for n in range(LANES):
        peaks[n] = _bits(register[n]) & MAGNITUDE
    for k in range(0, STEP, UNROLL):
        part, rows = a[k : k + UNROLL], b[k * LANES : (k + UNROLL) * LANES]
        for n in range(LANES):
            peak = peaks[n]
            for j in range(UNROLL):
                peak = max(peak, I32(_bits(part[j] * rows[j * LANES + n]) & MAGNITUDE))
            peaks[n] = peak
    apart = I32(0)
    for n in range(LANES):
        apart |= I32(peaks[n] >= INF) | (I32(peaks[n] < LOWEST) & I32(peaks[n] != I32(0)))
    return apart != I32(0)


@compiled
def _meet(a, b, register, peaks, sums):
    """One step of a row against LANES columns.

    In units of 2**(e - 13) a cut term is an integer below 2**14 and a sum of 33 one below 2**20, so int32 adds them exactly and float32
    holds them; the factors are powers of two, and their quotients normal or far below the unit, so cutting is the one rounding.
    """
    _wide_vectors()
    for n in range(LANES):
        e = max(I32(peaks[n] & INF), LOWEST)
        peaks[n] = e
        sums[n] = I32(register[n] * _real(I32(267 << 23) - e))  # 267 = 2 * 127 + 13
    for k in range(0, STEP, UNROLL):
        part, rows = a[k : k + UNROLL], b[k * LANES : (k + UNROLL) * LANES]
        for n in range(LANES):
            units, total = _real(I32(267 << 23) - peaks[n]), sums[n]
            for j in range(UNROLL):
                total = I32(total + I32(part[j] * rows[j * LANES + n] * units))
            sums[n] = total
    for n in range(LANES):
        cut = _real(_bits(F32(sums[n])) & I32(~0x3FF))  # 23 - 13 fraction bits fewer
        register[n] = cut * _real(peaks[n] - I32(13 << 23))


@compiled
def _meet_apart(a, b, register):
    """`_meet` for all of float32: NaN, Inf and terms near 0, in float64, which holds every product and every power of two here."""
    for n in range(LANES):
        plain = F64(register[n])
        peak = abs(plain)
        for k in range(STEP):
            product = F64(a[k]) * F64(b[k * LANES + n])
            plain += product
            peak = max(peak, abs(product))
        if not np.isfinite(plain):  # float64 has room for any finite terms
            register[n] = F32(np.nan) if np.isnan(plain) else F32(plain)
            continue
        e = max((F64(peak).view(np.int64) >> 52) - 1023, -126)
        units = I64((1023 + 13 - e) << 52).view(np.float64)
        total = np.trunc(F64(register[n]) * units)
        for k in range(STEP):
            total += np.trunc(F64(a[k]) * F64(b[k * LANES + n]) * units)
        cut = I64(F64(total).view(np.int64) & ~((1 << 39) - 1)).view(np.float64)  # 52 - 13 fraction bits fewer
        register[n] = F32(cut / units) + F32(0)


@kernel
def _product(arguments):
    """A tile of LANES columns by ROWS rows at a time, drawn from NEXT.  STEPS_TO_SPLIT is 0 where sums are not split."""
    _wide_vectors()
    p = carray(_at(arguments), (SLOTS,), np.int64)
    steps, split = p[STEPS], p[STEPS_TO_SPLIT]
    depth, blocks = steps * STEP, (p[M] + ROWS - 1) // ROWS
    registers, peaks, sums = np.empty((ROWS, LANES), np.float32), np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    while True:
        number = _atomic_add(arguments + 8 * NEXT, 1)
        if number >= p[TILES] * blocks:
            break
        tile, first = number // blocks, (number % blocks) * ROWS
        rows = min(ROWS, p[M] - first)
        left, right = p[LEFT] + 4 * first * depth, p[RIGHT] + 4 * tile * depth * LANES
        out = carray(_at(p[RESULT] + 4 * (tile * p[M] + first) * LANES), (rows, LANES), np.float32)
        registers[:] = F32(0)
        out[:] = F32(0)
        for step in range(steps):
            b = carray(_at(right + 4 * step * STEP * LANES), (STEP * LANES,), np.float32)
            for m in range(rows):
                a = carray(_at(left + 4 * (m * depth + step * STEP)), (STEP,), np.float32)
                if _peaks(a, b, registers[m], peaks):
                    _meet_apart(a, b, registers[m])
                else:
                    _meet(a, b, registers[m], peaks, sums)
            if split != 0 and (step + 1) % split == 0:
                out += registers[:rows]
                registers[:] = F32(0)
        out += registers[:rows]  # to nearest even; of a whole sum, to 0


def _check(name: str, x: npt.NDArray[Any]) -> None:
    """Raise ValueError unless the products of x with the like of it are exact in float32."""
    if x.ndim != 2 or x.dtype != np.float32:
        raise ValueError(f"{name} is a float32 matrix, its contracted axis last; got {x.dtype} of shape {x.shape}")
    bits = np.ascontiguousarray(x).view(np.uint32)
    if np.bitwise_or.reduce(bits, axis=None) & 0xFFF and np.any(bits[~np.isnan(x)] & 0xFFF):
        raise ValueError(
            f"{name} holds values of more than 12 significant bits, whose products float32 cannot hold; cast it to 8 bits first, "
            "or use Accumulator.FLOAT32"
        )


def matmul(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], accumulator: Accumulator) -> npt.NDArray[np.float32]:
    """`a @ b.T` as a Hopper tensor core adds it up: float32 [M, N], the same bits on any number of threads.

    a: [M, K], b: [N, K], float32 holding values of 8-bit formats, or others of 12 significant bits at most.  NaN and Inf: see above.
    Raises ValueError for any other operands, and for an accumulator other than HOPPER_FAST and HOPPER_SPLIT.
    """
    if accumulator not in (Accumulator.HOPPER_FAST, Accumulator.HOPPER_SPLIT):
        raise ValueError(
            f"this adds as Hopper does, in hopper-fast or hopper-split; {accumulator.value} is a library's GEMM"
        )
    _check("a", a)
    _check("b", b)
    (m, k), n = a.shape, b.shape[0]
    if b.shape[1] != k:
        raise ValueError(f"a and b are contracted along their last axes, which differ: {k} and {b.shape[1]}")
    steps, tiles = -(-k // STEP), -(-n // LANES)
    left = np.zeros((m, steps * STEP), np.float32)
    left[:, :k] = a
    right = np.zeros((tiles, steps * STEP, LANES), np.float32)
    for tile in range(tiles):
        columns = b[tile * LANES : (tile + 1) * LANES]
        right[tile, :k, : len(columns)] = columns.T
    result = np.empty((tiles, m, LANES), np.float32)
    split = SPLIT // STEP if accumulator is Accumulator.HOPPER_SPLIT else 0
    addresses = (x.ctypes.data for x in (left, right, result))
    arguments = (ctypes.c_int64 * SLOTS)(*addresses, m, tiles, steps, split, 0)
    count = threads.count() if m * tiles * LANES * k > SERIAL else 1
    threads.run(_product.ctypes, ctypes.addressof(arguments), min(count, tiles * -(-m // ROWS)))
    return np.ascontiguousarray(result.transpose(1, 0, 2).reshape(m, tiles * LANES)[:, :n])
