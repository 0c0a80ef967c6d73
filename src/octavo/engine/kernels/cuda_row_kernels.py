"""The engine's GPU kernels over rows, as Triton compiles them: softmax, cross-entropy, arg-max, sums, and copies of rows.

A row of scores belongs to one thread, which goes along it in order, so that sums have the bits of the CPU's.  That suits the few
classes of a classifier; rows of many thousands are slow.

Legend: rows, columns of a matrix; `i` numbers rows or results, `inside` says which are there.  Capital letters are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.engine.kernels.cuda_element_kernels import quotient

__all__ = ["PARTS", "ROWS", "WIDTH"]

ROWS = 128
"""Rows of scores to a program."""
WIDTH = 64
"""Sums, or words of a row, to a program."""
PARTS = 256
"""The most programs that share a sum of everything."""

_LOG2E, _LN2_HIGH, _LN2_LOW = (
    tl.constexpr(x) for x in (1.44269502162933349609375, 0.693359375, -2.12194441701285541e-4)
)
_LEAST = tl.constexpr(-87.30000305175781)


@triton.jit
def exp(x):
    """e**x to about an ulp for x up to 88, 0 below -87.3, NaN for NaN: as the CPU's, to the bit."""
    c = tl.where(x < _LEAST, _LEAST, x)
    n = tl.floor(c * _LOG2E + 0.5)
    r = (c - n * _LN2_HIGH) - n * _LN2_LOW
    p = tl.zeros_like(r) + 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < _LEAST, 0.0, (p * r * r + r + 1.0) * power)


@triton.jit
def log(x):
    """The natural logarithm, float32, rounded once from float64's."""
    return tl.log(x.to(tl.float64)).to(tl.float32)


@triton.jit
def _largest(row, inside, columns):
    """The largest number of each row, NaN where it holds one."""
    best = tl.load(row, mask=inside, other=0)
    for j in range(1, columns):
        value = tl.load(row + j, mask=inside, other=0)
        best = tl.where((value > best) | (value != value), value, best)
    return best


@triton.jit
def _total(row, best, inside, columns):
    """The sum, in order, of e to each number less the largest."""
    total = tl.zeros_like(best)
    for j in range(columns):
        total += exp(tl.load(row + j, mask=inside, other=0) - best)
    return total


@triton.jit
def softmax_kernel(x, out, rows, columns, LOGARITHM: tl.constexpr, LANES: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside, row = i < rows, x + i * columns
    best = _largest(row, inside, columns)
    total = _total(row, best, inside, columns)
    less = best + log(total)
    for j in range(columns):
        value = tl.load(row + j, mask=inside, other=0)
        found = value - less if LOGARITHM else tl.div_rn(exp(value - best), total)
        tl.store(out + i * columns + j, found, mask=inside)


@triton.jit
def report(word, rank, wrong):
    """Keep the largest rank of what is wrong at `word`, int32; 0 says that nothing is."""
    tl.atomic_max(word, tl.max(tl.where(wrong, rank, 0)), sem="relaxed")


@triton.jit
def cross_entropy_kernel(
    logits,
    labels,
    slopes,
    losses,
    upstream,
    wrong,
    rows,
    columns,
    share,
    GRADIENT: tl.constexpr,
    LOSS: tl.constexpr,
    UPSTREAM: tl.constexpr,
    LANES: tl.constexpr,
):
    """slopes: the gradient, share = 1 / rows; losses: the sum of each program's; wrong: rows less the first row with a wrong label."""
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside, row = i < rows, logits + i * columns
    label = tl.load(labels + i, mask=inside, other=0)
    bad = inside & ((label < 0) | (label >= columns))
    report(wrong, (rows - i).to(tl.int32), bad)
    inside = inside & (bad == 0)
    best = _largest(row, inside, columns)
    total = _total(row, best, inside, columns)
    if LOSS:
        loss = best + log(total) - tl.load(row + label, mask=inside, other=0)
        tl.store(losses + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0)))
    if GRADIENT:
        part = tl.zeros_like(best) + share
        if UPSTREAM:
            part = part * tl.load(upstream)
        for j in range(columns):
            value = tl.div_rn(exp(tl.load(row + j, mask=inside, other=0) - best), total) * part
            tl.store(slopes + i * columns + j, tl.where(label == j, value - part, value), mask=inside)


@triton.jit
def arg_max_kernel(x, out, rows, columns, LANES: tl.constexpr):
    """The first of the largest, or of NaN."""
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside, row = i < rows, x + i * columns
    best, found = tl.load(row, mask=inside, other=0), tl.zeros([LANES], tl.int64)
    for j in range(1, columns):
        value = tl.load(row + j, mask=inside, other=0)
        better = (best == best) & ((value > best) | (value != value))
        best, found = tl.where(better, value, best), tl.where(better, j, found)
    tl.store(out + i, found, mask=inside)


@triton.jit
def axis_sum_kernel(x, out, count, length, inner, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """out[i]: the sum, in order, of `length` numbers that lie `inner` apart."""
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside, start = i < count, (i // inner) * length * inner + i % inner
    total = tl.zeros([LANES], out.dtype.element_ty)
    whole = length // UNROLL * UNROLL
    for k in range(0, whole, UNROLL):
        for step in tl.static_range(UNROLL):  # loads that wait for nothing
            total += tl.load(x + start + (k + step) * inner, mask=inside, other=0)
    for k in range(whole, length):
        total += tl.load(x + start + k * inner, mask=inside, other=0)
    tl.store(out + i, total, mask=inside)


@triton.jit
def total_kernel(x, out, size, over, MEAN: tl.constexpr, LANES: tl.constexpr):
    """out[p]: the sum of what program p of all has; over `over` for the MEAN."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    total = tl.zeros([LANES], out.dtype.element_ty)
    for first in range(0, size, LANES * tl.num_programs(0)):
        total += tl.load(x + first + lane, mask=first + lane < size, other=0)
    found = tl.sum(total)
    tl.store(out + tl.program_id(0), quotient(found, tl.zeros_like(found) + over) if MEAN else found)


@triton.jit
def take_rows_kernel(x, numbers, out, wrong, total, words, count, LANES: tl.constexpr):
    """out[i] = x[numbers[i]], rows of so many words; wrong: as in cross_entropy_kernel, of numbers that are no row of `total`."""
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    row = i // words
    inside = row < count
    number = tl.load(numbers + row, mask=inside, other=0)
    bad = inside & ((number < 0) | (number >= total))
    report(wrong, (count - row).to(tl.int32), bad)
    inside = inside & (bad == 0)
    tl.store(out + i, tl.load(x + number * words + i % words, mask=inside), mask=inside)
