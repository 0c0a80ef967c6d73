"""The CPU kernels as Numba compiles them: chunk loops that scale, record amax, round and store in one pass over memory.

A kernel is a C function of one address, an int64 array of arguments (`Slot`), so any thread pool can run it.  Its threads draw chunks
from a shared counter, and random bits are indexed by element, so neither threads nor chunks change a bit of the result.

Legend: `x_f` and `x_i` are float32 and int32 views of the same memory; the rest is as in `element.py`, whose bodies these loops inline.
Numba's disk cache is keyed by the file of the outermost function: a change to a borrowed one wants the cache removed.
"""

from __future__ import annotations

import enum

import numpy as np
from numba import carray

from octavo.kernels.element import (
    F32,
    I32,
    INF,
    MAGNITUDE,
    SIGN,
    U16,
    U32,
    _bits,
    _directed,
    _drawn,
    _finish,
    _is_plain,
    _magnitude64,
    _nearest,
    _nearest_code,
    _nearest_plain,
    _real,
    _real64,
    _signed,
    compiled,
    kernel,
)
from octavo.kernels.memory import at as _at
from octavo.kernels.memory import atomic_add as _atomic_add
from octavo.kernels.memory import atomic_max as _atomic_max
from octavo.kernels.memory import fence as _fence
from octavo.kernels.memory import keep as _keep
from octavo.kernels.memory import line_in as _line_in
from octavo.kernels.memory import stream as _stream
from octavo.kernels.memory import wide_vectors as _wide_vectors
from octavo.kernels.philox import draw as _draw
from octavo.kernels.philox import room as _room

__all__ = ["CHUNK", "Kind", "Slot", "amax", "cast32"]

TILE, NEAR_TILE = 384, 3 * 384
"""Elements rounded at a time: what lies between the passes of a tile stays in the first-level cache.  More of them where memory need not
keep up, as the calls for a tile take as long as a hundred elements.  Multiples of 64, so that codes are streamed to whole cache lines."""
CHUNK = 14 * NEAR_TILE
"""Elements a thread takes at a time: small enough for the second-level cache."""
STREAMED = 1 << 25
"""Bytes from which a result is written past the caches, as it would not stay in them: then memory need not read what is overwritten."""


class Kind(enum.IntEnum):
    """What a buffer holds."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    FLOAT64 = 3
    CODES = 4


class Slot(enum.IntEnum):
    """Where each argument lies; SCALE and DIVISOR are the bits of a float64, ROUNDING counts the members of `Rounding`."""

    SOURCE = 0
    TARGET = 1
    SIZE = 2
    SOURCE_KIND = 3
    TARGET_KIND = 4
    NEXT_CHUNK = 5
    AMAX = 6
    SCALE = 7
    DIVISOR = 8
    ROUNDING = 9
    SEED = 10
    OFFSET = 11
    MANTISSA_BITS = 12
    BIAS = 13
    MAX_CODE = 14
    OVERFLOW_CODE = 15
    INF_BECOMES = 16
    INF_CODE = 17
    NAN_CODE = 18
    SIGN_MASK = 19
    NEGATIVE_ZERO = 20
    ZERO_CODE = 21
    VALUES = 22


# Numba takes module-level integers as constants, but not the members of an enum.
SOURCE, TARGET, SIZE, SOURCE_KIND, TARGET_KIND, NEXT_CHUNK, AMAX, SCALE = (int(slot) for slot in list(Slot)[:8])
DIVISOR, ROUNDING, SEED, OFFSET, MANTISSA_BITS, BIAS, MAX_CODE, OVERFLOW_CODE = (int(slot) for slot in list(Slot)[8:16])
INF_BECOMES, INF_CODE, NAN_CODE, SIGN_MASK, NEGATIVE_ZERO, ZERO_CODE, VALUES = (int(slot) for slot in list(Slot)[16:])
SLOTS = len(Slot)
FLOAT32, BFLOAT16, FLOAT16, FLOAT64, CODES = (int(kind) for kind in Kind)
NEAREST_EVEN, TOWARD_ZERO, NEAREST_AWAY, STOCHASTIC = range(4)


@compiled
def _half_bits(bits):
    """float32 bits to bfloat16 bits, to nearest even; a NaN must have its payload in the upper half."""
    u = U32(bits)
    return U16((u + U32(0x7FFF) + ((u >> U32(16)) & U32(1))) >> U32(16))


@compiled
def _nearest_to_float32(x_f, x_i, out, scale, divisor, shift, e_min, limit, top, over, inf, zero_sign):
    """out = nearest-even(x * scale) / divisor; returns the bits of amax(|x|), which order as the values do, NaN on top."""
    _wide_vectors()
    peak = I32(0)
    if _is_plain(top, over, inf, zero_sign):
        for i in range(x_f.size):
            peak = max(peak, I32(x_i[i] & MAGNITUDE))
            out[i] = _real(_nearest_plain(x_f[i], scale, shift, e_min, top)) / divisor
        return peak
    for i in range(x_f.size):
        peak = max(peak, I32(x_i[i] & MAGNITUDE))
        out[i] = _real(_nearest(x_f[i], scale, shift, e_min, limit, top, over, inf, zero_sign)) / divisor
    return peak


@compiled
def _nearest_to_bfloat16(x_f, x_i, out, scale, shift, e_min, limit, top, over, inf, zero_sign):
    """out (uint16) = nearest-even(x * scale), which bfloat16 holds exactly; returns the bits of amax(|x|)."""
    _wide_vectors()
    peak = I32(0)
    if _is_plain(top, over, inf, zero_sign):
        for i in range(x_f.size):
            peak = max(peak, I32(x_i[i] & MAGNITUDE))
            out[i] = U16(_nearest_plain(x_f[i], scale, shift, e_min, top) >> I32(16))
        return peak
    for i in range(x_f.size):
        peak = max(peak, I32(x_i[i] & MAGNITUDE))
        out[i] = U16(_nearest(x_f[i], scale, shift, e_min, limit, top, over, inf, zero_sign) >> I32(16))
    return peak


@compiled
def _nearest_to_codes(x_f, x_i, out, scale, shift, e_min, top, m, nan_code, sign_mask):
    """out (uint8) = the codes of nearest-even(x * scale) where `_is_plain`; returns the bits of amax(|x|)."""
    _wide_vectors()
    peak = I32(0)
    drop, nan_code, sign_mask = I32(23 - m), I32(nan_code), I32(sign_mask)
    for i in range(x_f.size):
        peak = max(peak, I32(x_i[i] & MAGNITUDE))
        out[i] = np.uint8(_nearest_code(x_f[i], scale, shift, e_min, top, drop, nan_code, sign_mask))
    return peak


@compiled
def _directed_to_float32(x_f, x_i, out, scale, divisor, shift, e_min, limit, top, over, inf, zero_sign, half):
    """As `_nearest_to_float32`, toward zero or to nearest away."""
    _wide_vectors()
    peak = I32(0)
    for i in range(x_f.size):
        peak = max(peak, I32(x_i[i] & MAGNITUDE))
        out[i] = _real(_directed(x_f[i], scale, shift, e_min, limit, top, over, inf, zero_sign, half)) / divisor
    return peak


@compiled
def _stochastic_to_float32(x_f, x_i, out, scale, divisor, shift, e_min, limit, top, over, inf, zero_sign, draws):
    """As `_nearest_to_float32`, stochastically."""
    _wide_vectors()
    peak = I32(0)
    if _is_plain(top, over, inf, zero_sign):
        for i in range(x_f.size):
            peak = max(peak, I32(x_i[i] & MAGNITUDE))
            r, u, a = _drawn(x_f[i], scale, shift, e_min, _bits(top), draws[i])
            out[i] = _real(_signed(r, u, a)) / divisor
        return peak
    for i in range(x_f.size):
        peak = max(peak, I32(x_i[i] & MAGNITUDE))
        r, u, a = _drawn(x_f[i], scale, shift, e_min, limit, draws[i])
        out[i] = _real(_finish(r, u, a, top, over, inf, zero_sign)) / divisor
    return peak


@compiled
def _copy(bits, out_i):
    """float32 bits."""
    _wide_vectors()
    for i in range(bits.size):
        out_i[i] = bits[i]


@compiled
def _load(x, out_i, bfloat16):
    """bfloat16 or float16 bits (uint16) to float32 bits, exact."""
    _wide_vectors()
    if bfloat16:
        for i in range(x.size):
            out_i[i] = I32(U32(x[i]) << U32(16))
        return
    for i in range(x.size):
        h = I32(x[i])
        bits = _bits(_real((h & I32(0x7FFF)) << I32(13)) * F32(2.0**112))
        bits = bits | INF if (h & I32(0x7C00)) == I32(0x7C00) else bits
        out_i[i] = bits | ((h & I32(0x8000)) << I32(16))


@compiled
def _store_bfloat16(x_i, out):
    """float32 bits to bfloat16 bits (uint16), to nearest even, NaN kept."""
    _wide_vectors()
    for i in range(out.size):
        out[i] = U16(0x7FC0) if I32(x_i[i] & MAGNITUDE) > INF else _half_bits(x_i[i])


@compiled
def _store_float16(x_i, out):
    """float32 bits to float16 bits (uint16), to nearest even, overflow to Inf, NaN kept."""
    _wide_vectors()
    for i in range(out.size):
        a = I32(x_i[i] & MAGNITUDE)
        c = I32(min(a, I32(0x47800000)))  # 65536, past which all is Inf
        magic = _real(max(I32(c & INF), I32(113 << 23)) + I32(13 << 23))
        r = (_real(c) + magic) - magic
        code = (_bits(r) >> I32(13)) - I32(112 << 10) if r >= F32(2.0**-14) else I32(r * F32(2.0**24))
        code = I32(0x7E00) if a > INF else code
        out[i] = U16(code | ((x_i[i] >> I32(16)) & I32(0x8000)))


@compiled
def _store_codes(x_i, out, m, bias, inf_code, nan_code, sign_mask):
    """Representable float32 values to the format's codes (uint8)."""
    _wide_vectors()
    drop, rebias = I32(23 - m), I32((127 - bias) << m)
    tiny, per_subnormal = _real((128 - bias) << 23), _real((126 + bias + m) << 23)
    inf_code, nan_code, sign_mask = I32(inf_code), I32(nan_code), I32(sign_mask)
    for i in range(out.size):
        a = I32(x_i[i] & MAGNITUDE)
        code = (a >> drop) - rebias if _real(a) >= tiny else I32(_real(a) * per_subnormal)
        code = inf_code if a == INF else code
        code = code | ((x_i[i] >> I32(31)) & sign_mask)
        out[i] = np.uint8(nan_code if a > INF else code)


@kernel
def cast32(arguments):
    """Float32, bfloat16 and float16 sources, scaled and rounded in float32."""
    _wide_vectors()
    p = carray(_at(arguments), (SLOTS,), np.int64)
    n, kind, target, mode, m = p[SIZE], p[SOURCE_KIND], p[TARGET_KIND], p[ROUNDING], p[MANTISSA_BITS]
    scale, divisor = F32(_real64(p[SCALE])), F32(_real64(p[DIVISOR]))
    values = carray(_at(p[VALUES]), (256,), np.float32)
    top, over, inf = values[p[MAX_CODE]], values[p[OVERFLOW_CODE]], values[p[INF_BECOMES]]
    shift, e_min = I32((23 - m) << 23), I32((128 - p[BIAS]) << 23)
    limit = I32(((p[MAX_CODE] >> m) - p[BIAS] + 129) << 23)  # 2**(emax + 2)
    zero_sign = SIGN if p[NEGATIVE_ZERO] else I32(0)
    half = F32(2) if mode == TOWARD_ZERO else F32(0.5) if mode == NEAREST_AWAY else F32(0)
    from_width, width = 4 if kind == FLOAT32 else 2, 4 if target == FLOAT32 else 1 if target == CODES else 2
    streams = mode != STOCHASTIC and width * n >= STREAMED and p[TARGET] % 64 == 0 and p[SOURCE] != p[TARGET]
    tile = TILE if streams else NEAR_TILE
    loaded, rounded, narrowed = (
        np.empty(tile + 16, np.float32),
        np.empty(tile + 16, np.float32),
        np.empty(tile + 32, np.uint16),
    )
    words = np.empty(_room(tile) + 16 if mode == STOCHASTIC else 0, np.uint32)
    load_at, round_at, narrow_at, words_at = _line_in(loaded), _line_in(rounded), _line_in(narrowed), _line_in(words)
    narrow = mode == NEAREST_EVEN and target == BFLOAT16 and divisor == F32(1)
    encode = mode == NEAREST_EVEN and target == CODES and _is_plain(top, over, inf, zero_sign)
    # In place, the compiler could not know that no element is read after it was written: such a tile is copied first.
    apart = kind == FLOAT32 and p[SOURCE] != p[TARGET]
    peak = I32(0)
    while True:
        start = _atomic_add(arguments + 8 * NEXT_CHUNK, 1) * CHUNK
        if start >= n:
            break
        end = min(start + CHUNK, n)
        for t in range(start, end, tile):
            size = min(tile, end - t)
            source, into = p[SOURCE] + from_width * t, p[TARGET] + width * t
            place, ready = load_at, narrow_at if streams else into
            if apart:
                place = source
            elif kind == FLOAT32:
                _copy(carray(_at(source), (size,), np.int32), carray(_at(place), (size,), np.int32))
            else:
                bits = carray(_at(place), (size,), np.int32)
                _load(carray(_at(source), (size,), np.uint16), bits, kind == BFLOAT16)
            f, b = carray(_at(place), (size,), np.float32), carray(_at(place), (size,), np.int32)
            halves, codes = carray(_at(ready), (size,), np.uint16), carray(_at(ready), (size,), np.uint8)
            if encode:
                seen = _nearest_to_codes(f, b, codes, scale, shift, e_min, top, m, p[NAN_CODE], p[SIGN_MASK])
            elif narrow:
                seen = _nearest_to_bfloat16(f, b, halves, scale, shift, e_min, limit, top, over, inf, zero_sign)
            else:
                middle = round_at if streams or target != FLOAT32 else into
                o, r = carray(_at(middle), (size,), np.float32), carray(_at(middle), (size,), np.int32)
                if mode == NEAREST_EVEN:
                    seen = _nearest_to_float32(f, b, o, scale, divisor, shift, e_min, limit, top, over, inf, zero_sign)
                elif mode == STOCHASTIC:
                    draws = carray(_at(_draw(words_at, size, p[OFFSET] + t, p[SEED])), (size,), np.uint32)
                    seen = _stochastic_to_float32(
                        f, b, o, scale, divisor, shift, e_min, limit, top, over, inf, zero_sign, draws
                    )
                else:
                    seen = _directed_to_float32(
                        f, b, o, scale, divisor, shift, e_min, limit, top, over, inf, zero_sign, half
                    )
                if target == FLOAT32:
                    ready = middle
                elif target == BFLOAT16:
                    _store_bfloat16(r, halves)
                elif target == FLOAT16:
                    _store_float16(r, halves)
                else:
                    _store_codes(r, codes, m, p[BIAS], p[INF_CODE], p[NAN_CODE], p[SIGN_MASK])
            peak = max(peak, seen)
            if streams:
                _stream(ready, into, width * size)
    if streams:
        _fence()
    _keep(loaded)
    _keep(rounded)
    _keep(narrowed)
    _keep(words)
    _atomic_max(arguments + 8 * AMAX, np.int64(peak))


@kernel
def amax(arguments):
    """The largest magnitude alone."""
    _wide_vectors()
    p = carray(_at(arguments), (SLOTS,), np.int64)
    n, kind = p[SIZE], p[SOURCE_KIND]
    loaded = np.empty(CHUNK, np.int32)
    peak, peak64 = I32(0), np.int64(0)
    while True:
        start = _atomic_add(arguments + 8 * NEXT_CHUNK, 1) * CHUNK
        if start >= n:
            break
        size = min(CHUNK, n - start)
        bits = loaded[:size]
        if kind == FLOAT64:
            for value in carray(_at(p[SOURCE] + 8 * start), (size,), np.float64):
                peak64 = max(peak64, _magnitude64(value))
            continue
        if kind == FLOAT32:
            bits = carray(_at(p[SOURCE] + 4 * start), (size,), np.int32)
        else:
            _load(carray(_at(p[SOURCE] + 2 * start), (size,), np.uint16), bits, kind == BFLOAT16)
        for i in range(size):
            peak = max(peak, I32(bits[i] & MAGNITUDE))
    _atomic_max(arguments + 8 * AMAX, max(np.int64(peak), peak64))
