"""What a GEMM and its casts cost on a chip: each kernel takes the longest of its arithmetic, its memory traffic and a floor.

Every tensor is read and written once, nothing stays in a cache between kernels, and kernels follow one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from octavo.diagnose.chips import Arithmetic, Chip
from octavo.diagnose.gemms import Shape
from octavo.scaling import Block, Current, Delayed, Row, Scaling, TwoLevel, Unscaled
from octavo.table import TensorSpec

__all__ = ["Cost", "cast", "held_bytes", "product", "sweep"]

_SOURCE = 2
"""Bytes of an element before it is cast: bfloat16."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Arithmetic, memory traffic and time of some kernels, one after another."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds)

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes if self.bytes else math.inf


def _kernel(chip: Chip, flops: float, bytes: float, rate: float) -> Cost:
    """One kernel; rate: TFLOP/s of its arithmetic."""
    compute, memory = flops / (rate * 1e12), bytes / (chip.bandwidth.value * 1e12)
    return Cost(flops, bytes, max(compute, memory, chip.floor.value * 1e-6))


def sweep(chip: Chip, bytes: float) -> Cost:
    """A kernel that reads and writes so many bytes and computes next to nothing."""
    return _kernel(chip, 0.0, bytes, math.inf)


def product(
    chip: Chip, arithmetic: Arithmetic, batch: int, shape: Shape, *, left: float, right: float, result: float
) -> Cost:
    """`batch` products at the chip's rate; left, right, result: bytes of all of them.  One kernel."""
    flops = 2.0 * batch * shape.m * shape.k * shape.n
    return _kernel(chip, flops, left + right + result, chip.peaks[arithmetic].value)


def _scale_bytes(scaling: Scaling, rows: int, along: int) -> float:
    """Bytes of the scales of a matrix [rows, along]; MX and two-level ones are held for each block of one row."""
    match scaling:
        case Unscaled() | Current() | Delayed():
            return 4.0
        case Row():
            return 4.0 * rows
        case Block(shape=(across, length), scale=scale):
            if scale.is_e8m0:
                return float(rows * math.ceil(along / length))
            return 4.0 * math.ceil(rows / across) * math.ceil(along / length)
        case TwoLevel(shape=(_, length)):
            return 4.0 + rows * math.ceil(along / length)


def held_bytes(spec: TensorSpec, batch: int, rows: int, along: int) -> float:
    """Bytes of the codes of `batch` matrices [rows, along], packed, and of their scales."""
    return batch * (rows * along * spec.format.bits / 8 + _scale_bytes(spec.scaling, rows, along))


def cast(chip: Chip, spec: TensorSpec, batch: int, rows: int, along: int, *, writes: float) -> Cost:
    """Casting `batch` bfloat16 matrices [rows, along]; writes: bytes that come of it.

    Scales of the whole tensor's amax, unless delayed, need a kernel that reads it first.
    """
    reads = float(_SOURCE * batch * rows * along)
    cost = sweep(chip, reads + writes)
    match spec.scaling:
        case Current() | TwoLevel():
            return sweep(chip, reads) + cost
        case Unscaled() | Delayed() | Row() | Block():
            return cost
