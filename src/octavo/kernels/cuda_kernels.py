"""The GPU kernels as Triton compiles them: each reads a tensor once, and writes codes, values or scales.

Legend: n elements; a matrix is [rows, columns], row-major, its blocks `across` rows by `along` columns; state: int32 [2], the bits of
the amax and, for formats without NaN, of the largest magnitude that was rounded.  Capital letters are compile-time constants: FORMAT
and RULE are of `cuda_bits`' `constants` and `rule_constants`, MODE of its `mode_of`, KIND and TARGET of its `Kind`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.cuda_bits import (
    CODES,
    E4M3,
    E8M0_SCALES,
    STOCHASTIC,
    TWO_LEVEL_SCALES,
    as_int,
    block_scale,
    decode,
    draw,
    draw_quads,
    encode,
    from_e8m0,
    narrow,
    to_bfloat16,
    widen,
)
from octavo.reference import SIGNS

__all__ = [
    "amax_kernel",
    "blocks_kernel",
    "cast_kernel",
    "decode_kernel",
    "decode_matrix_kernel",
    "hadamard_kernel",
    "random_kernel",
    "transposed_kernel",
]

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_MINUS = tl.constexpr(sum(1 << i for i, sign in enumerate(SIGNS) if sign < 0))
_SEED = ("seed_low", "seed_high", "offset")
"""Arguments that differ at each call, which no compiled kernel may depend on."""


@triton.jit
def _gather(state, bits):
    """The maximum of `bits`, any shape, into `state`."""
    tl.atomic_max(state, tl.max(bits), sem="relaxed")


@triton.jit
def amax_kernel(x, state, n, KIND: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    peak = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        base = first + step * BLOCK
        left = tl.minimum(n - base, BLOCK).to(tl.int32)
        value = widen(tl.load(x + base + lane, mask=lane < left, other=0), KIND)
        peak = tl.maximum(peak, as_int(value) & _MAGNITUDE)
    _gather(state, peak)


@triton.jit(do_not_specialize=_SEED)
def cast_kernel(
    x,
    out,
    scale,
    state,
    n,
    seed_low,
    seed_high,
    offset,
    FORMAT: tl.constexpr,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    TARGET: tl.constexpr,
    AMAX: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = codes of x * scale, or what they decode to over the scale; SHIFT: offset % 4, so that a tile starts where four draws do."""
    lane = tl.arange(0, BLOCK)
    tile = tl.program_id(0).to(tl.int64)
    base = tile * BLOCK - SHIFT
    inside = lane < tl.minimum(n - base, BLOCK).to(tl.int32)
    if SHIFT > 0:
        inside = inside & (lane >= -base)
    value = widen(tl.load(x + base + lane, mask=inside, other=0), KIND)
    factor = tl.load(scale)
    draws = lane
    if MODE == STOCHASTIC:
        quad = (offset.to(tl.int64) >> 2) + tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        draws = draw_quads(quad, seed_low, seed_high)
    code = encode(value * factor, draws, FORMAT, MODE)
    if TARGET == CODES:
        tl.store(out + base + lane, code, mask=inside)
    else:
        quotient = tl.div_rn(decode(code, FORMAT), factor)
        tl.store(out + base + lane, narrow(quotient, TARGET), mask=inside)
    if AMAX:
        _gather(state, as_int(value) & _MAGNITUDE)


@triton.jit(do_not_specialize=_SEED)
def random_kernel(out, n, seed_low, seed_high, offset, BLOCK: tl.constexpr):
    """out: int32 [n], the bits that positions offset to offset + n - 1 draw."""
    lane = tl.arange(0, BLOCK)
    base = tl.program_id(0).to(tl.int64) * BLOCK
    draws = draw(offset.to(tl.int64) + base + lane, seed_low, seed_high)
    inside = lane < tl.minimum(n - base, BLOCK).to(tl.int32)
    tl.store(out + base + lane, draws.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def decode_kernel(codes, out, n, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    base = tl.program_id(0).to(tl.int64) * BLOCK
    inside = lane < tl.minimum(n - base, BLOCK).to(tl.int32)
    code = tl.load(codes + base + lane, mask=inside, other=0).to(tl.int32)
    tl.store(out + base + lane, decode(code, FORMAT), mask=inside)


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows, int64 [ROWS], and columns, int64 [COLUMNS], of this program's tile of a matrix."""
    tile, beside = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    row = (tile // beside).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tile % beside).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column


@triton.jit(do_not_specialize=_SEED)
def transposed_kernel(
    x,
    codes,
    turned,
    scale,
    state,
    rows,
    columns,
    seed_low,
    seed_high,
    offset,
    FORMAT: tl.constexpr,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    AMAX: tl.constexpr,
    TILE: tl.constexpr,
):
    """codes: of x * scale, [rows, columns]; turned: the same, [columns, rows]."""
    row, column = _tile(rows, columns, TILE, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = (row * columns)[:, None] + column[None, :]
    value = widen(tl.load(x + place, mask=inside, other=0), KIND)
    draws = place
    if MODE == STOCHASTIC:
        draws = draw(offset.to(tl.int64) + place, seed_low, seed_high)
    code = encode(value * tl.load(scale), draws, FORMAT, MODE)
    tl.store(codes + place, code, mask=inside)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(turned + (column * rows)[:, None] + row[None, :], tl.trans(code), mask=inside)
    if AMAX:
        _gather(state, as_int(value) & _MAGNITUDE)


@triton.jit
def _places(base, step, columns, TILE: tl.constexpr, STRIDE: tl.constexpr):
    """Where every STRIDE-th element of a chunk of each block lies, int64 [blocks, chunk / STRIDE], and its row and column in the block."""
    CHUNK: tl.constexpr = TILE[1]
    WIDE: tl.constexpr = TILE[3]
    inside = step * CHUNK + STRIDE * tl.arange(0, CHUNK // STRIDE)
    row, column = inside // WIDE, inside % WIDE
    return base[:, None] + (row.to(tl.int64) * columns + column)[None, :], row[None, :], column[None, :]


@triton.jit
def _load_chunk(x, base, step, columns, high, wide, KIND: tl.constexpr, TILE: tl.constexpr):
    """The elements of a chunk of each block, zeros beyond its `high` rows and `wide` columns; where they lie; whether they are there."""
    place, row, column = _places(base, step, columns, TILE, 1)
    inside = (row < high[:, None]) & (column < wide[:, None])
    return widen(tl.load(x + place, mask=inside, other=0), KIND), place, inside


@triton.jit
def _block_peak(value, SKIP: tl.constexpr):
    """The bits of the amax of each block's elements; with SKIP, NaN does not count."""
    bits = as_int(value) & _MAGNITUDE
    if SKIP:
        bits = tl.where(bits > 0x7F800000, 0, bits)
    return tl.max(bits, 1)


@triton.jit
def _draw_chunk(base, step, columns, seed_low, seed_high, TILE: tl.constexpr):
    """The random bits of a chunk of each block, whose positions start at `base`."""
    if TILE[4]:
        place, _, _ = _places(base, step, columns, TILE, 4)
        draws = draw_quads(place >> 2, seed_low, seed_high)
    else:
        place, _, _ = _places(base, step, columns, TILE, 1)
        draws = draw(place, seed_low, seed_high)
    return draws


@triton.jit(do_not_specialize=_SEED)
def blocks_kernel(
    x,
    codes,
    scales,
    state,
    whole,
    rows,
    columns,
    across,
    along,
    seed_low,
    seed_high,
    offset,
    FORMAT: tl.constexpr,
    RULE: tl.constexpr,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """codes: of each block of x by its own scale; scales: of the blocks, float32 or uint8; whole: as in `block_scale`.

    TILE is (blocks, elements to a chunk, chunks, elements to a row of a chunk, whether draws come by fours) of a program, powers of
    two that may pass a block's edge.  x is read once or, where a block takes more than one chunk, again from cache.
    """
    STEPS: tl.constexpr = TILE[2]
    per_row = tl.cdiv(columns, along)
    block = tl.program_id(0).to(tl.int64) * TILE[0] + tl.arange(0, TILE[0])
    top, left = block // per_row * across, block % per_row * along
    base = top * columns + left
    high = tl.minimum(rows - top, across).to(tl.int32)  # below 1 past the last block
    wide = tl.minimum(columns - left, along).to(tl.int32)
    value, place, inside = _load_chunk(x, base, 0, columns, high, wide, KIND, TILE)
    peak = _block_peak(value, RULE[1])
    for step in range(1, STEPS):
        value, place, inside = _load_chunk(x, base, step, columns, high, wide, KIND, TILE)
        peak = tl.maximum(peak, _block_peak(value, RULE[1]))
    factor, scale = block_scale(peak, whole, FORMAT, RULE)
    tl.store(scales + block, scale, mask=high > 0)
    _gather(state, peak)
    for step in range(STEPS):
        if STEPS > 1:
            value, place, inside = _load_chunk(x, base, step, columns, high, wide, KIND, TILE)
        scaled = value * factor[:, None]
        draws = place
        if MODE == STOCHASTIC:
            draws = _draw_chunk(base + offset, step, columns, seed_low, seed_high, TILE)
        tl.store(codes + place, encode(scaled, draws, FORMAT, MODE), mask=inside)
        if FORMAT[6] < 0:  # the format has no NaN
            _gather(state + 1, tl.where(inside, as_int(scaled) & _MAGNITUDE, 0))


@triton.jit
def decode_matrix_kernel(
    codes,
    scales,
    amax,
    out,
    rows,
    columns,
    across,
    along,
    reciprocal,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = values of codes * scale of their block; SCALES: as `cuda_bits.Scales`; amax: float32 [1], of two levels."""
    row, column = _tile(rows, columns, ROWS, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = (row * columns)[:, None] + column[None, :]
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    block = (row // across * tl.cdiv(columns, along))[:, None] + (column // along)[None, :]
    factor = tl.load(scales + block, mask=inside, other=0)
    if SCALES == E8M0_SCALES:
        factor = from_e8m0(factor.to(tl.int32))
    elif SCALES == TWO_LEVEL_SCALES:
        factor = decode(factor.to(tl.int32), E4M3) * tl.load(amax) * reciprocal
    tl.store(out + place, decode(code, FORMAT) * factor, mask=inside)


@triton.jit
def _butterfly(y, GROUPS: tl.constexpr, APART: tl.constexpr):
    """Sums and differences of the elements APART from each other in each group of 16."""
    pairs = tl.permute(tl.reshape(y, [GROUPS, 8 // APART, 2, APART]), [0, 1, 3, 2])
    one, other = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(one + other, one - other), [0, 1, 3, 2]), [GROUPS, 16])


@triton.jit
def hadamard_kernel(x, out, columns, groups, per_row, KIND: tl.constexpr, GROUPS: tl.constexpr):
    """`octavo.reference.hadamard` of `groups` groups of 16, `per_row` to a row; out: bfloat16, as int16."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, 16)
    row, first = group // per_row, group % per_row * 16
    here = (group < groups)[:, None]
    inside = here & (lane[None, :] < (columns - first)[:, None])
    value = widen(tl.load(x + (row * columns + first)[:, None] + lane[None, :], mask=inside, other=0), KIND)
    minus = (tl.full([16], _MINUS, tl.int32) >> lane) & 1
    y = tl.where(minus[None, :] == 1, -value, value)
    for apart in tl.static_range(4):
        y = _butterfly(y, GROUPS, 1 << apart)
    turned = to_bfloat16(y * 0.25)
    tl.store(out + (group * 16)[:, None] + lane[None, :], turned, mask=here)
