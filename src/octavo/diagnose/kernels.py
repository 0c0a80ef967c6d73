"""Which kernel of a chip multiplies two operands as a recipe casts them, and why none does."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from octavo.diagnose.chips import Arithmetic, Chip, Kernel, Scales
from octavo.diagnose.gemms import Kind
from octavo.formats import BFLOAT16, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FLOAT16, TF32, Format
from octavo.scaling import Block, Current, Delayed, Row, Scaling, TwoLevel, Unscaled
from octavo.table import Accumulator, Gemm, TensorSpec

__all__ = ["Match", "Runs", "kernel_for", "scales_of"]

_WIDE = {BFLOAT16: Arithmetic.BF16, FLOAT16: Arithmetic.FP16, TF32: Arithmetic.TF32}
_E5M2 = (E5M2, E5M2FNUZ)
_FNUZ = {E4M3FN: E4M3FNUZ, E5M2: E5M2FNUZ}
"""What AMD's first 8-bit units multiply in place of OCP's formats."""
_HOPPER = (Accumulator.HOPPER_FAST, Accumulator.HOPPER_SPLIT)


class Runs(enum.Enum):
    """Whether a GEMM really runs in 8 bits or fewer."""

    YES = "yes"
    """Octavo runs it on the chip's own units."""
    COULD = "could"
    """The chip and a library of its maker's could; Octavo emulates it."""
    NO = "no"
    """Nothing there multiplies such operands; Octavo emulates them."""
    HIGH = "-"
    """It is left in high precision."""


@dataclass(frozen=True, slots=True)
class Match:
    """What multiplies the operands of a GEMM."""

    kernel: Kernel | Arithmetic | None
    """A kernel of 8 bits or fewer, or the plain GEMM of that arithmetic; None where nothing does and they are emulated."""
    runs: Runs
    reason: str
    """Why it does not run in 8 bits, or not in Octavo; empty where it does."""
    emulated: bool
    """Whether Octavo emulates it."""


def kernel_for(row: Gemm, kind: Kind, chip: Chip, high: Arithmetic) -> Match:
    """The kernel for a row of a recipe's table; high: of operands that it leaves uncast."""
    left, right = row.left, row.right
    if left is None and right is None:
        return Match(high, Runs.HIGH, "the recipe leaves both operands in high precision", emulated=False)
    if left is None or right is None:
        return _none(f"the recipe leaves its {'left' if left is None else 'right'} operand in high precision")
    if min(left.format.bits, right.format.bits) > 8:
        return _wide(left.format, right.format, chip)
    if not chip.kernels:
        return _none(f"{chip.name} has no units for 8 bits")
    found = _fitting(left, right, chip)
    if isinstance(found, str):
        return _none(found)
    if row.accumulator in _HOPPER and not chip.hopper_sums:
        return _none(f"{row.accumulator.value} sums are Hopper's alone; give the GEMM Accumulator.FLOAT32")
    return _in_octavo(found, row.accumulator, kind)


def _none(reason: str) -> Match:
    return Match(None, Runs.NO, reason, emulated=True)


def _wide(left: Format, right: Format, chip: Chip) -> Match:
    """Operands of more than 8 bits."""
    arithmetic = _WIDE.get(left)
    if left != right or arithmetic is None or arithmetic not in chip.peaks:
        return Match(None, Runs.HIGH, f"{chip.name} has no kernel for {left.name} x {right.name}", emulated=True)
    return Match(arithmetic, Runs.HIGH, f"operands of {left.name}, which Octavo emulates", emulated=True)


def _single(scaling: Scaling) -> tuple[Scales, int] | None:
    """The scales of one operand, and how many rows a block of them has."""
    match scaling:
        case Unscaled() | Current() | Delayed():
            return Scales.TENSOR, 1
        case Row():
            return Scales.ROW, 1
        case Block(shape=(across, 32), scale=scale) if scale.is_e8m0:
            return Scales.MX, across
        case Block(shape=(1 | 128 as across, 128), scale=scale) if not scale.is_e8m0:
            return Scales.BLOCKS_128, across
        case TwoLevel(shape=(across, 16)):
            return Scales.NVFP4, across
        case Block() | TwoLevel():
            return None


def scales_of(left: Scaling, right: Scaling) -> Scales | None:
    """The scales that a kernel has to take for two operands; None where no kernel takes such a pair."""
    one, other = _single(left), _single(right)
    if one is None or other is None:
        return None
    if one == other == (Scales.BLOCKS_128, 128):
        return None
    if {one[0], other[0]} == {Scales.TENSOR, Scales.ROW}:
        return Scales.ROW  # of rows that have all the same
    return one[0] if one[0] is other[0] else None


def _fitting(left: TensorSpec, right: TensorSpec, chip: Chip) -> Kernel | str:
    """The kernel of a chip for two casts, or why there is none."""
    formats = (left.format, right.format)
    fitting = [kernel for kernel in chip.kernels if all(format in kernel.formats for format in formats)]
    if not fitting:
        return _unknown_formats(formats, chip)
    scales = scales_of(left.scaling, right.scaling)
    scaled = [kernel for kernel in fitting if kernel.scales is scales]
    if not scaled:
        known = ", ".join(kernel.scales.value for kernel in fitting)
        return f"{chip.name} takes no scales as of {left} x {right}, only {known}"
    if all(format in _E5M2 for format in formats) and not scaled[0].both_e5m2:
        return f"{chip.name} does not multiply E5M2 by E5M2"
    return scaled[0]


def _unknown_formats(formats: tuple[Format, Format], chip: Chip) -> str:
    known = list(dict.fromkeys(format for kernel in chip.kernels for format in kernel.formats))
    fnuz = [_FNUZ[format].name for format in formats if _FNUZ.get(format) in known]
    if fnuz:
        return f"{chip.name} multiplies FNUZ formats ({', '.join(dict.fromkeys(fnuz))}), not OCP's {formats[0].name} x {formats[1].name}"
    return f"{chip.name} has no kernel for {formats[0].name} x {formats[1].name}"


def _in_octavo(kernel: Kernel, accumulator: Accumulator, kind: Kind) -> Match:
    """Whether Octavo calls the kernel."""
    if kernel.in_octavo and kind.flat:
        return Match(kernel, Runs.YES, "", emulated=False)
    if accumulator in _HOPPER:
        reason = f"Octavo refuses {accumulator.value} sums of these operands on a GPU"
    elif kernel.in_octavo:
        reason = (
            f"only products of two plain matrices reach these units in Octavo, which emulates the rest ({kind.value})"
        )
    else:
        reason = f"Octavo emulates operands with such scales ({kernel.scales.value})"
    return Match(kernel, Runs.COULD, reason, emulated=True)
