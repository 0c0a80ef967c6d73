"""Convolution as a matrix product: the patches of images as rows of a matrix, and the sums of such rows back into images.

    patches: [N, H, W, C] -> [N * down * across, rows * columns * C]      fold: its transpose

N images, H rows, W columns, C channels; a window of `rows` x `columns` pixels moves by `stride` over the image with `padding` zeros on each
side, and stands in `down` x `across` places.  Lanes share out images, so that every sum has one order: that of the places.
"""

from __future__ import annotations

import enum
import struct
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from octavo.engine.kernels.launch import Kernel, inner, lane_kernel, refuse
from octavo.engine.kernels.memory import FLOAT32, contiguous, lanes_for
from octavo.engine.tensor import Tensor, empty
from octavo.kernels.memory import at, wide_vectors

__all__ = ["fold", "patches", "take_runs"]

VECTOR = 16
"""float32 numbers that are moved at once."""


class Slot(enum.IntEnum):
    """Arguments, int64 each: addresses of the images and of the matrix, then sizes."""

    IMAGES = 0
    MATRIX = 1
    COUNT = 2
    HEIGHT = 3
    WIDTH = 4
    CHANNELS = 5
    ROWS = 6
    COLUMNS = 7
    STRIDE = 8
    PADDING = 9
    DOWN = 10
    ACROSS = 11
    WORDS = 12


(
    IMAGES, MATRIX, COUNT, HEIGHT, WIDTH, CHANNELS, ROWS, COLUMNS, STRIDE, PADDING, DOWN, ACROSS, WORDS
) = (int(slot) for slot in Slot)  # fmt: skip


@intrinsic
def _move(typing_context, source, target):
    """Copy VECTOR numbers from one address to another."""

    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(ir.FloatType(), VECTOR).as_pointer()
        source, target = (builder.inttoptr(one, vector) for one in arguments)
        builder.store(builder.load(source, align=4), target, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@inner
def _floats(address, count):
    return carray(at(address), (count,), np.float32)


@inner
def _copy(source, pitch, target, rows, count):
    """Copy rows of so many numbers, `pitch` bytes apart, one after the other."""
    for row in range(rows):
        x, out = _floats(source + row * pitch, count), _floats(target + 4 * row * count, count)
        for i in range(count):
            out[i] = x[i]


@inner
def _copy_loosely(source, pitch, target, rows, count):
    """The same, in vectors: up to VECTOR - 1 numbers more are read and written."""
    if count <= VECTOR:
        for row in range(rows):
            _move(source + row * pitch, target + 4 * row * count)
    else:
        for row in range(rows):
            for i in range(0, count, VECTOR):
                _move(source + row * pitch + 4 * i, target + 4 * (row * count + i))


@inner
def _zero(target, count):
    out = _floats(target, count)
    for i in range(count):
        out[i] = np.float32(0)


@inner
def _add(source, target, count):
    x, out = _floats(source, count), _floats(target, count)
    for i in range(count):
        out[i] += x[i]


@inner
def _inside(place, stride, padding, window, size):
    """Where a window at that place begins in the image, and the first and the last + 1 of its pixels that lie in it."""
    start = place * stride - padding
    first, last = max(0, -start), min(window, size - start)
    return start, min(first, window), max(last, min(first, window))


@lane_kernel
def _patches(address, lane, lanes):
    """The rows of a lane's images."""
    wide_vectors()
    (images, matrix, count, height, width, channels, rows, columns, stride, padding, places_down, places_across) = (
        carray(at(address), (WORDS,), np.int64)
    )
    pixel, whole = 4 * channels, columns * channels
    first, last = count * lane // lanes, count * (lane + 1) // lanes
    into = matrix + 4 * first * places_down * places_across * rows * whole
    least = min(height * width * channels, places_down * places_across * rows * whole)
    for image in range(first, last):
        source = images + image * height * width * pixel
        # What is written too far is written again, and what is read too far is there, as long as the lane has images to come.
        loose = (last - 1 - image) * least >= VECTOR
        for down in range(places_down):
            top, above, below = _inside(down, stride, padding, rows, height)
            for across in range(places_across):
                left, before, after = _inside(across, stride, padding, columns, width)
                corner = source + (top * width + left) * pixel
                if below - above == rows and after - before == columns:
                    if loose:
                        _copy_loosely(corner, width * pixel, into, rows, whole)
                    else:
                        _copy(corner, width * pixel, into, rows, whole)
                else:
                    _zero(into, rows * whole)
                    for row in range(above, below):
                        begin = (row * columns + before) * pixel
                        _copy(corner + (row * width + before) * pixel, 0, into + begin, 1, (after - before) * channels)
                into += 4 * rows * whole


@lane_kernel
def _fold(address, lane, lanes):
    """The sums of a lane's images."""
    wide_vectors()
    (images, matrix, count, height, width, channels, rows, columns, stride, padding, places_down, places_across) = (
        carray(at(address), (WORDS,), np.int64)
    )
    pixel = 4 * channels
    source = matrix + (count * lane // lanes) * places_down * places_across * rows * columns * pixel
    for image in range(count * lane // lanes, count * (lane + 1) // lanes):
        target = images + image * height * width * pixel
        _zero(target, height * width * channels)
        for down in range(places_down):
            top, above, below = _inside(down, stride, padding, rows, height)
            for across in range(places_across):
                left, before, after = _inside(across, stride, padding, columns, width)
                corner = target + (top * width + left + before) * pixel
                for row in range(above, below):
                    begin = source + (row * columns + before) * pixel
                    _add(begin, corner + row * width * pixel, (after - before) * channels)
                source += rows * columns * pixel


@lane_kernel
def _take_runs(address, lane, lanes):
    """x, its size, starts (int64), how many, numbers in a run, out, the first bad one's place + 1."""
    p = carray(at(address), (7,), np.int64)
    x, size, count, length, out = p[0], p[1], p[3], p[4], p[5]
    starts = carray(at(p[2]), (count,), np.int64)
    for i in range(count * lane // lanes, count * (lane + 1) // lanes):
        start = starts[i]
        if start < 0 or start > size - length:
            p[6] = i + 1
            continue
        _copy(x + 4 * start, 0, out + 4 * i * length, 1, length)


_take_runs_kernel = Kernel("take_runs", _take_runs, "<7q")
_patches_kernel = Kernel("patches", _patches, "<12q")
_fold_kernel = Kernel("fold", _fold, "<12q")


def _sizes(name: str, shape: tuple[int, ...], window: Any, stride: Any, padding: Any) -> tuple[int, int, int, int]:
    """(rows, columns, down, across) of a window on images of that shape.  Raises ValueError where there are none."""
    sides = (window, window) if isinstance(window, int) else window
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise ValueError(f"octavo::{name}: a window is one number or (rows, columns); got {window}")
    rows, columns = sides
    if len(shape) != 4:
        raise ValueError(f"octavo::{name} takes images [N, H, W, C]; got a shape {list(shape)}: reshape it")
    if min(rows, columns, stride) < 1 or padding < 0:
        raise ValueError(
            f"octavo::{name} takes a window and a stride from 1 and a padding from 0; got {rows} x {columns}, {stride} and {padding}"
        )
    down, across = (
        (size + 2 * padding - side) // stride + 1 for size, side in zip(shape[1:3], (rows, columns), strict=True)
    )
    if min(down, across) < 1:
        raise ValueError(
            f"octavo::{name}: a window of {rows} x {columns} is larger than {shape[1]} x {shape[2]} pixels with padding {padding}; pad more"
        )
    return rows, columns, down, across


def patches(x: Tensor, window: Any, stride: int, padding: int) -> Tensor:
    """The rows: compiled for float32, by NumPy for the rest."""
    rows, columns, down, across = _sizes("patches", x.shape, window, stride, padding)
    count, channels = x.shape[0], x.shape[3]
    x = contiguous(x)
    out = empty((count * down * across, rows * columns * channels), x.dtype)
    if x.dtype == FLOAT32:
        _patches_kernel(
            min(lanes_for(out.size), max(1, count)),
            x.address, out.address, *x.shape, rows, columns, stride, padding, down, across,
        )  # fmt: skip
        return out
    refuse(f"patches of {x.dtype} are copied by NumPy")
    padded = np.pad(x.array, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    places = out.array.reshape(count, down, across, rows, columns, channels)
    for row in range(rows):
        for column in range(columns):
            places[:, :, :, row, column] = padded[
                :, row : row + stride * down : stride, column : column + stride * across : stride
            ][:, :down, :across]
    return out


def fold(matrix: Tensor, shape: Any, window: Any, stride: int, padding: int) -> Tensor:
    """The images: compiled for float32, by NumPy for the rest, in the same order of sums."""
    shape = tuple(shape)
    rows, columns, down, across = _sizes("fold", shape, window, stride, padding)
    count, height, width, channels = shape
    if matrix.shape != (count * down * across, rows * columns * channels):
        raise ValueError(
            f"octavo::fold makes images {list(shape)} of a matrix {[count * down * across, rows * columns * channels]}; got "
            f"{list(matrix.shape)}"
        )
    matrix = contiguous(matrix)
    out = empty(shape, matrix.dtype)
    if matrix.dtype == FLOAT32:
        _fold_kernel(
            min(lanes_for(matrix.size), max(1, count)),
            out.address, matrix.address, *shape, rows, columns, stride, padding, down, across,
        )  # fmt: skip
        return out
    refuse(f"a matrix of {matrix.dtype} is folded by NumPy")
    sums = np.zeros((count, height + 2 * padding, width + 2 * padding, channels), matrix.dtype)
    places = matrix.array.reshape(count, down, across, rows, columns, channels)
    for row in reversed(range(rows)):  # a pixel's lowest place is that of its window's last row
        for column in reversed(range(columns)):
            part = sums[:, row : row + stride * down : stride, column : column + stride * across : stride]
            part[:, :down, :across] += places[:, :, :, row, column]
    np.copyto(out.array, sums[:, padding : padding + height, padding : padding + width])
    return out


def take_runs(x: Tensor, starts: Tensor, length: int) -> Tensor:
    """Compiled, for float32 alone."""
    if x.dtype != FLOAT32 or starts.dtype != np.int64 or starts.ndim != 1 or not starts.is_contiguous or length < 1:
        raise ValueError(
            f"octavo::take_runs takes float32 numbers, contiguous int64 starts [N] and a length from 1; got {x.dtype}, {starts.dtype} "
            f"{list(starts.shape)} and {length}"
        )
    x = contiguous(x)
    out = empty((starts.size, length), x.dtype)

    def check(block: Any) -> None:
        bad = struct.unpack_from("<q", block, 48)[0]
        if bad:
            struct.pack_into("<q", block, 48, 0)
            raise ValueError(
                f"octavo::take_runs: start {bad - 1} is {starts.array[bad - 1]}, and a run of {length} begins from 0 to {x.size - length}"
            )

    addresses = x.address, x.size, starts.address, starts.size, length, out.address
    _take_runs_kernel(lanes_for(out.size), *addresses, 0, check=check)
    return out
