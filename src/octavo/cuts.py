"""Where a quantised tensor may be cut: its operand matrix, the blocks of that, and the parts that slices choose between them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from octavo.reference import block_shape
from octavo.scaling import Block, Current, Delayed, Row, TwoLevel, Unscaled
from octavo.table import TensorSpec, Transform

__all__ = ["Cut", "choose", "held_columns", "matrix_shape", "take"]

Places: TypeAlias = npt.NDArray[np.int64]
"""Rows or columns of a matrix, ascending."""


def matrix_shape(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """(rows, columns) of the operand matrix of a tensor."""
    if axis not in (0, -1):
        raise ValueError(
            f"the contracted axis is -1, the last, or 0, all the leading ones; got {axis}: move the axis there first"
        )
    if len(shape) < 2:
        return 1, math.prod(shape)
    leading, last = math.prod(shape[:-1]), shape[-1]
    return (last, leading) if axis == 0 else (leading, last)


def held_columns(spec: TensorSpec, columns: int) -> int:
    """Columns as the spec's transform fills them up."""
    return -(-columns // 16) * 16 if spec.transform is Transform.HADAMARD else columns


class Cut(NamedTuple):
    """What a part of a tensor takes from the whole."""

    shape: tuple[int, ...]
    """Of the part."""
    rows: Places
    """Of the operand matrix."""
    columns: Places
    """The same, as a transform filled them up."""
    block_rows: Places
    """Of the scales."""
    block_columns: Places
    """The same."""


def choose(index: Any, shape: tuple[int, ...], axis: int, spec: TensorSpec) -> Cut:
    """The part of a tensor of `shape`, contracted along `axis`, that slices choose.

    Raises ValueError for a bound inside a block, and for an index that is no slice of step 1.
    """
    bounds = _bounds(index, shape)
    row_axes, column_axes = range(len(shape))[:-1], range(len(shape))[-1:]
    if axis == 0 and len(shape) > 1:
        row_axes, column_axes = column_axes, row_axes
    unit_rows, unit_columns = _units(spec)
    rows = _kept(bounds, shape, row_axes, unit_rows, spec)
    columns = _kept(bounds, shape, column_axes, unit_columns, spec)
    all_rows, all_columns = matrix_shape(shape, axis)
    held = held_columns(spec, all_columns)
    if len(columns) and columns[-1] == all_columns - 1:
        columns = np.concatenate([columns, np.arange(all_columns, held)])
    across, along = block_shape(spec, all_rows, held)
    part = tuple(stop - start for start, stop in bounds)
    return Cut(part, rows, columns, np.unique(rows // across), np.unique(columns // along))


def _units(spec: TensorSpec) -> tuple[int, int]:
    """How many rows and columns of the operand matrix cannot be parted; a scale that a whole axis shares parts nowhere."""
    match spec.scaling:
        case Block(shape=shape) | TwoLevel(shape=shape):
            across, along = shape
        case Unscaled() | Current() | Delayed() | Row():
            across = along = 1
    return across, math.lcm(along, 16) if spec.transform is Transform.HADAMARD else along


def _bounds(index: Any, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, stop) of each axis."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if (at := next((i for i, part in enumerate(parts) if part is Ellipsis), None)) is not None:
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    if len(parts) > len(shape):
        raise ValueError(f"{len(shape)} axes take as many slices; got {len(parts)}")
    parts += [slice(None)] * (len(shape) - len(parts))
    bounds = []
    for axis, (part, size) in enumerate(zip(parts, shape, strict=True)):
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise ValueError(
                f"a quantised tensor is cut by slices of step 1; axis {axis} got {part!r}: decode() it first"
            )
        start, stop, _ = part.indices(size)
        bounds.append((start, max(start, stop)))
    return bounds


def _kept(bounds: list[tuple[int, int]], shape: tuple[int, ...], axes: range, unit: int, spec: TensorSpec) -> Places:
    """The rows (or columns) of the operand matrix, made of `axes`, that the bounds keep; blocks hold `unit` of them."""
    sizes = [shape[axis] for axis in axes]
    for place, axis in enumerate(axes):
        size = sizes[place]
        step = unit // math.gcd(unit, math.prod(sizes[place + 1 :]))
        if math.prod(sizes[:place]) > 1 and size % step:
            step = size  # blocks run on from one index of the axes before to the next
        for bound in bounds[axis]:
            if bounds[axis] != (0, size) and bound % step and bound != size:
                low = bound // step * step
                raise ValueError(
                    f"axis {axis} is cut at {bound}, inside a block of {spec}, of which {unit} along it go together; cut at {low} or "
                    f"{min(low + step, size)}, or decode() first"
                )
    every = np.arange(math.prod(sizes)).reshape(sizes)
    return np.asarray(every[tuple(slice(*bounds[axis]) for axis in axes)]).reshape(-1)


def take(x: Any, places: Places, axis: int) -> Any:
    """The rows (axis 0) or columns (1) of an array that are at `places`: a view, in NumPy and torch, where they lie side by side."""
    first, count = (int(places[0]) if len(places) else 0), len(places)
    if count and places[-1] - first + 1 != count:
        return x[places] if axis == 0 else x[:, places]
    return x[first : first + count] if axis == 0 else x[:, first : first + count]
