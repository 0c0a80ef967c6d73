"""Scales of blocks on the CPU: from the magnitudes in a row of blocks to what their elements are multiplied with.

The cast of `blocks.py` calls these on a tile's columns; legend as in `loops.py`.
"""

from __future__ import annotations

import enum

import numpy as np

from octavo.kernels.element import (
    F32,
    I32,
    INF,
    MAGNITUDE,
    NAN,
    U64,
    _bits,
    _nearest_code,
    _nearest_plain,
    _real,
    compiled,
)
from octavo.kernels.loops import _wide_vectors

__all__ = [
    "Rule",
    "block_peaks",
    "column_peaks",
    "column_peaks_of_four",
    "e8m0",
    "float_scales",
    "per_column",
    "two_level",
]


class Rule(enum.IntEnum):
    """How a block's amax becomes its scale: the members of `BlockScale`, by name, and one more."""

    FLOAT32 = 0
    POWER_OF_TWO = 1
    RCEIL = 2
    FLOOR = 3
    CEIL = 4
    EVEN = 5
    TWO_LEVEL = 6


R_FLOAT32, R_POWER_OF_TWO, R_RCEIL, R_FLOOR, R_CEIL, R_EVEN, R_TWO_LEVEL = (int(rule) for rule in Rule)
FLT_MAX = F32(3.4028234663852886e38)


@compiled
def column_peaks(x_i, peaks, fresh, skip_nan):
    """Raise each column's peak to the magnitude in this row, or start it there."""
    _wide_vectors()
    if fresh:
        for j in range(x_i.size):
            peaks[j] = I32(0)
    if skip_nan:
        for j in range(x_i.size):
            a = I32(x_i[j] & MAGNITUDE)
            peaks[j] = I32(max(peaks[j], I32(0) if a > INF else a))
    else:
        for j in range(x_i.size):
            peaks[j] = I32(max(peaks[j], I32(x_i[j] & MAGNITUDE)))


@compiled
def column_peaks_of_four(x_i, pitch, peaks, fresh):
    """`column_peaks` of four rows at once, `pitch` numbers apart; x_i: from the first on."""
    _wide_vectors()
    n = peaks.size
    one, two = x_i[:n], x_i[pitch : pitch + n]
    three, four = x_i[2 * pitch : 2 * pitch + n], x_i[3 * pitch : 3 * pitch + n]
    if fresh:
        for j in range(n):
            peaks[j] = I32(0)
    for j in range(n):
        left = max(I32(one[j] & MAGNITUDE), I32(two[j] & MAGNITUDE))
        right = max(I32(three[j] & MAGNITUDE), I32(four[j] & MAGNITUDE))
        peaks[j] = I32(max(peaks[j], I32(max(left, right))))


@compiled
def _halve(values, out, count):
    """out[j] = the larger of values[2 j] and the next."""
    _wide_vectors()
    for j in range(U64(count)):
        out[j] = I32(max(values[j * U64(2)], values[j * U64(2) + U64(1)]))


@compiled
def block_peaks(peaks, blocks, wide, one, other):
    """The peak of each `wide` columns, the last of them fewer; one, other: memory to work in, as long as peaks."""
    if wide == 1:
        blocks[:] = peaks
        return
    whole = peaks.size // wide
    left, values = wide, peaks
    while left % 2 == 0:
        _halve(values, other, whole * left // 2)
        one, other, values, left = other, one, other, left // 2
    for b in range(whole):
        top = values[left * b]
        for j in range(left * b + 1, left * (b + 1)):
            top = I32(max(top, values[j]))
        blocks[b] = top
    for b in range(whole, blocks.size):
        top = I32(0)
        for j in range(whole * wide, peaks.size):
            top = I32(max(top, peaks[j]))
        blocks[b] = top


@compiled
def e8m0(blocks, codes, factor, back, rule, m, emax, limit, reciprocal, special):
    """E8M0 codes from the bits of amaxes, and the powers of two they stand for."""
    _wide_vectors()
    for b in range(blocks.size):
        a = blocks[b]
        if rule == R_RCEIL:
            x = _real(a)
            small = x < F32(2.0**-60)
            lifted = _bits(x * (F32(2.0**64) if small else F32(1.0)) * reciprocal)
            code = (lifted >> I32(23)) + I32((lifted & I32(0x7FFFFF)) != 0) - (I32(64) if small else I32(0))
            code = I32(0) if x <= limit else I32(max(code, I32(1)))
        elif rule == R_FLOOR:
            code = (a >> I32(23)) - emax
        elif rule == R_CEIL:
            code = (a >> I32(23)) + I32((a & I32(0x7FFFFF)) != 0) - emax
        else:
            code = ((a + (I32(1) << (I32(22) - m))) >> I32(23)) - emax
        code = I32(min(max(code, I32(0)), I32(254)))
        code = special if a >= INF else code
        up = I32(max(I32(254) - code, I32(0))) << I32(23)  # 2**(127 - code)
        down = code << I32(23)  # 2**(code - 127), but for the code 0
        factor[b] = _real(NAN) if code == 255 else (_real(I32(0x400000)) if code == 254 else _real(up))
        back[b] = _real(NAN) if code == 255 else (_real(I32(0x400000)) if code == 0 else _real(down))
        codes[b] = np.uint8(code)


@compiled
def float_scales(blocks, scales, factor, back, maximum, epsilon, power_of_two):
    """`octavo.scaling.amax_scale` of each block."""
    _wide_vectors()
    for b in range(blocks.size):
        peak = max(_real(blocks[b]), epsilon)
        usable = peak > F32(0) and I32(blocks[b]) < INF
        scale = min(maximum / (peak if usable else F32(1)), FLT_MAX)
        scale = _real(_bits(scale) & INF) if power_of_two else scale
        scale = scale if usable else F32(1)
        factor[b] = scale
        back[b] = F32(1) / scale
        scales[b] = back[b]


@compiled
def two_level(blocks, codes, factor, back, maximum, whole, decoded, whole_back, whole_reciprocal):
    """E4M3 scales under the scale of the whole tensor."""
    _wide_vectors()
    shift, e_min, top = I32(20 << 23), I32(121 << 23), F32(448)
    reciprocal, inverse = F32(1) / maximum, F32(1) / whole
    for b in range(U64(blocks.size)):
        target = min(_real(blocks[b]) * (whole * reciprocal), FLT_MAX)
        target = _real(NAN) if blocks[b] > INF else target
        bits = _nearest_plain(target, F32(1), shift, e_min, top)
        value = _real(bits)
        codes[b] = np.uint8(_nearest_code(target, F32(1), shift, e_min, top, I32(20), I32(0x7F), I32(0)))
        encode = min(F32(1) / (value * inverse), FLT_MAX)
        factor[b] = value if bits > INF else encode
        undone = value * whole_back * whole_reciprocal if decoded == 2 else value
        back[b] = undone if undone == undone else _real(NAN)


@compiled
def _double(values, out, count):
    """out[2 j] = out[2 j + 1] = values[j]."""
    _wide_vectors()
    for j in range(U64(count)):
        out[j * U64(2)] = values[j]
        out[j * U64(2) + U64(1)] = values[j]


@compiled
def per_column(blocks, columns, wide, one, other):
    """Each block's value for each of its columns; one, other: memory to work in, as long as columns."""
    whole, odd, doublings = columns.size // wide, wide, 0
    while odd % 2 == 0:
        odd, doublings = odd // 2, doublings + 1
    into = columns if doublings == 0 else one
    for b in range(whole):
        for j in range(odd):
            into[b * odd + j] = blocks[b]
    count = whole * odd
    for step in range(doublings):
        into = columns if step == doublings - 1 else other
        _double(one, into, count)
        one, other, count = other, one, 2 * count
    for j in range(whole * wide, columns.size):
        columns[j] = blocks[whole]
