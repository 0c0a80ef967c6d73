"""How a convolution of images lies as the tiles of `octavo.kernels.convolution`: planes of the source, taps into them, results.

A source is laid out in planes of its own, filled with zeros where the padding is, so that a tap of the kernel is one offset for all
results of a row and of the rows after it.  A stride splits a source into phases, each of every stride-th row and column; in the gradient
of the input it splits the results instead.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Geometry", "Part", "Plan", "backward_plan", "forward_plan"]


class Geometry(NamedTuple):
    """A two-dimensional convolution of one group: [H, W] by filters [KH, KW]; pairs are (rows, columns)."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def output(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        high, wide = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(*self, strict=True)
        )
        return high, wide


class Part(NamedTuple):
    """Results that share their taps: rows by columns of them."""

    taps: tuple[int, ...]
    """Which of the kernel's places, row by row."""
    offsets: tuple[int, ...]
    """Of each: numbers from the first of a plane to what the first result takes."""
    rows: int
    columns: int
    start: int
    """Where in a plane of the target the first result goes, and how far apart they are."""
    row_step: int
    column_step: int


class Plan(NamedTuple):
    """A source's planes and the parts of the result."""

    phases: tuple[tuple[int, int], ...]
    """Of each: the row and the column of the source that lie first in its plane, negative in the padding."""
    step: tuple[int, int]
    """Rows and columns of the source from one number of a plane to the next."""
    high: int
    wide: int
    """Of a phase's plane."""
    parts: tuple[Part, ...]

    @property
    def numbers(self) -> int:
        """Numbers of a channel's planes."""
        return len(self.phases) * self.high * self.wide

    def words(self, width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Phases, parts and offsets as the kernels read them: int64, offsets in bytes; width: of a number of a plane."""
        first, parts = 0, []
        for part in self.parts:
            parts.append((len(part.taps), first, part.rows, part.columns, part.start, part.row_step, part.column_step))
            first += len(part.taps)
        offsets = [width * offset for part in self.parts for offset in part.offsets]
        return tuple(np.array(numbers, np.int64) for numbers in (self.phases, parts, offsets))  # type: ignore[return-value]


def _taps(geometry: Geometry) -> list[tuple[int, int]]:
    """Rows and columns from a result's first tap to each."""
    high, wide = geometry.kernel
    return [
        (y * geometry.dilation[0], x * geometry.dilation[1]) for y, x in itertools.product(range(high), range(wide))
    ]


@functools.lru_cache(maxsize=1024)
def forward_plan(geometry: Geometry) -> Plan:
    """The convolution itself: planes of the input."""
    (sy, sx), (py, px), (rows, columns) = geometry.stride, geometry.padding, geometry.output
    taps = _taps(geometry)
    phases = sorted({(y % sy, x % sx) for y, x in taps})
    high, wide = rows + max(y // sy for y, _ in taps), columns + max(x // sx for _, x in taps)
    offsets = [phases.index((y % sy, x % sx)) * high * wide + y // sy * wide + x // sx for y, x in taps]
    part = Part(tuple(range(len(taps))), tuple(offsets), rows, columns, 0, columns, 1)
    return Plan(tuple((y - py, x - px) for y, x in phases), geometry.stride, high, wide, (part,))


@functools.lru_cache(maxsize=1024)
def backward_plan(geometry: Geometry) -> Plan:
    """The gradient of the input: planes of the output's gradient, a part for each phase of the input."""
    taps = _taps(geometry)
    spans, tops = zip(*(_spans(geometry, axis, [tap[axis] for tap in taps]) for axis in (0, 1)), strict=True)
    top, left = tops
    high, wide = (
        tops[axis] + max(geometry.output[axis], *(end - down for _, end, down in spans[axis].values()))
        for axis in (0, 1)
    )
    parts = []
    for ry, rx in itertools.product(range(geometry.stride[0]), range(geometry.stride[1])):
        (y0, y1, _), (x0, x1, _) = spans[0][ry], spans[1][rx]
        if y1 <= y0 or x1 <= x0:
            continue
        mine = [i for i, (y, x) in enumerate(taps) if (y % geometry.stride[0], x % geometry.stride[1]) == (ry, rx)]
        offsets = [
            (y0 - taps[i][0] // geometry.stride[0] + top) * wide + x0 - taps[i][1] // geometry.stride[1] + left
            for i in mine
        ]
        row, column = (
            y0 * geometry.stride[0] + ry - geometry.padding[0],
            x0 * geometry.stride[1] + rx - geometry.padding[1],
        )
        start, row_step = row * geometry.size[1] + column, geometry.stride[0] * geometry.size[1]
        parts.append(Part(tuple(mine), tuple(offsets), y1 - y0, x1 - x0, start, row_step, geometry.stride[1]))
    return Plan(((-top, -left),), (1, 1), high, wide, tuple(parts))


def _spans(geometry: Geometry, axis: int, taps: list[int]) -> tuple[dict[int, tuple[int, int, int]], int]:
    """Of each phase of the input along an axis: its first place, the one after its last, and its nearest tap; and the zeros before."""
    stride, padding, size = geometry.stride[axis], geometry.padding[axis], geometry.size[axis]
    spans, before = {}, 0
    for phase in range(stride):
        first, end = -((phase - padding) // stride), (size - 1 + padding - phase) // stride + 1
        downs = [tap // stride for tap in taps if tap % stride == phase]
        spans[phase] = first, end, min(downs, default=0)
        before = max(before, max(downs, default=0) - first)
    return spans, before
