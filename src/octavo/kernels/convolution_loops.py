"""The kernels of `octavo.kernels.convolution`, as Numba compiles them.

They lay a sample's channels out in planes (`octavo.kernels.convolution_plan`) that stay in cache, and multiply from there by the tiles
of `octavo.kernels.dots`.  Sums run in an order that depends on the shapes alone, whatever the threads.
"""

from __future__ import annotations

import enum

import numpy as np
from numba import carray

from octavo.kernels.dots import (
    LANES,
    move_row,
    round_row,
    rows_tile,
    shifts_tile,
    spread_pairs,
    spread_row,
    spread_wide_pairs,
    spread_wide_row,
)
from octavo.kernels.element import F32, U32, _real64, compiled, kernel
from octavo.kernels.memory import at as _at
from octavo.kernels.memory import atomic_add as _atomic_add
from octavo.kernels.memory import atomic_max as _atomic_max
from octavo.kernels.memory import to_read, to_write

__all__ = ["ACROSS", "DOWN", "ROWS", "Slot", "convolve", "grad_weight", "pair_weights"]

ROWS = 8
"""Channels of a result that a tile holds."""
DOWN, ACROSS = 4, 6
"""Rows and columns of a tile of the weight's gradient."""


class Slot(enum.IntEnum):
    """Arguments, 8 bytes each."""

    SOURCE = 0
    """[samples, channels, high, wide]."""
    SAMPLES = 1
    CHANNELS = 2
    HIGH = 3
    WIDE = 4
    PHASES = 5
    """Addresses and lengths of a plan's words."""
    PHASE_COUNT = 6
    PARTS = 7
    PART_COUNT = 8
    OFFSETS = 9
    STEP_Y = 10
    STEP_X = 11
    PLANE_HIGH = 12
    PLANE_WIDE = 13
    WEIGHT = 14
    """As words of pairs of channels: of each part [channels of the result / 8, channels / 2, taps, 8]."""
    TARGET = 15
    """float32 [samples, results, ...]."""
    RESULTS = 16
    """Channels of it."""
    TARGET_PLANE = 17
    """Numbers of one."""
    FACTOR = 18
    """float64."""
    BIAS = 19
    """The address of float32 [results], or 0."""
    NEXT = 20
    """Samples, or groups of them, taken so far."""
    GRAD = 21
    """[samples, results, rows, columns]: the gradient of the output."""
    GRAD_HIGH = 22
    GRAD_WIDE = 23
    GROUP = 24
    """Samples taken together."""
    SPACE = 25
    """Numbers of a sample's planes, some beyond their end included."""
    SOURCE_BYTES = 26
    """Of a number of the source: 4 where it is float32 that bfloat16 holds."""
    GRAD_BYTES = 27
    MODE = 28
    """The address of the seven words by which `octavo.kernels.dots.round_row` rounds results, or 0."""
    AMAX = 29
    """The bits of the largest magnitude before it."""
    SCRATCH = 30
    """Memory to work in, so many bytes for each thread, a multiple of 64."""
    SCRATCH_BYTES = 31
    LANE = 32
    """Threads that began."""
    END = 33


SOURCE, SAMPLES, CHANNELS, HIGH, WIDE, PHASES, PHASE_COUNT, PARTS, PART_COUNT = (int(slot) for slot in list(Slot)[:9])
OFFSETS, STEP_Y, STEP_X, PLANE_HIGH, PLANE_WIDE, WEIGHT, TARGET, RESULTS = (int(slot) for slot in list(Slot)[9:17])
TARGET_PLANE, FACTOR, BIAS, NEXT, GRAD, GRAD_HIGH, GRAD_WIDE, GROUP, SPACE = (int(slot) for slot in list(Slot)[17:26])
SOURCE_BYTES, GRAD_BYTES, MODE, AMAX, SCRATCH, SCRATCH_BYTES, LANE, END = (int(slot) for slot in list(Slot)[26:])
_one, _two, _three = rows_tile(ROWS, 1), rows_tile(ROWS, 2), rows_tile(ROWS, 3)
_shifts = shifts_tile(DOWN, ACROSS)


@compiled
def _span(first, step, size, wide):
    """From which number of a plane's row, up to which, `first + step * number` lies in 0 .. size - 1."""
    low = max(0, -(first // step))
    return low, max(low, min(wide, (size - 1 - first) // step + 1))


@compiled
def _lay_pairs(p, source, planes):
    """A sample's channels, two by two, as planes of words."""
    high, wide, n, width = p[PLANE_HIGH], p[PLANE_WIDE], p[PHASE_COUNT], p[SOURCE_BYTES]
    phases = carray(_at(p[PHASES]), (n, 2), np.int64)
    plane = width * p[HIGH] * p[WIDE]
    for pair in range((p[CHANNELS] + 1) // 2):
        low = source + 2 * pair * plane
        both = np.int64(2 * pair + 1 < p[CHANNELS])
        high_half = low + both * plane
        for phase in range(n):
            left, right = _span(phases[phase, 1], p[STEP_X], p[WIDE], wide)
            top, bottom = _span(phases[phase, 0], p[STEP_Y], p[HIGH], high)
            for q in range(top, bottom):
                row = phases[phase, 0] + p[STEP_Y] * q
                place = width * (row * p[WIDE] + phases[phase, 1] + p[STEP_X] * left)
                into = planes + 4 * (((pair * n + phase) * high + q) * wide + left)
                if p[STEP_X] > 1:
                    words = carray(_at(into), (right - left,), np.uint32)
                    for i in range(right - left):
                        moved = place + i * p[STEP_X] * width
                        words[i] = U32(_number(low + moved, width))
                        if both:
                            words[i] |= U32(_number(high_half + moved, width)) << U32(16)
                elif width == 4:
                    spread_wide_pairs(low + place, high_half + place, both, into, right - left)
                else:
                    spread_pairs(low + place, high_half + place, both, into, right - left)


@compiled
def _number(address, width):
    """The bits of the bfloat16 number there, which may fill the upper half of a float32."""
    return carray(_at(address + width - 2), (1,), np.uint16)[0]


@compiled
def _lay(p, source, planes):
    """A sample's channels as planes of bfloat16 numbers."""
    high, wide, n, width = p[PLANE_HIGH], p[PLANE_WIDE], p[PHASE_COUNT], p[SOURCE_BYTES]
    phases = carray(_at(p[PHASES]), (n, 2), np.int64)
    for channel in range(p[CHANNELS]):
        for phase in range(n):
            left, right = _span(phases[phase, 1], p[STEP_X], p[WIDE], wide)
            top, bottom = _span(phases[phase, 0], p[STEP_Y], p[HIGH], high)
            for q in range(top, bottom):
                row = channel * p[HIGH] + phases[phase, 0] + p[STEP_Y] * q
                place = source + width * (row * p[WIDE] + phases[phase, 1] + p[STEP_X] * left)
                into = planes + 2 * (((channel * n + phase) * high + q) * wide + left)
                if p[STEP_X] == 1:
                    _lay_row(place, into, right - left, width)
                else:
                    out = carray(_at(into), (right - left,), np.uint16)
                    for i in range(right - left):
                        out[i] = _number(place + i * p[STEP_X] * width, width)


@compiled
def _lay_row(source, into, count, width):
    if width == 4:
        spread_wide_row(source, into, count)
    else:
        spread_row(source, into, count)


@compiled
def _multiply(planes, plane, pairs, offsets, taps, w, vectors, out, pitch, ahead, lines, target, rows):
    """8 channels of 16 * vectors results that lie side by side, three vectors or two at a time.

    ahead, lines, target, rows: addresses, and how many lines of the cache to ask for there meanwhile, to read and to overwrite.
    """
    j = 0
    while j < vectors:
        left = vectors - j
        following = min(vectors, j + 3)
        for line in range(lines * j // vectors, lines * following // vectors):
            to_read(ahead + 64 * line)
        for line in range(rows * j // vectors, rows * following // vectors):
            to_write(target + 64 * line)
        if left == 1:
            _one(planes + 64 * j, plane, pairs, offsets, taps, w, out + 64 * j, pitch)
            j += 1
        elif left == 2 or left == 4:
            _two(planes + 64 * j, plane, pairs, offsets, taps, w, out + 64 * j, pitch)
            j += 2
        else:
            _three(planes + 64 * j, plane, pairs, offsets, taps, w, out + 64 * j, pitch)
            j += 3


@compiled
def _put(p, part, columns, scratch, channel, target, peaks):
    """A channel of a part's results, scaled and with the bias, rounded if they are to be, to where they belong."""
    factor, wide = F32(_real64(p[FACTOR])), p[PLANE_WIDE]
    bias = carray(_at(p[BIAS]), (p[RESULTS],), np.float32)[channel] if p[BIAS] else F32(0)
    start = target + 4 * (channel * p[TARGET_PLANE] + part[4])
    for row in range(part[2]):
        source, into = scratch + 4 * row * wide, start + 4 * row * part[5]
        target_row = into if part[6] == 1 else source
        if p[MODE]:
            round_row(source, target_row, columns, factor, bias, p[MODE], peaks)
        else:
            move_row(source, target_row, columns, factor, bias, 0, peaks)
        if part[6] > 1:
            values = carray(_at(source), (columns,), np.float32)
            out = carray(_at(into), (columns * part[6],), np.float32)
            for i in range(columns):
                out[i * part[6]] = values[i]


@compiled
def _own_scratch(p, arguments, zeros):
    """The address of the calling thread's memory, so many bytes of which are made zero; a multiple of 8."""
    address = p[SCRATCH] + _atomic_add(arguments + 8 * LANE, 1) * p[SCRATCH_BYTES]
    carray(_at(address), (zeros // 8,), np.int64)[:] = 0
    return address


@kernel
def convolve(arguments):
    """A thread takes a sample, lays it out, and multiplies all weights with it."""
    p = carray(_at(arguments), (END,), np.int64)
    parts, pairs = carray(_at(p[PARTS]), (p[PART_COUNT], 7), np.int64), (p[CHANNELS] + 1) // 2
    plane, blocks = 4 * p[PHASE_COUNT] * p[PLANE_HIGH] * p[PLANE_WIDE], (p[RESULTS] + ROWS - 1) // ROWS
    planes, longest = _own_scratch(p, arguments, 4 * p[SPACE]), 0
    for i in range(p[PART_COUNT]):
        longest = max(longest, (parts[i, 2] - 1) * p[PLANE_WIDE] + parts[i, 3])
    pitch = (longest + LANES - 1) // LANES * LANES
    scratch, peaks = planes + 4 * p[SPACE], np.zeros(LANES, np.int32)
    size, following = p[SOURCE_BYTES] * p[CHANNELS] * p[HIGH] * p[WIDE], _atomic_add(arguments + 8 * NEXT, 1)
    lines = size // (64 * max(1, blocks * p[PART_COUNT]))
    while following < p[SAMPLES]:
        sample, following = following, _atomic_add(arguments + 8 * NEXT, 1)
        ahead = p[SOURCE] + size * min(following, p[SAMPLES] - 1)  # asked for while this sample is multiplied
        _lay_pairs(p, p[SOURCE] + size * sample, planes)
        target, weight = p[TARGET] + 4 * sample * p[RESULTS] * p[TARGET_PLANE], p[WEIGHT]
        for i in range(p[PART_COUNT]):
            part = parts[i]
            vectors = ((part[2] - 1) * p[PLANE_WIDE] + part[3] + LANES - 1) // LANES
            for block in range(blocks):
                w = weight + 4 * block * pairs * part[0] * ROWS
                offsets = p[OFFSETS] + 8 * part[1]
                rows = min(ROWS, p[RESULTS] - block * ROWS)
                into = target + 4 * block * ROWS * p[TARGET_PLANE]
                written = rows * p[TARGET_PLANE] // (16 * p[PART_COUNT])
                given = ahead + 64 * lines * (i * blocks + block), lines, into, written
                _multiply(planes, plane, pairs, offsets, part[0], w, vectors, scratch, 4 * pitch, *given)
                for r in range(rows):
                    row = scratch + 4 * r * pitch
                    _put(p, part, part[3], row, block * ROWS + r, target, peaks.ctypes.data)
            weight += 4 * blocks * pairs * part[0] * ROWS
    if p[MODE]:
        _atomic_max(arguments + 8 * AMAX, np.int64(peaks.max()))


@kernel
def grad_weight(arguments):
    """A thread takes a group of samples, lays them out, and sums over them: float32 [groups, results, channels x taps], filled up."""
    p = carray(_at(arguments), (END,), np.int64)
    part, n = carray(_at(p[PARTS]), (7,), np.int64), p[CHANNELS]
    taps, wide = part[0], p[PLANE_WIDE]
    steps = ((p[GRAD_HIGH] - 1) * wide + p[GRAD_WIDE] + 2 * LANES - 1) // (2 * LANES)
    row, down = 2 * LANES * steps, (p[RESULTS] + DOWN - 1) // DOWN * DOWN
    across = (n * taps + ACROSS - 1) // ACROSS * ACROSS
    plane, taken = 2 * p[PHASE_COUNT] * p[PLANE_HIGH] * wide, carray(_at(p[OFFSETS]), (taps,), np.int64)
    offsets = np.zeros(across, np.int64)
    for j in range(n * taps):
        offsets[j] = j // taps * plane + taken[j % taps]
    planes = _own_scratch(p, arguments, p[SCRATCH_BYTES])
    grads = planes + 2 * p[SPACE] * p[GROUP]
    size = p[SOURCE_BYTES] * n * p[HIGH] * p[WIDE]
    while True:
        group = _atomic_add(arguments + 8 * NEXT, 1)
        first = group * p[GROUP]
        if first >= p[SAMPLES]:
            return
        samples = min(p[GROUP], p[SAMPLES] - first)
        for s in range(samples):
            _lay(p, p[SOURCE] + size * (first + s), planes + 2 * s * p[SPACE])
            for r in range(p[RESULTS]):
                for q in range(p[GRAD_HIGH]):
                    place = (((first + s) * p[RESULTS] + r) * p[GRAD_HIGH] + q) * p[GRAD_WIDE]
                    into = grads + 2 * ((s * down + r) * row + q * wide)
                    _lay_row(p[GRAD] + p[GRAD_BYTES] * place, into, p[GRAD_WIDE], p[GRAD_BYTES])
        for r in range(0, down, DOWN):
            for j in range(0, across, ACROSS):
                _shifts(
                    grads + 2 * r * row,
                    2 * row,
                    2 * down * row,
                    planes,
                    offsets.ctypes.data + 8 * j,
                    2 * p[SPACE],
                    samples,
                    steps,
                    p[TARGET] + 4 * ((group * down + r) * across + j),
                    4 * across,
                )


@compiled
def pair_weights(weight, taps, out):
    """out[result / 8, channels / 2, taps, 8], words, of weight [results, channels, places], bits; what is not there is zero."""
    results, channels, _ = weight.shape
    for block in range(out.shape[0]):
        for pair in range(out.shape[1]):
            for i in range(taps.size):
                for r in range(ROWS):
                    word = U32(0)
                    if block * ROWS + r < results:
                        word = U32(weight[block * ROWS + r, 2 * pair, taps[i]])
                        if 2 * pair + 1 < channels:
                            word |= U32(weight[block * ROWS + r, 2 * pair + 1, taps[i]]) << U32(16)
                    out[block, pair, i, r] = word
