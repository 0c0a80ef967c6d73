"""GEMM operands on a CUDA device: a cell of a recipe's table, cast by `octavo.kernels.cuda`.

Its kernels are loaded when something is cast, so that Triton is needed by those alone who have a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.formats import E4M3FN, Format
from octavo.reference import Codes, block_shape
from octavo.scaling import Block, BlockScale, Delayed, Row, TwoLevel, Unscaled, amax_scale
from octavo.table import TensorSpec, Transform
from octavo.torch.gemm import operand_dtype
from octavo.torch.operands import Cast

__all__ = ["Matrix", "cast_both", "cast_one", "held_again", "held_dtype"]


def held_dtype(cast: Cast, device_type: str) -> torch.dtype:
    """What `octavo::linear` returns an operand in; cast: its cell, a `simple` one.

    On the CPU values; elsewhere codes of tensors with one scale, and values, scales multiplied in, of those with scales of blocks.
    """
    if device_type == "cpu":
        return operand_dtype()
    return torch.uint8 if cast.whole else torch.bfloat16


class Matrix(NamedTuple):
    """What a GEMM multiplies, an operand matrix [rows, contracted], and what undoes those scales that are not in it."""

    held: Tensor
    """Codes, uint8, of `format`; values where that is None."""
    format: Format | None = None
    factor: Tensor | None = None
    """float32 [1]: undoes the one scale of the tensor."""
    rows: Tensor | None = None
    """float32 [rows]: undoes a scale for each."""
    blocks: Tensor | None = None
    """float32 [blocks of rows, blocks along the contracted axis]: undoes those of blocks."""
    block: tuple[int, int] = (1, 1)
    """(across, along) of one."""
    amax: Tensor | None = None
    """float32, one element; None is 0."""

    @property
    def values(self) -> Tensor:
        """[rows, contracted]."""
        if self.format is None:
            return self.held
        ones = torch.ones((1, 1), device=self.held.device)
        return _decoded(self.held, ones, TensorSpec(self.format, Unscaled()))

    def turned(self) -> Matrix:
        """The same tensor contracted along its other axis; only of one without scales of rows and blocks."""
        return self._replace(held=self.held.t())


def _decoded(codes: Tensor, scales: Tensor, spec: TensorSpec) -> Tensor:
    """Codes times scales, float32."""
    from octavo.kernels import cuda

    found: Any = codes.contiguous(), scales, scales  # no amax enters where scales are not two-level
    return cuda.decode_matrix(Codes(*found), spec)


@functools.cache
def _given(spec: TensorSpec) -> TensorSpec:
    """The same cast with a scale that is given."""
    return replace(spec, scaling=Delayed(), transform=Transform.NONE)


def _scale(x: Tensor, cast: Cast, delayed: Tensor | None) -> Tensor:
    """The one scale of x, float32 [1]."""
    from octavo.kernels import cuda

    if cast.current is not None:
        return amax_scale(cuda.amax(x).reshape(1), cast.spec.format.max, cast.current)  # type: ignore[no-any-return]
    return delayed if cast.delayed and delayed is not None else torch.ones(1, device=x.device)


def _undone(scale: Tensor) -> Tensor:
    """1 / scale; torch divides a number by a tensor inexactly."""
    return torch.ones_like(scale) / scale


def cast_both(x: Tensor, cast: Cast, delayed: Tensor | None, seed: int) -> tuple[Matrix, Matrix]:
    """x, of one scale, contracted along its columns and along its rows: codes of both in one read."""
    from octavo.kernels import cuda

    spec, scale = cast.spec, _scale(x, cast, delayed)
    codes, turned, amax = cuda.encode_transposed(
        x,
        spec.format,
        scale=scale,
        rounding=spec.rounding,
        overflow=spec.overflow,
        seed=seed,
        offset=cast.number << 56,
    )
    one = Matrix(codes, spec.format, _undone(scale), amax=amax)
    return one, one._replace(held=turned)


def cast_one(x: Tensor, cast: Cast | None, delayed: Tensor | None, seed: int, *, turned: bool = False) -> Matrix:
    """x as a GEMM takes it; delayed: the scale that its history gives, float32 [1]; turned: whether the GEMM contracts x's rows."""
    from octavo.kernels import cuda

    if cast is None or cast.spec.format.bits > 8:
        values = x if cast is None else cast(x, 1.0).values
        return Matrix(values.t() if turned else values, amax=None if cast is None else cuda.amax(x))
    matrix, spec = x.t() if turned else x, cast.spec
    if not cast.whole:
        return _in_blocks(matrix, cast, seed)
    transformed = spec.transform is not Transform.NONE
    if turned and not (cast.stochastic or transformed):  # draws and transforms go by the place in the operand matrix
        return cast_both(x, cast, delayed, seed)[1]
    if transformed:
        matrix = cuda.hadamard(matrix)
    scale = _scale(matrix, cast, delayed)
    found: Any = cuda.encode_matrix(matrix, _given(spec), scale=scale, seed=seed, offset=cast.number << 56)
    return Matrix(found.codes, spec.format, _undone(scale), amax=found.amax)


def _in_blocks(matrix: Tensor, cast: Cast, seed: int) -> Matrix:
    """Cast with a scale for each block or row: powers of two and E4M3 multiplied into the values, float32 beside them."""
    from octavo.kernels import cuda

    spec = cast.spec
    found: Any = cuda.encode_matrix(matrix, spec, seed=seed, offset=cast.number << 56)
    codes, scales, amax = found
    across, along = block_shape(spec, *codes.shape)
    match spec.scaling:
        case Row():
            return Matrix(codes, spec.format, rows=scales.reshape(-1) if codes.numel() else None, amax=amax)
        case Block(scale=BlockScale.FLOAT32):
            blocks = scales if codes.numel() else None
            return Matrix(codes, spec.format, blocks=blocks, block=(across, along), amax=amax)
        case TwoLevel():
            reciprocal = float(np.float32(1) / np.float32(E4M3FN.max * spec.format.max))
            like = TensorSpec(spec.format, Block(shape=(across, along), scale=BlockScale.FLOAT32))
            values = _decoded(codes, cuda.decode(scales, E4M3FN), like)
            return Matrix(values.bfloat16(), factor=amax.reshape(1) * reciprocal, amax=amax)
    return Matrix(cuda.decode_matrix(found, spec).bfloat16(), amax=amax)


def held_again(held: Tensor, cast: Cast | None, factor: Tensor) -> Matrix:
    """The operand that `forward` returned."""
    assert cast is not None
    return Matrix(held, cast.spec.format if cast.whole else None, factor)
