"""The product of two operands: sums as the recipe's accumulator has them, and scales where they enter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.kernels import sums
from octavo.kernels.scales import add_scaled
from octavo.table import Accumulator
from octavo.torch.gemm import matmul
from octavo.torch.operands import Operand

__all__ = ["product"]

_ROWS = 64
"""Rows of a product whose partial sums are added up while they are in cache."""


def product(
    left: Operand, right: Operand, accumulator: Accumulator, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """`left @ right.T + bias` of two operand matrices [M, K] and [N, K], scales undone, rounded once to dtype: [M, N].

    Scales of blocks enter each partial sum p over their part of K, `y = fma(p * d_left, d_right, y)`; then come the tensor's, then
    those of rows, left before right, then the accumulator's rounding, then the bias, all in float32.
    """
    exact = accumulator in (Accumulator.FLOAT32, Accumulator.BFLOAT16_OUT)
    factor = left.factor * right.factor
    if left.blocks is None and right.blocks is None and exact:
        bare = accumulator is Accumulator.FLOAT32 and left.rows is None and right.rows is None
        y = matmul(
            left.values,
            right.values,
            a_transposed=not left.last,
            b_transposed=right.last,
            factor=factor,
            bias=bias if bare else None,
            dtype=dtype if bare else torch.float32,
        )
        if bare:
            return y
    else:
        y = _partial(left, right, accumulator)
        y.mul_(factor)
    if left.rows is not None:
        y.mul_(left.rows[:, None])
    if right.rows is not None:
        y.mul_(right.rows)
    if accumulator is Accumulator.BFLOAT16_OUT:
        y = y.bfloat16().float()
    if bias is not None:
        y.add_(bias)
    return y.to(dtype)


def _partial(left: Operand, right: Operand, accumulator: Accumulator) -> Tensor:
    """The sum over K with the scales of blocks in it: float32 [M, N]."""
    a, b = left.values if left.last else left.values.t(), right.values if right.last else right.values.t()
    (m, k), n = a.shape, b.shape[0]
    steps = {operand.block[1] for operand in (left, right) if operand.blocks is not None}
    if len(steps) > 1:
        raise ValueError(
            f"blocks along the contracted axis are {sorted(steps)} long in the two operands of a GEMM; give both the same length"
        )
    step = steps.pop() if steps else max(k, 1)
    y = torch.zeros(m, n)
    ones = np.ones((1, 1), np.float32)
    d_left, across_left = (ones, max(m, 1)) if left.blocks is None else (left.blocks.numpy(), left.block[0])
    d_right, across_right = (ones, max(n, 1)) if right.blocks is None else (right.blocks.numpy(), right.block[0])
    tall = _ROWS if accumulator in (Accumulator.FLOAT32, Accumulator.BFLOAT16_OUT) else max(m, 1)
    for top in range(0, m, tall):
        rows = a[top : top + tall]
        for number, first in enumerate(range(0, k, step)):
            p = _sum(rows[:, first : first + step], b[:, first : first + step], accumulator)
            one = d_left[:, number % d_left.shape[1]].repeat(across_left)[top : top + tall]
            other = d_right[:, number % d_right.shape[1]].repeat(across_right)[:n]
            add_scaled(p.numpy(), np.ascontiguousarray(one), np.ascontiguousarray(other), y[top : top + tall].numpy())
    return y


def _sum(a: Tensor, b: Tensor, accumulator: Accumulator) -> Tensor:
    """`a @ b.T` of [M, K] and [N, K], strided, in float32 sums or in Hopper's."""
    if accumulator in (Accumulator.FLOAT32, Accumulator.BFLOAT16_OUT):
        flat_a, flat_b = a.stride(1) == 1, b.stride(1) == 1
        return matmul(a if flat_a else a.t(), b if flat_b else b.t(), a_transposed=not flat_a, b_transposed=flat_b)
    return torch.from_numpy(sums.matmul(_wide(a), _wide(b), accumulator))


def _wide(x: Tensor) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = x.float().contiguous().numpy()
    return values
