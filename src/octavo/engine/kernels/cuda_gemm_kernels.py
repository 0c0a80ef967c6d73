"""The engine's matrix products on the GPU, as Triton compiles them, with what follows them done in registers.

A float32 dot product without tensor cores is a chain of fused multiply-adds along K.  Chains are cut where the CPU cuts its own, in
pieces of at most `gemm.DEPTH` that are added in turn, so the bits are the same whatever the tile.

Legend: m, n, k are rows and columns of C and what is summed over; a_m is the distance in elements from one m to the next in A.
Capital letters are constants: TILE is (rows, columns, depth) of what a program has in hand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.engine.kernels.gemm import DEPTH as LONGEST
from octavo.kernels.cuda_bits import STOCHASTIC, as_int, draw, encode

__all__ = ["LARGE", "SMALL"]

SMALL, LARGE = (16, 32, 32), (64, 64, 32)
"""Tiles for a result that would keep few processors busy, and for others."""
_LONGEST, _MAGNITUDE = tl.constexpr(LONGEST), tl.constexpr(0x7FFFFFFF)


@triton.jit
def pieces_of(K):
    """Into how many pieces a sum of K products is cut; piece i goes from K * i // pieces to K * (i + 1) // pieces."""
    return tl.maximum(1, tl.cdiv(K, _LONGEST))


@triton.jit
def piece_sum(a_rows, b_columns, has_row, has_column, first, last, a_k, b_k, TILE: tl.constexpr):
    """The sums, from zero, over k from `first` to before `last`; a_rows, b_columns: where each row of A and column of B begins."""
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, DEPTH):
        k = start + tl.arange(0, DEPTH)
        has = k < last
        a = tl.load(a_rows[:, None] + k[None, :] * a_k, mask=has_row[:, None] & has[None, :], other=0.0)
        b = tl.load(b_columns[None, :] + k[:, None] * b_k, mask=has[:, None] & has_column[None, :], other=0.0)
        found = tl.dot(a, b, found, input_precision="ieee")
    return found


@triton.jit(do_not_specialize=("seed_low", "seed_high", "offset"))
def gemm_kernel(
    a,
    b,
    c,
    bias,
    mask,
    a_scale,
    b_scale,
    codes,
    scale,
    amax,
    M,
    N,
    K,
    a_m,
    a_k,
    b_k,
    b_n,
    c_m,
    mask_m,
    alpha,
    seed_low,
    seed_high,
    offset,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    MASK: tl.constexpr,
    SCALED: tl.constexpr,
    FORMAT: tl.constexpr,
    MODE: tl.constexpr,
    TILE: tl.constexpr,
):
    """c = alpha * a @ b (+ c) (+ bias), ReLU, 0 where mask is not positive; alpha over a_scale and b_scale where SCALED.

    With a FORMAT, of `cuda_bits.constants`, also codes of c * scale, [M, N], and c's amax, its bits in an int32.
    """
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    across = tl.cdiv(N, COLUMNS)
    m = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_column = m < M, n < N
    inside = has_row[:, None] & has_column[None, :]
    m, n = m.to(tl.int64), n.to(tl.int64)
    place = m[:, None] * c_m + n[None, :]
    factor = tl.zeros([1, 1], tl.float32) + alpha
    if SCALED:
        one = tl.full([1, 1], 1.0, tl.float32)
        wide = factor.to(tl.float64) * tl.div_rn(one, one * tl.load(a_scale)).to(tl.float64)
        factor = (wide * tl.div_rn(one, one * tl.load(b_scale)).to(tl.float64)).to(tl.float32)
    pieces = pieces_of(K)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    if ADD:
        found = tl.load(c + place, mask=inside, other=0.0)
    for piece in range(pieces):
        first, last = K * piece // pieces, K * (piece + 1) // pieces
        part = piece_sum(a + m * a_m, b + n * b_n, has_row, has_column, first, last, a_k, b_k, TILE)
        found = found + factor * part if ADD else tl.where(piece == 0, part, found + part)
    if not ADD:
        found = factor * found
    if BIAS:
        found = found + tl.load(bias + n, mask=has_column, other=0.0)[None, :]
    if RELU:
        found = tl.where(found < 0, 0.0, found)  # NaN stays
    if MASK:
        kept = tl.load(mask + m[:, None] * mask_m + n[None, :], mask=inside, other=0.0)
        found = tl.where(kept > 0, found, 0.0)
    tl.store(c + place, found, mask=inside)
    if FORMAT[0] >= 0:
        dense = m[:, None] * N + n[None, :]
        draws = dense
        if MODE == STOCHASTIC:
            draws = draw(offset.to(tl.int64) + dense, seed_low, seed_high)
        tl.store(codes + dense, encode(found * tl.load(scale), draws, FORMAT, MODE), mask=inside)
        tl.atomic_max(amax, tl.max(tl.where(inside, as_int(found) & _MAGNITUDE, 0)), sem="relaxed")
