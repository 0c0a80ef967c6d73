"""Matrix products on the CPU, with what follows them done while a tile is still in the nearest cache.

C = alpha * A @ B, then in this order, each where asked for: + C, + bias, ReLU, zero where `mask` is not positive.  Each sum runs in
the order of K in pieces of DEPTH, each product and sum rounded once (fused), and the pieces are added in turn: the bits depend neither
on the size of a tile nor on the threads.

Legend: m, n, k are rows and columns of C and what is summed over; `a_m` is the distance in bytes from one m to the next in A.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
from numba import carray

from octavo.engine.kernels.launch import Kernel, inner, lane_kernel
from octavo.engine.kernels.tile import COLUMNS, LANES, ROWS, tile_of
from octavo.engine.kernels.tile import turn as _turn
from octavo.engine.storage import pool
from octavo.engine.tensor import Tensor
from octavo.kernels import threads
from octavo.kernels.element import _real64
from octavo.kernels.memory import at, wide_vectors

__all__ = ["DEPTH", "SCRATCH_BYTES", "Flag", "gemm", "product"]

DEPTH = 400
"""The longest piece of K that is summed in registers."""
TILES = 24
TALL = TILES * ROWS
"""Tiles and rows of A that are packed at a time; a tile is packed as wide as a vector."""
PANEL = DEPTH * COLUMNS
FAR = 2048
"""From so many bytes on between rows that are read together, they are packed: they would fall on the same lines of the cache."""


class Flag(enum.IntFlag):
    """What is done besides the product."""

    ADD = 1
    """C is added to."""
    BIAS = 2
    RELU = 4
    MASK = 8
    BY_COLUMNS = 16
    """Lanes share out columns of C, not rows."""


_ADD, _BIAS, _RELU, _MASK, _BY_COLUMNS = (int(flag) for flag in Flag)


class Slot(enum.IntEnum):
    """Where each argument lies, 8 bytes each; addresses and distances in bytes, ALPHA a float64.

    SCRATCH: SCRATCH_BYTES for each lane.  A_SCALE, B_SCALE: addresses of float32 scales that A and B were multiplied with, or 0.
    """

    A = 0
    A_M = 1
    A_K = 2
    B = 3
    B_K = 4
    B_N = 5
    C = 6
    C_M = 7
    M = 8
    N = 9
    K = 10
    FLAGS = 11
    BIAS = 12
    MASK = 13
    MASK_M = 14
    SCRATCH = 15
    A_SCALE = 16
    B_SCALE = 17
    ALPHA = 18
    WORDS = 19


(
    A, A_M, A_K, B, B_K, B_N, C, C_M, M, N, K, FLAGS, BIAS, MASK, MASK_M, SCRATCH, A_SCALE, B_SCALE, ALPHA, WORDS
) = (int(slot) for slot in Slot)  # fmt: skip


_SIZE, F32 = 4, np.float32
SCRATCH_BYTES = _SIZE * (PANEL + TILES * DEPTH * LANES + ROWS * COLUMNS)
"""What a lane needs: a panel of B, rows of A and a tile of C."""


def _pick() -> Any:
    """A compiled `pick(rows, ...)`: the tile of so many rows."""
    names = {f"tile_{rows}": tile_of(rows) for rows in range(1, ROWS + 1)}
    arguments = "a, a_m, a_k, b, b_k, c, c_m, k, alpha, add"
    lines = [f"def pick(rows, {arguments}):"]
    lines += [f"    if rows == {rows}: tile_{rows}({arguments})" for rows in range(1, ROWS + 1)]
    exec("\n".join(lines), names)  # Numba cannot call functions from a list by number
    return inner(names["pick"])


_tile = _pick()


@inner
def _floats(address, count):
    return carray(at(address), (count,), np.float32)


@inner
def _pack(source, down, along, rows, columns, target, pitch):
    """target[i, j] = the number at source + i * down + j * along, and anything from `columns` to `pitch`, which is whole vectors."""
    wide_vectors()
    whole = rows - rows % LANES if down == _SIZE and along != _SIZE else np.int64(0)
    for j in range(0, columns if whole else 0, LANES):
        for i in range(0, whole, LANES):
            place = target + _SIZE * (pitch * i + j)
            _turn(source + i * down + j * along, along, min(LANES, columns - j), place, _SIZE * pitch)
    for i in range(whole, rows):
        out = _floats(target + _SIZE * pitch * i, columns)
        if along == _SIZE:
            row = _floats(source + i * down, columns)
            for j in range(columns):
                out[j] = row[j]
        else:
            for j in range(columns):
                out[j] = _floats(source + i * down + j * along, 1)[0]


@inner
def _copy(source, source_m, target, target_m, rows, columns):
    wide_vectors()
    for m in range(rows):
        row, out = _floats(source + m * source_m, columns), _floats(target + m * target_m, columns)
        for n in range(columns):
            out[n] = row[n]


@inner
def _finish(c, c_m, rows, columns, factor, flags, bias, mask, mask_m):
    """What follows the product, on a tile."""
    wide_vectors()
    for m in range(rows):
        row = _floats(c + m * c_m, columns)
        if factor != F32(1):
            for n in range(columns):
                row[n] *= factor
        if flags & _BIAS:
            added = _floats(bias, columns)
            for n in range(columns):
                row[n] += added[n]
        if flags & _RELU:
            for n in range(columns):
                row[n] = F32(0) if row[n] < F32(0) else row[n]  # NaN stays
        if flags & _MASK:
            kept = _floats(mask + m * mask_m, columns)
            for n in range(columns):
                row[n] = row[n] if kept[n] > F32(0) else F32(0)


@lane_kernel
def gemm(address, lane, lanes):
    """C's part of a lane; `Slot` has the arguments."""
    p = carray(at(address), (WORDS,), np.int64)
    flags, alpha = p[FLAGS], _real64(p[ALPHA])
    for slot in (A_SCALE, B_SCALE):
        if p[slot]:
            alpha *= np.float64(F32(1) / _floats(p[slot], 1)[0])
    top, bottom, left, right = np.int64(0), p[M], np.int64(0), p[N]
    if flags & _BY_COLUMNS:
        panels = (p[N] + COLUMNS - 1) // COLUMNS
        left, right = panels * lane // lanes * COLUMNS, min(p[N], panels * (lane + 1) // lanes * COLUMNS)
    else:
        top, bottom = p[M] * lane // lanes, p[M] * (lane + 1) // lanes
    if bottom <= top or right <= left:
        return
    panel = p[SCRATCH] + lane * SCRATCH_BYTES
    packed, edge = panel + _SIZE * PANEL, panel + _SIZE * (PANEL + TILES * DEPTH * LANES)
    pieces = max(1, (p[K] + DEPTH - 1) // DEPTH)
    far = (p[A_K] if p[A_M] == _SIZE else p[A_M]) > FAR
    pack_a = (p[A_M] != _SIZE and p[A_K] != _SIZE) or (far and right - left >= 4 * COLUMNS)
    in_place = p[B_N] == _SIZE and (p[B_K] <= FAR or bottom - top < 4 * ROWS)
    tall = TALL if pack_a else bottom - top
    # A factor enters after the whole sum, unless the sum goes on top of what is there.
    at_once = flags & _ADD or pieces == 1
    factor, later = (F32(alpha), F32(1)) if at_once else (F32(1), F32(alpha))
    for piece in range(pieces):
        k0, k1 = p[K] * piece // pieces, p[K] * (piece + 1) // pieces
        depth, add = k1 - k0, piece > 0 or flags & _ADD != 0
        ends = piece == pieces - 1 and (later != F32(1) or flags & (_BIAS | _RELU | _MASK) != 0)
        for m0 in range(top, bottom, tall):
            rows = min(tall, bottom - m0)
            tiles = (rows + ROWS - 1) // ROWS
            if pack_a:
                for t in range(tiles):
                    r0, r1 = rows * t // tiles, rows * (t + 1) // tiles
                    source = p[A] + (m0 + r0) * p[A_M] + k0 * p[A_K]
                    _pack(source, p[A_K], p[A_M], depth, r1 - r0, packed + _SIZE * t * depth * LANES, LANES)
            for n0 in range(left, right, COLUMNS):
                columns = min(COLUMNS, right - n0)
                b, b_k = p[B] + n0 * p[B_N] + k0 * p[B_K], p[B_K]
                if columns < COLUMNS or not in_place:
                    _pack(b, b_k, p[B_N], depth, columns, panel, COLUMNS)
                    b, b_k = panel, np.int64(_SIZE * COLUMNS)
                for t in range(tiles):
                    r0, r1 = rows * t // tiles, rows * (t + 1) // tiles
                    m, high = m0 + r0, r1 - r0
                    a, a_m, a_k = p[A] + m * p[A_M] + k0 * p[A_K], p[A_M], p[A_K]
                    if pack_a:
                        a, a_m, a_k = packed + _SIZE * t * depth * LANES, np.int64(_SIZE), np.int64(_SIZE * LANES)
                    c, c_m = p[C] + m * p[C_M] + _SIZE * n0, p[C_M]
                    if columns == COLUMNS:
                        _tile(high, a, a_m, a_k, b, b_k, c, c_m, depth, factor, add)
                    else:
                        if add:
                            _copy(c, c_m, edge, _SIZE * COLUMNS, high, columns)
                        _tile(high, a, a_m, a_k, b, b_k, edge, _SIZE * COLUMNS, depth, factor, add)
                        _copy(edge, _SIZE * COLUMNS, c, c_m, high, columns)
                    if ends:
                        mask = p[MASK] + m * p[MASK_M] + _SIZE * n0
                        _finish(c, c_m, high, columns, later, flags, p[BIAS] + _SIZE * n0, mask, p[MASK_M])


_gemm = Kernel("gemm", gemm, "<18qd")
_WORTH = 1 << 18
"""Below so many multiply-adds, another thread costs more than it saves."""


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    alpha: float = 1.0,
    add: bool = False,
    bias: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
    scales: tuple[int, int] = (0, 0),
) -> None:
    """out = alpha * a @ b (+ out) (+ bias), then ReLU, then 0 where mask is not positive; alpha over the float32 numbers at `scales`.

    a: [M, K], b: [K, N], any strides; out, mask: [M, N] with rows contiguous; bias: [N]; float32 all.
    """
    (m, k), n = a.shape, b.shape[1]
    flags = _ADD * add | _BIAS * (bias is not None) | _RELU * relu | _MASK * (mask is not None)
    lanes = threads.count() if m * n * k >= _WORTH else 1
    panels = -(-n // COLUMNS)
    if panels >= 2 * lanes or (n > m and panels >= lanes):
        flags |= _BY_COLUMNS
    scratch = pool().take(lanes * SCRATCH_BYTES)
    _gemm(
        lanes,
        a.address,
        a.strides[0] * _SIZE,
        a.strides[1] * _SIZE,
        b.address,
        b.strides[0] * _SIZE,
        b.strides[1] * _SIZE,
        out.address,
        out.strides[0] * _SIZE,
        m,
        n,
        k,
        flags,
        0 if bias is None else bias.address,
        0 if mask is None else mask.address,
        0 if mask is None else mask.strides[0] * _SIZE,
        scratch.address,
        *scales,
        alpha,
    )
