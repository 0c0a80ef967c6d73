"""The CPU kernel for scales of blocks: amax, scale, round and store, a tile at a time while it is in cache.

The source is a matrix [rows, columns] as it lies in memory, and a block is `high` by `wide` elements of it, whichever axis the GEMM
contracts.  A tile is one row of blocks, cut to a few columns; each column of it knows what its elements are multiplied with (`factor`)
and what their values are (`back`), so that the inner loops run over whole rows of a tile.  Legend as in `loops.py`.
"""

from __future__ import annotations

import enum

import numpy as np
from numba import carray

from octavo.kernels.block_loops import (
    bfloat16_of,
    round_blocks,
    round_blocks_stochastic,
    round_blocks_to_bfloat16,
    round_blocks_to_codes,
    round_directed,
    round_nearest,
    round_nearest_to_bfloat16,
    round_nearest_to_codes,
    round_stochastic,
)
from octavo.kernels.block_scales import (
    R_POWER_OF_TWO,
    R_TWO_LEVEL,
    block_peaks,
    column_peaks,
    column_peaks_of_four,
    e8m0,
    float_scales,
    per_column,
    two_level,
)
from octavo.kernels.element import F32, I32, SIGN, _is_plain, _real64, kernel
from octavo.kernels.loops import (
    BFLOAT16,
    CODES,
    FLOAT32,
    NEAREST_AWAY,
    NEAREST_EVEN,
    STOCHASTIC,
    STREAMED,
    TOWARD_ZERO,
    _load,
    _store_codes,
)
from octavo.kernels.memory import address_of as _address_of
from octavo.kernels.memory import ask as _ask
from octavo.kernels.memory import at as _at
from octavo.kernels.memory import atomic_add as _atomic_add
from octavo.kernels.memory import atomic_max as _atomic_max
from octavo.kernels.memory import fence as _fence
from octavo.kernels.memory import keep as _keep
from octavo.kernels.memory import stream as _stream
from octavo.kernels.memory import wide_vectors as _wide_vectors
from octavo.kernels.peaks import peaks_of_rows
from octavo.kernels.philox import draw as _draw
from octavo.kernels.philox import room as _room

__all__ = ["BlockSlot", "cast_blocks"]


class BlockSlot(enum.IntEnum):
    """Where each argument lies, 8 bytes each; those from TOP on are float64."""

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


# Numba takes module-level integers as constants, but not the members of an enum.
SOURCE, TARGET, SCALES, ROWS, COLUMNS, HIGH, WIDE, TILE = (int(slot) for slot in list(BlockSlot)[:8])
SOURCE_KIND, TARGET_KIND, NEXT, AMAX, RULE, SKIP_NAN, DECODED, ROUNDING = (int(slot) for slot in list(BlockSlot)[8:16])
SEED, OFFSET, MANTISSA_BITS, BIAS, MAX_EXPONENT, INF_CODE, NAN_CODE = (int(slot) for slot in list(BlockSlot)[16:23])
SIGN_MASK, NEGATIVE_ZERO, TOP, OVERFLOW, INF_BECOMES, MAXIMUM = (int(slot) for slot in list(BlockSlot)[23:29])
EPSILON, ZERO_LIMIT, WHOLE, WHOLE_BACK, WHOLE_RECIPROCAL, END = (int(slot) for slot in list(BlockSlot)[29:])
FAR_PIECE, DRAWN_PIECE, PIECE = 256, 384, 1024
"""Elements rounded at a time, where blocks allow it: fewer if memory has to keep up, and a whole number of Philox's steps."""
GROUP = 8
"""Tiles that a thread takes at a time, if there are many."""


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
    form = (shift, e_min, limit, top, over, inf, zero_sign)
    coding = (shift, e_min, top, m, p[NAN_CODE], p[SIGN_MASK])
    encodes = mode == NEAREST_EVEN and target == CODES and _is_plain(top, over, inf, zero_sign)
    from_width, width = 4 if kind == FLOAT32 else 2, 4 if target == FLOAT32 else 1 if target == CODES else 2
    large = width * n_rows * n_columns >= STREAMED and p[SOURCE] != p[TARGET]
    far = from_width * n_rows * n_columns >= STREAMED
    step = DRAWN_PIECE if mode == STOCHASTIC else FAR_PIECE if far else PIECE
    tiles, block_columns = (n_columns + tile - 1) // tile, (n_columns + wide - 1) // wide
    most = (tile + wide - 1) // wide
    held = min(tile, max(step, wide))
    loaded, rounded, narrowed = np.empty(tile, np.float32), np.empty(held, np.float32), np.empty(held, np.uint16)
    in_columns, in_blocks = np.empty(tile, np.int32), np.empty(most, np.int32)
    one, other = np.empty(tile + 16, np.int32), np.empty(tile + 16, np.int32)
    factor, back = np.empty(most, np.float32), np.empty(most, np.float32)
    column_factor, column_back = np.empty(tile, np.float32), np.ones(tile, np.float32)
    words = np.empty(_room(held) if mode == STOCHASTIC else 0, np.uint32)
    block_factors, block_backs, words_at = _address_of(factor), _address_of(back), _address_of(words)
    column_factors, column_backs = _address_of(column_factor), _address_of(column_back)
    load_at, round_at, narrow_at = _address_of(loaded), _address_of(rounded), _address_of(narrowed)
    peak = I32(0)
    count = ((n_rows + high - 1) // high) * tiles
    following, beyond_group, group = 0, 0, min(GROUP, 1 + count // 16)
    while True:
        if following == beyond_group:  # a few neighbours at a time: the memory of the next one is asked for early
            following = _atomic_add(arguments + 8 * NEXT, group)
            beyond_group = min(following + group, count)
            if following >= count:
                break
        item, following = following, following + 1
        block_row, first = item // tiles, (item % tiles) * tile
        row, size = block_row * high, min(tile, n_columns - first)
        beyond = ((item + 1) // tiles * high - row) * n_columns + (item + 1) % tiles * tile - first
        end, place = min(row + high, n_rows), block_row * block_columns + first // wide
        x_i = loaded[:size].view(np.int32)
        blocks = in_blocks[: (size + wide - 1) // wide]
        in_rows = high == 1 and wide % 16 == 0 and size % wide == 0 and p[SKIP_NAN] == 0
        columns, begin = in_columns[:size], row
        if kind == FLOAT32 and not in_rows and p[SKIP_NAN] == 0:
            while begin + 4 <= end:
                four = carray(_at(p[SOURCE] + 4 * (begin * n_columns + first)), (3 * n_columns + size,), np.int32)
                column_peaks_of_four(four, n_columns, columns, begin == row)
                begin += 4
        for r in range(begin, end):
            start = r * n_columns + first
            if kind == FLOAT32:
                x_i = carray(_at(p[SOURCE] + 4 * start), (size,), np.int32)
            else:
                _load(carray(_at(p[SOURCE] + 2 * start), (size,), np.uint16), x_i, kind == BFLOAT16)
            if not in_rows:
                column_peaks(x_i, columns, r == row, p[SKIP_NAN] != 0)
        if in_rows:
            peaks_of_rows(x_i, blocks, wide, one)
        else:
            block_peaks(columns, blocks, wide, one, other)
        for value in blocks:
            peak = I32(max(peak, value))
        codes = carray(_at(p[SCALES] + place), blocks.shape, np.uint8)
        if rule <= R_POWER_OF_TWO:
            scales = carray(_at(p[SCALES] + 4 * place), blocks.shape, np.float32)
            float_scales(blocks, scales, factor, back, maximum, epsilon, rule == R_POWER_OF_TWO)
        elif rule == R_TWO_LEVEL:
            two_level(blocks, codes, factor, back, maximum, whole, p[DECODED], whole_back, whole_reciprocal)
        else:
            emax = I32(p[MAX_EXPONENT])
            e8m0(blocks, codes, factor, back, rule, I32(m), emax, zero_limit, F32(1) / maximum, special)
        whole_blocks = mode in (NEAREST_EVEN, STOCHASTIC) and wide % 16 == 0 and size % wide == 0
        sharing, factors_at, backs_at = wide, block_factors, block_backs
        if not whole_blocks:
            sharing, factors_at, backs_at = 1, column_factors, column_backs
            per_column(factor, column_factor[:size], wide, one.view(np.float32), other.view(np.float32))
            if p[DECODED]:
                per_column(back, column_back[:size], wide, one.view(np.float32), other.view(np.float32))
        piece = step if not whole_blocks or wide % step == 0 else max(wide, step // wide * wide)
        for r in range(row, end):
            start = r * n_columns + first
            if kind != FLOAT32 and high > 1:
                _load(carray(_at(p[SOURCE] + 2 * start), (size,), np.uint16), x_i, kind == BFLOAT16)
            for q in range(0, size, piece):
                part = min(piece, size - q)
                lies = p[SOURCE] + 4 * (start + q) if kind == FLOAT32 else load_at + 4 * q
                into = p[TARGET] + width * (start + q)
                # The next tile, which is read next; this one is in cache.
                _ask(p[SOURCE] + from_width * (start + q + beyond), from_width * part)
                streams = large and into % 64 == 0
                ready = narrow_at if streams else into
                middle = round_at if streams or target != FLOAT32 else into
                x_f, out = carray(_at(lies), (part,), np.float32), carray(_at(middle), (part,), np.float32)
                halves, stored = carray(_at(ready), (part,), np.uint16), carray(_at(ready), (part,), np.uint8)
                # Not slices, whose counts of references cost as much as a few blocks.
                f_q = carray(_at(factors_at + 4 * (q // sharing)), (part,), np.float32)
                g_q = carray(_at(backs_at + 4 * (q // sharing)), (part,), np.float32)
                run, decoded, draws_at = min(wide, part), p[DECODED] != 0, words_at
                if mode == STOCHASTIC:
                    draws_at = _draw(words_at, part, p[OFFSET] + start + q, p[SEED])
                draws = carray(_at(draws_at), (part,), np.uint32)
                if encodes and whole_blocks:
                    round_blocks_to_codes(x_f, f_q, stored, run, *coding)
                elif encodes:
                    round_nearest_to_codes(x_f, f_q, stored, *coding)
                elif whole_blocks:
                    if mode == STOCHASTIC:
                        round_blocks_stochastic(x_f, f_q, g_q, out, run, decoded, *form, draws)
                    elif target == BFLOAT16:
                        round_blocks_to_bfloat16(x_f, f_q, g_q, halves, run, decoded, *form)
                    else:
                        round_blocks(x_f, f_q, g_q, out, run, decoded, *form)
                elif mode == NEAREST_EVEN and target == BFLOAT16:
                    round_nearest_to_bfloat16(x_f, f_q, g_q, halves, *form)
                elif mode == NEAREST_EVEN:
                    round_nearest(x_f, f_q, g_q, out, *form)
                elif mode == STOCHASTIC:
                    round_stochastic(x_f, f_q, g_q, out, *form, draws)
                else:
                    round_directed(x_f, f_q, g_q, out, *form, half)
                if target == FLOAT32:
                    ready = middle
                elif target == BFLOAT16 and mode != NEAREST_EVEN:
                    bfloat16_of(out.view(np.int32), halves)
                elif target == CODES and not encodes:
                    _store_codes(out.view(np.int32), stored, m, p[BIAS], p[INF_CODE], p[NAN_CODE], p[SIGN_MASK])
                if streams:
                    _stream(ready, into, width * part)
    if large:
        _fence()
    _keep(rounded)
    _keep(narrowed)
    _keep(words)
    _atomic_max(arguments + 8 * AMAX, np.int64(peak))
