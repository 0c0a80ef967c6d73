"""GEMM operands: a cell of a recipe's table that casts, what comes of it, and the product of two.

T tokens, I input features, O output features; an operand matrix is [rows, contracted], and `last` says whether its values lie so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.formats import BFLOAT16, E4M3FN, E8M0FNU, FLOAT16, Format
from octavo.kernels import cpu, matrices
from octavo.kernels.scales import current_scale
from octavo.kernels.unpack import unpack
from octavo.reference import block_shape
from octavo.rounding import Overflow, Rounding
from octavo.scaling import Block, BlockScale, Current, Delayed, Row, TwoLevel, Unscaled, scales_in_codes
from octavo.table import TensorSpec, Transform
from octavo.torch.gemm import dense, inverse, operand_dtype
from octavo.torch.watching import watch

__all__ = ["KINDS", "Cast", "Operand", "Packed", "decoded", "plain"]

KINDS = {
    torch.float32: cpu.Kind.FLOAT32,
    torch.bfloat16: cpu.Kind.BFLOAT16,
    torch.float16: cpu.Kind.FLOAT16,
    torch.float64: cpu.Kind.FLOAT64,
}
"""The dtypes that a layer takes, as the kernels know them."""


def _buffer(x: Tensor, kind: cpu.Kind | None = None) -> cpu.Buffer:
    return cpu.Buffer(x.data_ptr(), KINDS[x.dtype] if kind is None else kind, x.numel())


class Operand(NamedTuple):
    """What a GEMM multiplies: values, and what undoes those scales that are not in them."""

    values: Tensor
    last: bool = True
    """Whether the contracted axis is the last of values, else the first."""
    factor: float = 1.0
    """Undoes the one scale of the tensor."""
    rows: Tensor | None = None
    """float32 [rows of the operand matrix]: undoes a scale for each."""
    blocks: Tensor | None = None
    """float32 [blocks of rows, blocks along the contracted axis]: undoes those of blocks."""
    block: tuple[int, int] = (1, 1)
    """(across, along) of one."""
    amax: float = 0.0


class Packed(NamedTuple):
    """An operand held in codes until the backward pass, and all else that makes it one again."""

    codes: Tensor
    """uint8, in the layout of the operand's values."""
    back: np.ndarray[Any, Any]
    """float32, of each block of the codes' layout what its values are multiplied with."""
    block: tuple[int, int]
    """(rows, columns) of one, in that layout."""
    operand: Operand
    """The operand, but for its values."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        extra = [x for x in (self.operand.rows, self.operand.blocks) if x is not None]
        return self.codes.numel() + self.back.nbytes + sum(4 * x.numel() for x in extra)


def decoded(operand: Operand) -> Tensor:
    """The operand's values with all its scales undone: float32, in the layout of its values."""
    values = operand.values.float().mul_(operand.factor)
    if operand.rows is not None:
        values.mul_(operand.rows[:, None] if operand.last else operand.rows)
    if operand.blocks is not None:
        (across, along) = operand.block
        rows, columns = values.shape if operand.last else values.shape[::-1]
        factors = operand.blocks.repeat_interleave(across, 0)[:rows].repeat_interleave(along, 1)[:, :columns]
        values.mul_(factors if operand.last else factors.t())
    return values


def plain(x: Tensor, last: bool) -> Operand:
    """An operand that the recipe leaves in high precision."""
    return Operand(x.contiguous(), last)


class Cast:
    """A cell of the recipe's table, ready to cast tensors of two dimensions."""

    __slots__ = ("caster", "current", "delayed", "folded", "number", "simple", "spec", "stochastic", "upright", "whole")

    def __init__(self, spec: TensorSpec, *, upright: bool, number: int) -> None:
        """upright: the GEMM contracts the rows of the tensor as it lies in memory; number: of the cell, for its random draws."""
        self.spec, self.upright, self.number = spec, upright, number
        self.stochastic = spec.rounding is Rounding.STOCHASTIC
        wide = spec.format.bits > 8
        self.caster = None if wide else cpu.caster(spec.format, spec.rounding, spec.overflow)
        self.current = spec.scaling if isinstance(spec.scaling, Current) else None
        self.delayed = isinstance(spec.scaling, Delayed)
        self.whole = isinstance(spec.scaling, (Unscaled, Current, Delayed))
        exact = not isinstance(spec.scaling, Block) or spec.scaling.scale is not BlockScale.FLOAT32
        self.folded = exact and not isinstance(spec.scaling, Row)
        self.simple = not wide and self.folded and spec.transform is Transform.NONE

    def __call__(self, x: Tensor, delayed: float, seed: int = 0) -> Operand:
        """The operand that x makes.  delayed: the scale that its history gives, where the recipe goes by it; seed: of random draws."""
        if self.spec.format.bits > 8:
            x = dense(x)
            here = x.device.type == "cpu"
            amax = cpu.amax(_buffer(x)) if here else 0.0
            clean = here and amax == amax
            return Operand(_rounded(x, self.spec.format, clean=clean), not self.upright, amax=amax)
        x, upright = self._laid(x)
        values = torch.empty(x.shape, dtype=operand_dtype())
        if not self.whole:
            found = self._in_blocks(x, upright, seed, values, None)[0]
        else:
            assert self.caster is not None
            scale = self.scale_of(x, delayed)
            amax = self.caster(_buffer(x), _buffer(values), scale, 1.0, seed, self.number << 56)
            found = Operand(values, not upright, inverse(scale), amax=amax)
        if watch.look is not None:
            watch.look(self.number, self.spec, x, lambda: decoded(found), 1.0 / found.factor if found.factor else 1.0)
        return found

    def pack(self, x: Tensor, delayed: float, seed: int = 0) -> Packed:
        """The same, held in codes.  Only of formats of at most 8 bits."""
        x, upright = self._laid(x)
        codes = torch.empty(x.shape, dtype=torch.uint8)
        if not self.whole:
            packed = self._in_blocks(x, upright, seed, codes, cpu.Kind.CODES)[1]
            assert packed is not None
            return packed
        assert self.caster is not None
        scale = self.scale_of(x, delayed)
        amax = self.caster(_buffer(x), _buffer(codes, cpu.Kind.CODES), scale, 1.0, seed, self.number << 56)
        return self.packed(codes, Operand(codes[:0], not upright, inverse(scale), amax=amax), codes.shape)

    def codes_of(self, values: Tensor) -> Tensor:
        """The codes of an operand's values, which the format holds."""
        codes = torch.empty(values.shape, dtype=torch.uint8)
        exact = cpu.caster(self.spec.format, Rounding.NEAREST_EVEN, Overflow.NONE)
        exact(_buffer(values), _buffer(codes, cpu.Kind.CODES))
        return codes

    def packed(self, codes: Tensor, operand: Operand, shape: Sequence[int]) -> Packed:
        """Codes of a tensor with one scale, of that shape."""
        return Packed(codes, np.ones((1, 1), np.float32), (max(shape[0], 1), max(shape[1], 1)), operand)

    def unpack(self, packed: Packed) -> Operand:
        """The operand again, to the bit."""
        values = torch.empty(packed.codes.shape, dtype=operand_dtype())
        shape = (values.shape[0], values.shape[1])
        if values.numel():
            unpack(packed.codes.data_ptr(), _buffer(values), packed.back, shape, packed.block, self.spec.format)
        return packed.operand._replace(values=values)

    def _laid(self, x: Tensor) -> tuple[Tensor, bool]:
        """x in memory as this cast takes it, and whether the GEMM then contracts its rows."""
        if not (self.stochastic or self.spec.transform is not Transform.NONE) or not self.upright:
            x, upright = dense(x), self.upright
        else:  # draws and transforms go by the place in the operand matrix
            x, upright = x.t().contiguous(), False
        return (matrices.hadamard(x) if self.spec.transform is not Transform.NONE else x), upright

    def scale_of(self, x: Tensor, delayed: float) -> float:
        """The one scale of x, a dense tensor: 1, `delayed` or from its own amax."""
        if self.current is None:
            return delayed if self.delayed else 1.0
        epsilon, power_of_two = self.current.epsilon, self.current.power_of_two
        return current_scale(cpu.amax(_buffer(x)), self.spec.format.max, epsilon, power_of_two)

    def _in_blocks(
        self, x: Tensor, upright: bool, seed: int, target: Tensor, kind: cpu.Kind | None
    ) -> tuple[Operand, Packed | None]:
        """Cast with a scale for each block or row: the operand of target, and, where that is codes, what they are packed with."""
        if x.dtype is torch.float64:
            raise ValueError(
                f"{self.spec} takes float32, bfloat16 and float16 layers; got float64: convert it (module.float())"
            )
        rows, columns = x.shape
        across, along = block_shape(self.spec, *((columns, rows) if upright else (rows, columns)))
        high, wide = (along, across) if upright else (across, along)
        grid = -(-rows // high), -(-columns // wide)
        two_level, coded = isinstance(self.spec.scaling, TwoLevel), scales_in_codes(self.spec.scaling)
        scales = np.empty(grid, np.uint8 if coded else np.float32)
        amax = 0.0
        if x.numel():
            amax = matrices.cast_blocks(
                _buffer(x),
                _buffer(target, kind),
                scales.ctypes.data,
                (rows, columns),
                self.spec,
                upright=upright,
                decoded=int(self.folded and kind is None),
                seed=seed,
                offset=self.number << 56,
            )
        factor = 1.0
        if two_level:
            reciprocal = np.float32(1) / np.float32(E4M3FN.max * self.spec.format.max)
            with np.errstate(over="ignore", invalid="ignore"):
                factor = float(np.float32(amax) * reciprocal)
        operand = Operand(target, not upright, factor, amax=amax)
        if not x.numel():
            pass  # nothing to undo
        elif isinstance(self.spec.scaling, Row):
            operand = operand._replace(rows=torch.from_numpy(scales.reshape(-1)))
        elif not self.folded:
            laid = scales.T.copy() if upright else scales
            operand = operand._replace(blocks=torch.from_numpy(laid), block=(across, along))
        if kind is None:
            return operand, None
        if not self.folded:
            return operand, Packed(target, np.ones((1, 1), np.float32), (max(rows, 1), max(columns, 1)), operand)
        back = E4M3FN.values[scales] if two_level else E8M0FNU.values[scales] if coded else scales
        return operand, Packed(target, np.ascontiguousarray(back), (high, wide), operand)


def _rounded(x: Tensor, format: Format, *, clean: bool) -> Tensor:
    """x to nearest even in a wider format, finite overflow to Inf, in the narrowest dtype that `octavo.torch.gemm` multiplies exactly.

    clean: x is known to hold no NaN, whose bits would otherwise be kept from carrying.
    """
    if x.dtype is torch.float64:
        raise ValueError(
            f"{format.name} takes float32, bfloat16 and float16 layers; got float64: convert it (module.float())"
        )
    if format is BFLOAT16:
        return x.to(torch.bfloat16).to(operand_dtype())
    if format is FLOAT16:
        return x.to(torch.float16).float()
    wide = x.float()
    drop = 23 - format.mantissa_bits
    bits = wide.view(torch.int32)
    odd = (bits >> drop).bitwise_and_(1)
    rounded = odd.add_((1 << (drop - 1)) - 1).add_(bits).bitwise_and_(-(1 << drop)).view(torch.float32)
    return rounded if clean else torch.where(wide.isnan(), wide, rounded)
