"""The CPU kernel for scales of blocks: amax, scale, round and store, a tile at a time while it is in cache.

The source is a matrix [rows, columns] as it lies in memory, and a block is `high` by `wide` elements of it, whichever axis the GEMM
contracts.  A tile is one row of blocks, cut to a few columns; each column of it knows what its elements are multiplied with (`factor`)
and what their values are (`back`), so that the inner loops run over whole rows of a tile.  Legend as in `loops.py`.
"""

from __future__ import annotations

import enum

import numpy as np
from numba import carray

from octavo.kernels.loops import (
    BFLOAT16,
    CODES,
    F32,
    FLOAT32,
    I32,
    INF,
    MAGNITUDE,
    NAN,
    NEAREST_AWAY,
    NEAREST_EVEN,
    SIGN,
    STOCHASTIC,
    TOWARD_ZERO,
    U16,
    U32,
    U64,
    _at,
    _atomic_add,
    _atomic_max,
    _bits,
    _fill_random,
    _finish,
    _load,
    _nearest,
    _real,
    _real64,
    _store_codes,
    _wide_vectors,
    compiled,
    kernel,
)

__all__ = ["BlockSlot", "Rule", "cast_blocks"]


class Rule(enum.IntEnum):
    """How a block's amax becomes its scale: the members of `BlockScale`, and two more."""

    FLOAT32 = 0
    POWER_OF_TWO = 1
    RCEIL = 2
    FLOOR = 3
    CEIL = 4
    EVEN = 5
    TWO_LEVEL = 6


class BlockSlot(enum.IntEnum):
    """Where each argument lies, 8 bytes each; those from FLOAT on are float64."""

    SOURCE = 0
    TARGET = 1
    SCALES = 2
    """float32 or, E8M0 and two-level, uint8: one a block, row by row."""
    ROWS = 3
    COLUMNS = 4
    HIGH = 5
    WIDE = 6
    TILE = 7
    """Columns in a tile: a multiple of WIDE, or all of them."""
    SOURCE_KIND = 8
    TARGET_KIND = 9
    NEXT = 10
    AMAX = 11
    RULE = 12
    SKIP_NAN = 13
    DECODED = 14
    """What the target holds, unless codes: 0 the values of the codes, 1 times their blocks' scales, 2 times the tensor's too."""
    ROUNDING = 15
    SEED = 16
    OFFSET = 17
    MANTISSA_BITS = 18
    BIAS = 19
    MAX_EXPONENT = 20
    INF_CODE = 21
    NAN_CODE = 22
    SIGN_MASK = 23
    NEGATIVE_ZERO = 24
    FLOAT = 25
    TOP = 25
    OVERFLOW = 26
    INF_BECOMES = 27
    MAXIMUM = 28
    EPSILON = 29
    ZERO_LIMIT = 30
    WHOLE = 31
    """The two-level scale of the whole tensor."""
    WHOLE_BACK = 32
    """What undoes it, in two factors: the tensor's amax and fl(1 / (MAX * scale MAX))."""
    WHOLE_RECIPROCAL = 33
    END = 34


SOURCE, TARGET, SCALES, ROWS, COLUMNS, HIGH, WIDE, TILE, SOURCE_KIND, TARGET_KIND, NEXT, AMAX = range(12)
RULE, SKIP_NAN, DECODED, ROUNDING, SEED, OFFSET, MANTISSA_BITS, BIAS, MAX_EXPONENT = range(12, 21)
INF_CODE, NAN_CODE, SIGN_MASK, NEGATIVE_ZERO = range(21, 25)
TOP, OVERFLOW, INF_BECOMES, MAXIMUM, EPSILON, ZERO_LIMIT, WHOLE, WHOLE_BACK, WHOLE_RECIPROCAL, END = range(25, 35)
R_FLOAT32, R_POWER_OF_TWO, R_RCEIL, R_FLOOR, R_CEIL, R_EVEN, R_TWO_LEVEL = range(7)
FLT_MAX = F32(3.4028234663852886e38)


@compiled
def _column_peaks(x_i, peaks, fresh, skip_nan):
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
def _halve(values, out, count):
    """out[j] = the larger of values[2 j] and the next."""
    _wide_vectors()
    for j in range(U64(count)):
        out[j] = I32(max(values[j * U64(2)], values[j * U64(2) + U64(1)]))


@compiled
def _block_peaks(peaks, blocks, wide, one, other):
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
def _e8m0(blocks, codes, factor, back, rule, m, emax, limit, reciprocal, special):
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
def _float_scales(blocks, scales, factor, back, maximum, epsilon, power_of_two):
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
def _two_level(blocks, codes, factor, back, maximum, whole, decoded, whole_back, whole_reciprocal):
    """E4M3 scales under the scale of the whole tensor."""
    shift, e_min, limit = I32(20 << 23), I32(121 << 23), I32(137 << 23)
    for b in range(blocks.size):
        target = min(_real(blocks[b]) * (whole * (F32(1) / maximum)), FLT_MAX) if blocks[b] <= INF else _real(NAN)
        top = F32(448)
        value = _real(_nearest(target, F32(1), shift, e_min, limit, top, top, top, SIGN))
        piece, code = np.empty(1, np.float32), np.empty(1, np.uint8)
        piece[0] = value
        _store_codes(piece.view(np.int32), code, 3, 7, -1, 0x7F, 0x80)
        codes[b] = code[0]
        factor[b] = min(F32(1) / (value * (F32(1) / whole)), FLT_MAX) if value == value else value
        back[b] = value * whole_back * whole_reciprocal if decoded == 2 else value


@compiled
def _double(values, out, count):
    """out[2 j] = out[2 j + 1] = values[j]."""
    _wide_vectors()
    for j in range(U64(count)):
        out[j * U64(2)] = values[j]
        out[j * U64(2) + U64(1)] = values[j]


@compiled
def _per_column(blocks, columns, wide, one, other):
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


@compiled
def _round_nearest(x_f, factor, back, out, shift, e_min, limit, top, over, inf, zero_sign):
    """out = nearest-even(x * factor) * back, column by column."""
    _wide_vectors()
    for j in range(x_f.size):
        out[j] = _real(_nearest(x_f[j], factor[j], shift, e_min, limit, top, over, inf, zero_sign)) * back[j]


@compiled
def _round_nearest_to_bfloat16(x_f, factor, back, out, shift, e_min, limit, top, over, inf, zero_sign):
    """The same to bfloat16, to nearest even."""
    _wide_vectors()
    for j in range(x_f.size):
        value = _real(_nearest(x_f[j], factor[j], shift, e_min, limit, top, over, inf, zero_sign)) * back[j]
        u = U32(_bits(value))
        out[j] = U16((u + U32(0x7FFF) + ((u >> U32(16)) & U32(1))) >> U32(16))


@compiled
def _round_any(x_f, factor, back, out, shift, e_min, limit, top, over, inf, zero_sign, half, draws, lane):
    """As `_any_to_float32` of loops.py, column by column."""
    _wide_vectors()
    up_m = I32((23 << 23) - shift)
    for j in range(x_f.size):
        u = _bits(x_f[j] * factor[j])
        a = I32(u & MAGNITUDE)
        c = I32(min(a, limit))
        e = max(I32(c & INF), e_min)
        in_ulps = _real(c) * _real(I32(254 << 23) - e + up_m)
        whole = np.floor(in_ulps)
        fraction = in_ulps - whole
        if half > F32(0):
            whole += F32(1) if fraction >= half else F32(0)
        else:
            likelihood = U32(fraction * F32(4294967296.0))
            whole += F32(1) if U32(likelihood + draws[lane + j]) < likelihood else F32(0)
        out[j] = _real(_finish(whole * _real(e - up_m), u, a, top, over, inf, zero_sign)) * back[j]


@compiled
def _bfloat16_of(x_i, out):
    """float32 bits to bfloat16, to nearest even; every NaN here is the one that rounding made."""
    _wide_vectors()
    for j in range(out.size):
        u = U32(x_i[j])
        out[j] = U16((u + U32(0x7FFF) + ((u >> U32(16)) & U32(1))) >> U32(16))


@kernel
def cast_blocks(arguments):
    """Float32, bfloat16 and float16 matrices."""
    _wide_vectors()
    p = carray(_at(arguments), (END,), np.int64)
    n_rows, n_columns, high, wide, tile = p[ROWS], p[COLUMNS], p[HIGH], p[WIDE], p[TILE]
    kind, target, mode, m, rule = p[SOURCE_KIND], p[TARGET_KIND], p[ROUNDING], p[MANTISSA_BITS], p[RULE]
    top, over, inf = F32(_real64(p[TOP])), F32(_real64(p[OVERFLOW])), F32(_real64(p[INF_BECOMES]))
    maximum, epsilon, zero_limit = F32(_real64(p[MAXIMUM])), F32(_real64(p[EPSILON])), F32(_real64(p[ZERO_LIMIT]))
    whole = F32(_real64(p[WHOLE]))
    whole_back, whole_reciprocal = F32(_real64(p[WHOLE_BACK])), F32(_real64(p[WHOLE_RECIPROCAL]))
    shift, e_min = I32((23 - m) << 23), I32((128 - p[BIAS]) << 23)
    limit = I32((p[MAX_EXPONENT] + 129) << 23)
    zero_sign = SIGN if p[NEGATIVE_ZERO] else I32(0)
    half = F32(2) if mode == TOWARD_ZERO else F32(0.5) if mode == NEAREST_AWAY else F32(0)
    special = I32(254) if p[SKIP_NAN] else I32(255)
    tiles, block_columns = (n_columns + tile - 1) // tile, (n_columns + wide - 1) // wide
    most = (tile + wide - 1) // wide
    loaded, rounded = np.empty(tile, np.float32), np.empty(tile, np.float32)
    column_peaks, block_peaks = np.empty(tile, np.int32), np.empty(most, np.int32)
    one, other = np.empty(tile + 16, np.int32), np.empty(tile + 16, np.int32)
    factor, back = np.empty(most, np.float32), np.empty(most, np.float32)
    column_factor, column_back = np.empty(tile, np.float32), np.ones(tile, np.float32)
    draws = np.empty(tile + 12 if mode == STOCHASTIC else 0, np.uint32)
    peak = I32(0)
    count = ((n_rows + high - 1) // high) * tiles
    while True:
        item = _atomic_add(arguments + 8 * NEXT, 1)
        if item >= count:
            break
        block_row, first = item // tiles, (item % tiles) * tile
        row, size = block_row * high, min(tile, n_columns - first)
        end, place = min(row + high, n_rows), block_row * block_columns + first // wide
        x_f, x_i = loaded[:size], loaded[:size].view(np.int32)
        for r in range(row, end):
            start = r * n_columns + first
            if kind == FLOAT32:
                x_i = carray(_at(p[SOURCE] + 4 * start), (size,), np.int32)
            else:
                _load(carray(_at(p[SOURCE] + 2 * start), (size,), np.uint16), x_i, kind == BFLOAT16)
            _column_peaks(x_i, column_peaks[:size], r == row, p[SKIP_NAN] != 0)
        blocks = block_peaks[: (size + wide - 1) // wide]
        _block_peaks(column_peaks[:size], blocks, wide, one, other)
        for value in blocks:
            peak = I32(max(peak, value))
        codes = carray(_at(p[SCALES] + place), blocks.shape, np.uint8)
        if rule <= R_POWER_OF_TWO:
            scales = carray(_at(p[SCALES] + 4 * place), blocks.shape, np.float32)
            _float_scales(blocks, scales, factor, back, maximum, epsilon, rule == R_POWER_OF_TWO)
        elif rule == R_TWO_LEVEL:
            _two_level(blocks, codes, factor, back, maximum, whole, p[DECODED], whole_back, whole_reciprocal)
        else:
            emax = I32(p[MAX_EXPONENT])
            _e8m0(blocks, codes, factor, back, rule, I32(m), emax, zero_limit, F32(1) / maximum, special)
        f, g = column_factor[:size], column_back[:size]
        _per_column(factor, f, wide, one.view(np.float32), other.view(np.float32))
        if p[DECODED]:
            _per_column(back, g, wide, one.view(np.float32), other.view(np.float32))
        for r in range(row, end):
            start = r * n_columns + first
            if kind == FLOAT32:
                x_f = carray(_at(p[SOURCE] + 4 * start), (size,), np.float32)
            elif high > 1:
                _load(carray(_at(p[SOURCE] + 2 * start), (size,), np.uint16), x_i, kind == BFLOAT16)
            halves = carray(_at(p[TARGET] + 2 * start), (size,), np.uint16)
            if mode == NEAREST_EVEN and target == BFLOAT16:
                _round_nearest_to_bfloat16(x_f, f, g, halves, shift, e_min, limit, top, over, inf, zero_sign)
                continue
            out = rounded[:size]
            if target == FLOAT32:
                out = carray(_at(p[TARGET] + 4 * start), (size,), np.float32)
            if mode == NEAREST_EVEN:
                _round_nearest(x_f, f, g, out, shift, e_min, limit, top, over, inf, zero_sign)
            else:
                if mode == STOCHASTIC:
                    _fill_random(draws, (size + 10) // 4, (p[OFFSET] + start) >> 2, p[SEED])
                lane = (p[OFFSET] + start) & 3
                _round_any(x_f, f, g, out, shift, e_min, limit, top, over, inf, zero_sign, half, draws, lane)
            if target == BFLOAT16:
                _bfloat16_of(out.view(np.int32), halves)
            elif target == CODES:
                into = carray(_at(p[TARGET] + start), (size,), np.uint8)
                _store_codes(out.view(np.int32), into, m, p[BIAS], p[INF_CODE], p[NAN_CODE], p[SIGN_MASK])
    _atomic_max(arguments + 8 * AMAX, np.int64(peak))
