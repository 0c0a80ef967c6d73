"""Kernels over rows of float32: softmax, cross-entropy, arg-max, sums down the columns, and copies of rows.

Lanes share out rows or columns; what sums over rows does so in an order that their number does not change.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from octavo.engine.kernels.launch import Kernel, inner, lane_kernel
from octavo.kernels.element import I32, _real
from octavo.kernels.memory import at, ordered_add, wide_vectors

__all__ = ["GROUP", "arg_max", "column_sums", "cross_entropy", "softmax", "take_rows"]

F32 = np.float32
GROUP = 64
"""Rows whose losses are added up first; the sums of groups follow in their order."""
LOG2E, LN2_HIGH, LN2_LOW = F32(1.4426950408889634), F32(0.693359375), F32(-2.12194440e-4)
LEAST = F32(-87.3)


@inner
def exp(x):
    """e**x to about an ulp for x up to 88, 0 below -87.3 (where float32 becomes subnormal), NaN for NaN; in vectors."""
    c = LEAST if x < LEAST else x
    n = np.floor(c * LOG2E + F32(0.5))
    r = (c - n * LN2_HIGH) - n * LN2_LOW
    p = F32(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + F32(coefficient)
    power = _real(I32(I32(n) + I32(127)) << I32(23))
    return F32(0) if x < LEAST else (p * r * r + r + F32(1)) * power


@inner
def _floats(address, count):
    return carray(at(address), (count,), np.float32)


@inner
def _largest(row):
    """The largest number of a row, NaN where it holds one."""
    best = row[0]
    for j in range(1, row.size):
        best = row[j] if row[j] > best or row[j] != row[j] else best
    return best


@inner
def _exponentials(row, best, out):
    """out = exp(row - best); returns the sum, in float32, in order."""
    wide_vectors()
    for j in range(row.size):
        out[j] = exp(row[j] - best)
    total = F32(0)
    for j in range(row.size):
        total += out[j]
    return total


@lane_kernel
def _softmax(address, lane, lanes):
    """x, out, rows, columns, whether of the logarithm."""
    x, out, rows, columns, logarithm = carray(at(address), (5,), np.int64)
    for i in range(rows * lane // lanes, rows * (lane + 1) // lanes):
        row, into = _floats(x + 4 * i * columns, columns), _floats(out + 4 * i * columns, columns)
        best = _largest(row)
        total = _exponentials(row, best, into)
        if logarithm:
            power = F32(math.log(total))
            for j in range(columns):
                into[j] = (row[j] - best) - power
        else:
            for j in range(columns):
                into[j] /= total


@lane_kernel
def _cross_entropy(address, lane, lanes):
    """logits, labels, gradient or 0, loss, losses of groups, rows, columns, upstream or 0, how many lanes are done, a bad row + 1
    and its label."""
    p = carray(at(address), (11,), np.int64)
    logits, gradient, loss, losses, rows, columns = p[0], p[2], p[3], p[4], p[5], p[6]
    labels = carray(at(p[1]), (rows,), np.int64)
    share = F32(1) / F32(rows)
    if p[7]:
        share *= _floats(p[7], 1)[0]
    own = np.empty(columns, np.float32)
    groups = (rows + GROUP - 1) // GROUP
    for group in range(groups * lane // lanes, groups * (lane + 1) // lanes):
        total = F32(0)
        for i in range(group * GROUP, min(rows, (group + 1) * GROUP)):
            row, label = _floats(logits + 4 * i * columns, columns), labels[i]
            if label < 0 or label >= columns:
                p[9], p[10] = i + 1, label
                continue
            into = _floats(gradient + 4 * i * columns, columns) if gradient else own
            best = _largest(row)
            sum_ = _exponentials(row, best, into)
            total += F32(math.log(sum_)) - (row[label] - best)
            if gradient:
                for j in range(columns):
                    into[j] = into[j] / sum_ * share
                into[label] -= share
        if loss:
            _floats(losses + 4 * group, 1)[0] = total
    if loss and ordered_add(address + 64, 1) == lanes - 1:
        p[8] = 0
        total, parts = F32(0), _floats(losses, groups)
        for group in range(groups):
            total += parts[group]
        _floats(loss, 1)[0] = total / F32(rows)


@lane_kernel
def _arg_max(address, lane, lanes):
    """x, out (int64), rows, columns: the first of the largest, or of NaN."""
    x, out, rows, columns = carray(at(address), (4,), np.int64)
    found = carray(at(out), (rows,), np.int64)
    for i in range(rows * lane // lanes, rows * (lane + 1) // lanes):
        row, best = _floats(x + 4 * i * columns, columns), 0
        for j in range(1, columns):
            if row[best] == row[best] and (row[j] > row[best] or row[j] != row[j]):
                best = j
        found[i] = best


@inner
def _add_row(row, out):
    wide_vectors()
    for j in range(out.size):
        out[j] += row[j]


@lane_kernel
def _column_sums(address, lane, lanes):
    """x, out, rows, columns, bytes from row to row: sums in the order of the rows."""
    x, out, rows, columns, pitch = carray(at(address), (5,), np.int64)
    vectors = (columns + 15) // 16
    first, last = vectors * lane // lanes * 16, min(columns, vectors * (lane + 1) // lanes * 16)
    if last <= first:
        return
    into = _floats(out + 4 * first, last - first)
    into[:] = F32(0)
    for i in range(rows):
        _add_row(_floats(x + i * pitch + 4 * first, last - first), into)


@lane_kernel
def _take_rows(address, lane, lanes):
    """x, its rows, bytes of a row, numbers of rows (int64), how many, out, a bad one's place + 1 and itself."""
    p = carray(at(address), (8,), np.int64)
    count, size = p[4], p[2]
    numbers = carray(at(p[3]), (count,), np.int64)
    for i in range(count * lane // lanes, count * (lane + 1) // lanes):
        number = numbers[i]
        if number < 0 or number >= p[1]:
            p[6], p[7] = i + 1, number
            continue
        if size % 4 == 0:
            source, words = carray(at(p[0] + number * size), (size // 4,), np.int32), size // 4
            target = carray(at(p[5] + i * size), (words,), np.int32)
            for j in range(words):
                target[j] = source[j]
        else:
            bytes_, into = (
                carray(at(p[0] + number * size), (size,), np.uint8),
                carray(at(p[5] + i * size), (size,), np.uint8),
            )
            for j in range(size):
                into[j] = bytes_[j]


softmax = Kernel("softmax", _softmax, "<5q")
cross_entropy = Kernel("cross_entropy", _cross_entropy, "<11q")
arg_max = Kernel("arg_max", _arg_max, "<4q")
column_sums = Kernel("column_sums", _column_sums, "<5q")
take_rows = Kernel("take_rows", _take_rows, "<8q")
