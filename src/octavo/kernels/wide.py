"""The CPU kernel that rounds in float64: for float64 itself, and for E8M0, whose range leaves float32 no room to round in."""

from __future__ import annotations

import numpy as np
from numba import carray

from octavo.kernels.element import F32, _bits64, _magnitude64, _real64, compiled, kernel
from octavo.kernels.loops import (
    AMAX,
    BFLOAT16,
    BIAS,
    CHUNK,
    CODES,
    DIVISOR,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INF_BECOMES,
    MANTISSA_BITS,
    MAX_CODE,
    NAN_CODE,
    NEAREST_AWAY,
    NEAREST_EVEN,
    NEGATIVE_ZERO,
    NEXT_CHUNK,
    OFFSET,
    OVERFLOW_CODE,
    ROUNDING,
    SCALE,
    SEED,
    SIGN_MASK,
    SIZE,
    SLOTS,
    SOURCE,
    SOURCE_KIND,
    STOCHASTIC,
    TARGET,
    TARGET_KIND,
    VALUES,
    ZERO_CODE,
    _at,
    _atomic_add,
    _atomic_max,
    _load,
    _store_bfloat16,
    _store_float16,
)
from octavo.kernels.memory import address_of as _address_of
from octavo.kernels.memory import keep as _keep
from octavo.kernels.philox import draw as _draw
from octavo.kernels.philox import room as _room

__all__ = ["cast64"]


@compiled
def _code_of(value, p, draw):
    """The code of one float64 under the arguments `p`, as `reference.encode` defines it."""
    m, nan, signed = p[MANTISSA_BITS], p[NAN_CODE], p[SIGN_MASK] != 0
    magnitude, negative = abs(value), _bits64(value) < 0
    if not signed and magnitude == 0:
        return p[ZERO_CODE]
    if np.isnan(value) or (negative and not signed):
        return nan
    code = p[INF_BECOMES]
    if not np.isinf(value):
        magnitude = min(magnitude, 2.0**200)
        lowest = np.int64(0 if signed or p[ROUNDING] == NEAREST_EVEN else 1)  # as in the reference
        exponent = max((_bits64(magnitude) >> 52) - 1023, 1 - p[BIAS] - lowest)
        in_ulps = magnitude * _real64((1023 + m - exponent) << 52)
        whole = np.floor(in_ulps)
        fraction = in_ulps - whole
        up = False
        if p[ROUNDING] == NEAREST_EVEN:
            up = fraction > 0.5 or (fraction == 0.5 and whole % 2 == 1)
        elif p[ROUNDING] == NEAREST_AWAY:
            up = fraction >= 0.5
        elif p[ROUNDING] == STOCHASTIC:
            up = np.int64(fraction * 4294967296.0) + draw >= 1 << 32
        code = max(np.int64(whole) + np.int64(up) + ((exponent - 1 + p[BIAS]) << m), 0)
        code = p[OVERFLOW_CODE] if code > p[MAX_CODE] else code
    if negative and code != nan and (p[NEGATIVE_ZERO] or code != 0):
        code |= p[SIGN_MASK]
    return code


@kernel
def cast64(arguments):
    """Any source, rounded in float64: for float64 itself, and for E8M0, whose range leaves float32 no room to round in."""
    p = carray(_at(arguments), (SLOTS,), np.int64)
    n, kind, target = p[SIZE], p[SOURCE_KIND], p[TARGET_KIND]
    scale, divisor = _real64(p[SCALE]), _real64(p[DIVISOR])
    values = carray(_at(p[VALUES]), (256,), np.float32)
    loaded, rounded = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    words = np.zeros(_room(CHUNK), np.uint32)
    peak = np.int64(0)
    while True:
        start = _atomic_add(arguments + 8 * NEXT_CHUNK, 1) * CHUNK
        if start >= n:
            break
        size = min(CHUNK, n - start)
        x = carray(_at(p[SOURCE] + 8 * start), (size,), np.float64)
        if kind == FLOAT32:
            loaded[:size] = carray(_at(p[SOURCE] + 4 * start), (size,), np.float32)
        elif kind != FLOAT64:
            _load(carray(_at(p[SOURCE] + 2 * start), (size,), np.uint16), loaded.view(np.int32), kind == BFLOAT16)
        first_word = _address_of(words)
        if p[ROUNDING] == STOCHASTIC:
            first_word = _draw(first_word, size, p[OFFSET] + start, p[SEED])
        draws = carray(_at(first_word), (size,), np.uint32)
        codes = carray(_at(p[TARGET] + start), (size,), np.uint8)
        wide = carray(_at(p[TARGET] + 8 * start), (size,), np.float64)
        for i in range(size):
            if kind == FLOAT64:
                peak = max(peak, _magnitude64(x[i]))
                value = x[i] * scale
            else:
                peak = max(peak, _magnitude64(np.float64(loaded[i])))
                value = np.float64(loaded[i] * F32(scale))
            code = _code_of(value, p, np.int64(draws[i]))
            if target == CODES:
                codes[i] = np.uint8(code)
            elif target == FLOAT64:
                wide[i] = np.float64(values[code]) / divisor
            else:
                rounded[i] = values[code] / F32(divisor)
        if target == FLOAT32:
            carray(_at(p[TARGET] + 4 * start), (size,), np.float32)[:] = rounded[:size]
        elif target == BFLOAT16:
            _store_bfloat16(rounded.view(np.int32), carray(_at(p[TARGET] + 2 * start), (size,), np.uint16))
        elif target == FLOAT16:
            _store_float16(rounded.view(np.int32), carray(_at(p[TARGET] + 2 * start), (size,), np.uint16))
    _keep(words)
    _atomic_max(arguments + 8 * AMAX, peak)
