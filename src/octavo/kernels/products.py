"""Products of bfloat16 matrices with float32 sums, as kernels: exact products of 8-bit operands.

`product` calls oneMKL's GEMM, which is fast where the processor has AMX.  `pack` and `multiply` lay the operands out for PyTorch's
`brgemm` tile by tile, which needs AVX-512's bfloat16 instruction alone; a product is the one kernel, or those two in turn.  All take
one block of arguments, `Product`, so that a chain runs either.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from octavo.kernels.element import F32, U16, U32, _real64, compiled, kernel
from octavo.kernels.loops import SCALE, _wide_vectors
from octavo.kernels.memory import at as _at
from octavo.kernels.memory import atomic_add as _atomic_add

__all__ = ["PLAIN", "ROW_MAJOR", "TRANSPOSED", "Product", "caller", "multiply", "pack", "product", "scratch_bytes"]

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112
"""How CBLAS spells a layout, and whether an operand is transposed."""


class Product(enum.IntEnum):
    """Arguments, 8 bytes each, of C[m, n] = factor / scale / scale * A @ B + bias; A, B bfloat16, C, bias float32, in row-major memory."""

    GEMM = 0
    """The address of `cblas_gemm_bf16bf16f32`, or of brgemm."""
    A_ORDER = 1
    B_ORDER = 2
    M = 3
    N = 4
    K = 5
    A_STRIDE = 6
    B_STRIDE = 7
    FIRST = 8
    """Bytes from this block to the arguments of a cast whose scale is undone; 0 for none."""
    SECOND = 9
    A = 10
    B = 11
    C = 12
    BIAS = 13
    """An address, or 0."""
    FACTOR = 14
    """float64."""
    SCRATCH = 15
    """The address of `scratch_bytes` of memory; this and what follows is brgemm's alone."""
    NEXT_ROWS = 16
    """Work taken so far; 0 at first, as the next two."""
    NEXT_PANEL = 17
    LANE = 18
    WORDS = 19


GEMM, A_ORDER, B_ORDER, M, N, K, A_STRIDE, B_STRIDE, FIRST, SECOND, A, B, C, BIAS, FACTOR = (
    int(slot) for slot in list(Product)[:15]
)
SCRATCH, NEXT_ROWS, NEXT_PANEL, LANE, WORDS = (int(slot) for slot in list(Product)[15:])
ROWS, PANEL, DEPTH = 128, 64, 1024
"""A tile: rows of C, columns of C, and how much of K is multiplied at a time.  They fix the order of sums whatever the threads."""
GROUP = 1024
"""Rows of A that a thread multiplies with a panel."""
EDGE, PIECE = 16, 128
"""Words of a tile that is turned at once, and words that a thread packs of a row of A at a time."""
PANEL_WORDS = DEPTH // 2 * PANEL
"""32-bit words of a thread's piece of B, whose pairs along K lie together."""


def scratch_bytes(m: int, k: int, a_transposed: bool, threads: int) -> int:
    """What brgemm's two kernels need beside the operands."""
    return 4 * PANEL_WORDS * threads + (m * (k + k % 2) * 2 if a_transposed or k % 2 else 0)


def caller(arguments: str) -> Any:
    """A compiled `f(address, arguments)` that calls the C function there; a letter each: i int32, f float32, p 64 bits."""
    letters = {"i": ir.IntType(32), "f": ir.FloatType(), "p": ir.IntType(64)}
    seen = {"i": types.int32, "f": types.float32, "p": types.int64}

    @intrinsic
    def call(typing_context, address, values):
        def generate(context, builder, signature, given):
            kinds = [letters[letter] for letter in arguments]
            function = builder.inttoptr(given[0], ir.FunctionType(ir.VoidType(), kinds).as_pointer())
            builder.call(function, [builder.extract_value(given[1], i) for i in range(len(kinds))])
            return context.get_dummy_value()

        return types.void(types.int64, types.Tuple([seen[letter] for letter in arguments])), generate

    return call


_call_gemm, _call_brgemm = caller("iiiiiifpipifpi"), caller("p" * 11)


@compiled
def _factor(address):
    """What the product is multiplied with: the factor given, over the scales of the casts that this block names."""
    p = carray(_at(address), (WORDS,), np.int64)
    factor = _real64(p[FACTOR])
    for slot in (FIRST, SECOND):
        if p[slot]:
            scale = _real64(carray(_at(address + p[slot]), (SCALE + 1,), np.int64)[SCALE])
            factor *= np.float64(F32(1.0 / scale))
    return F32(factor)


@kernel
def product(address):
    """By oneMKL, in one call that takes the threads it wants."""
    p = carray(_at(address), (WORDS,), np.int64)
    c = carray(_at(p[C]), (p[M], p[N]), np.float32)
    if p[BIAS]:
        bias = carray(_at(p[BIAS]), (p[N],), np.float32)
        for i in range(p[M]):
            c[i] = bias
    i32 = np.int32
    orders = i32(ROW_MAJOR), i32(p[A_ORDER]), i32(p[B_ORDER])
    sizes = i32(p[M]), i32(p[N]), i32(p[K])
    operands = _factor(address), p[A], i32(p[A_STRIDE]), p[B], i32(p[B_STRIDE])
    _call_gemm(p[GEMM], orders + sizes + operands + (F32(1.0) if p[BIAS] else F32(0.0), p[C], i32(p[N])))


@compiled
def _turn(words, pitch, out):
    """out[j] = words[j * pitch]"""
    _wide_vectors()
    for j in range(out.size):
        out[j] = words[np.int64(j) * pitch]


@compiled
def _pairs(place, apart, out):
    """out[j] = the bfloat16 numbers at place[j] and, `apart` bytes further on, its partner (0: zero), as the halves of a word."""
    _wide_vectors()
    low, high = carray(_at(place), (out.size,), np.uint16), carray(_at(place + apart), (out.size,), np.uint16)
    if apart:
        for j in range(out.size):
            out[j] = U32(low[j]) | (U32(high[j]) << U32(16))
    else:
        for j in range(out.size):
            out[j] = U32(low[j])


@compiled
def _far_pairs(place, stride, whole, out):
    """out[j] = the two numbers at place[j * stride], or the one and zero."""
    numbers = carray(_at(place), (out.size * stride + 2,), np.uint16)
    for j in range(out.size):
        high = numbers[j * stride + 1] if whole else U16(0)
        out[j] = U32(numbers[j * stride]) | (U32(high) << U32(16))


@kernel
def pack(address):
    """A as [M, K] in the scratch memory, K filled up to an even number with zeros, where it is transposed or K is odd."""
    p = carray(_at(address), (WORDS,), np.int64)
    m, k, stride = p[M], p[K], p[A_STRIDE]
    if p[A_ORDER] != TRANSPOSED and k % 2 == 0:
        return
    words = (k + 1) // 2
    along = (words + PIECE - 1) // PIECE
    tile = np.empty(
        EDGE * (PANEL + 1), np.uint32
    )  # a row of odd length, lest all rows fall on the same lines of the cache
    while True:
        item = _atomic_add(address + 8 * NEXT_ROWS, 1)
        first, start = item // along * PANEL, item % along * PIECE
        if first >= m:
            return
        rows = min(PANEL, m - first)
        for left in range(start, min(start + PIECE, words), EDGE):
            edge = min(EDGE, words - left)
            for i in range(edge):
                whole = 2 * (left + i) + 1 < k
                out = tile[i * (PANEL + 1) : i * (PANEL + 1) + rows]
                if p[A_ORDER] == TRANSPOSED:
                    _pairs(p[A] + 2 * (2 * (left + i) * stride + first), 2 * stride if whole else 0, out)
                else:
                    _far_pairs(p[A] + 2 * (first * stride + 2 * (left + i)), stride, whole, out)
            for j in range(rows):
                place = p[SCRATCH] + 4 * ((first + j) * words + left)
                _turn(tile[j:], PANEL + 1, carray(_at(place), (edge,), np.uint32))


@compiled
def _pack_panel(p, first, columns, start, depth, panel, tile):
    """Columns and rows of B as pairs along K: panel[depth / 2, columns], uint32."""
    stride, words = p[B_STRIDE], (depth + 1) // 2
    if p[B_ORDER] != TRANSPOSED:
        for pair in range(words):
            apart = 2 * stride if 2 * pair + 1 < depth else 0
            out = panel[pair * columns : (pair + 1) * columns]
            _pairs(p[B] + 2 * ((start + 2 * pair) * stride + first), apart, out)
        return
    place = p[B] + 2 * (first * stride + start)
    if stride % 2 or depth % 2 or place % 4:
        for pair in range(words):
            out = panel[pair * columns : (pair + 1) * columns]
            _far_pairs(place + 4 * pair, stride, 2 * pair + 1 < depth, out)
        return
    for left in range(0, words, EDGE):
        edge = min(EDGE, words - left)
        for j in range(columns):
            row = carray(_at(place + 2 * j * stride + 4 * left), (edge,), np.uint32)
            _copy(row, tile[j * (EDGE + 1) : j * (EDGE + 1) + edge])
        for i in range(edge):
            _turn(tile[i:], EDGE + 1, panel[(left + i) * columns : (left + i + 1) * columns])


@compiled
def _copy(source, target):
    _wide_vectors()
    for j in range(target.size):
        target[j] = source[j]


@compiled
def _finish(c, factor, bias, biased):
    _wide_vectors()
    if biased:
        for j in range(c.size):
            c[j] = F32(c[j] * factor) + bias[j]
    else:
        for j in range(c.size):
            c[j] = c[j] * factor


@kernel
def multiply(address):
    """By brgemm; a thread takes a panel of B and some rows of A, packs a piece of the panel and multiplies the rows with that."""
    p = carray(_at(address), (WORDS,), np.int64)
    m, n, k, factor = p[M], p[N], p[K], _factor(address)
    packed = p[A_ORDER] == TRANSPOSED or k % 2
    a_stride, a = (k + k % 2, p[SCRATCH]) if packed else (p[A_STRIDE], p[A])
    lane = _atomic_add(address + 8 * LANE, 1)
    scratch = p[SCRATCH] + (2 * m * a_stride if packed else 0) + 4 * lane * PANEL_WORDS
    panel, groups = carray(_at(scratch), (PANEL_WORDS,), np.uint32), (m + GROUP - 1) // GROUP
    tile = np.empty(PANEL * (EDGE + 1), np.uint32)
    while True:
        item = _atomic_add(address + 8 * NEXT_PANEL, 1)
        first, top = item // groups * PANEL, item % groups * GROUP
        if first >= n:
            return
        columns, bottom = min(PANEL, n - first), min(top + GROUP, m)
        for start in range(0, k, DEPTH):
            depth = min(DEPTH, k - start)
            _pack_panel(p, first, columns, start, depth, panel, tile)
            for row in range(top, bottom, ROWS):
                rows, c = min(ROWS, bottom - row), p[C] + 4 * (row * n + first)
                left, before = a + 2 * (row * a_stride + start), np.int64(start > 0)
                sizes = rows, columns, depth + depth % 2, a_stride, columns, n
                _call_brgemm(p[GEMM], sizes + (before, left, scratch, c, np.int64(1)))  # noqa: RUF005 (Numba has no unpacking)
        if factor != F32(1) or p[BIAS]:
            bias = carray(_at(p[BIAS] + 4 * first), (columns,), np.float32)
            for row in range(top, bottom):
                c = carray(_at(p[C] + 4 * (row * n + first)), (columns,), np.float32)
                _finish(c, factor, bias, p[BIAS] != 0)
