"""Stochastic rounding of float32 memory in place, on integers alone: any format within float32's range, those of 16 bits too.

Legend: `u` are the bits of a float32, `a` those of its magnitude, `e` its exponent field (1 for float32's subnormals), `m` the format's
mantissa bits, `e_min` the exponent field of the format's smallest normal value.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Any

import numpy as np
from numba import carray

from octavo.formats import Format
from octavo.kernels import cpu, memory, philox, threads
from octavo.kernels.element import F32, I32, INF, MAGNITUDE, NAN, SIGN, U64, _bits, compiled, kernel
from octavo.kernels.loops import CHUNK, TILE

__all__ = ["round_in_place"]

_address_of: Any = memory.address_of
_at: Any = memory.at
_atomic_add: Any = memory.atomic_add
_draw: Any = philox.draw
_keep: Any = memory.keep
_room: Any = philox.room
_wide_vectors: Any = memory.wide_vectors


class Slot(enum.IntEnum):
    """Where each of the kernel's arguments lies."""

    ADDRESS = 0
    SIZE = 1
    NEXT_CHUNK = 2
    SEED = 3
    OFFSET = 4
    MANTISSA_BITS = 5
    E_MIN = 6
    MAX_CODE = 7
    INF_BECOMES = 8
    ZERO_SIGN = 9
    SMALLEST = 10


# Numba takes module-level integers as constants, but not the members of an enum.
ADDRESS, SIZE, NEXT_CHUNK, SEED, OFFSET, MANTISSA_BITS = (int(slot) for slot in list(Slot)[:6])
E_MIN, MAX_CODE, INF_BECOMES, ZERO_SIGN, SMALLEST = (int(slot) for slot in list(Slot)[6:])
SLOTS = len(Slot)
WORD = U64(32)


def _round(x: Any, draws: Any, m: Any, e_min: Any, max_code: Any, infinite: Any, zero_sign: Any, smallest: Any) -> None:
    """x = x rounded, up where floor(fraction * 2**32) + draw carries.  x: int32 [n], the bits of float32; draws: uint32 [n]."""
    _wide_vectors()
    drop = I32(I32(23) - m)
    lift = I32((e_min - I32(1)) << I32(23))
    for i in range(x.size):
        u = x[i]
        a = I32(u & MAGNITUDE)
        e = max(I32(a >> I32(23)), I32(1))
        significand = U64(I32(a - ((e - I32(1)) << I32(23))))
        cut = min(I32(drop + max(I32(e_min - e), I32(0))), I32(63))
        in_ulps = (significand << WORD) >> U64(cut)  # 32 bits of fraction
        code = I32((in_ulps + U64(draws[i])) >> WORD) + I32(max(I32(e - e_min), I32(0)) << m)
        code = min(I32(code), max_code)
        # Where the format's subnormals are float32's, the codes of both run on alike.
        normal = (code >> m) != I32(0) or e_min == I32(1)
        r = I32((code << drop) + lift) if normal else _bits(F32(code) * smallest)
        r = infinite if a == INF else r
        r = a if a > INF else r
        x[i] = I32(r | I32(u & (zero_sign if r == I32(0) else SIGN)))


_round_all: Any = compiled(_round)


def _chunks(arguments: Any) -> None:
    """Chunks drawn from NEXT_CHUNK, whose random bits go by the element."""
    _wide_vectors()
    p = carray(_at(arguments), (SLOTS,), np.int64)
    m, e_min, max_code, infinite = I32(p[MANTISSA_BITS]), I32(p[E_MIN]), I32(p[MAX_CODE]), I32(p[INF_BECOMES])
    zero_sign, smallest = I32(p[ZERO_SIGN]), I32(p[SMALLEST]).view(np.float32)
    words = np.empty(_room(TILE), np.uint32)
    while True:
        start = _atomic_add(arguments + 8 * NEXT_CHUNK, 1) * CHUNK
        if start >= p[SIZE]:
            break
        end = min(start + CHUNK, p[SIZE])
        for t in range(start, end, TILE):
            size = min(TILE, end - t)
            draws = carray(_at(_draw(_address_of(words), size, p[OFFSET] + t, p[SEED])), (size,), np.uint32)
            x = carray(_at(p[ADDRESS] + 4 * t), (size,), np.int32)
            _round_all(x, draws, m, e_min, max_code, infinite, zero_sign, smallest)
    _keep(words)


_kernel: Any = kernel(_chunks)


def round_in_place(address: int, size: int, format: Format, *, seed: int, offset: int) -> None:
    """Round the `size` float32 at `address` to `format`, stochastically, in place: the same bits on any number of threads.

    The result is that of `octavo.reference.quantize` under `Rounding.STOCHASTIC` and `Overflow.SATURATE_FINITE`, NaN as it was.
    format: signed, with NaN, its values among float32's.
    """
    assert format.signed
    assert format.has_nan
    assert format.emin >= -126
    assert format.emax <= 127
    # The kernel shifts codes to where e_min is 1; the product would be a subnormal there, which is slow.
    smallest = np.float32(format.smallest_subnormal if format.emin > -126 else 1)
    infinite = INF if format.has_inf else NAN
    zero_sign = SIGN if format.has_negative_zero else 0
    row = format.mantissa_bits, format.emin + 127, format.max_code, infinite, zero_sign, smallest.view(np.int32)
    arguments = (ctypes.c_int64 * SLOTS)(*map(int, (address, size, 0, seed, offset, *row)))
    threads.run(_kernel.ctypes, ctypes.addressof(arguments), cpu.worthwhile_threads(size, threads.count()))
