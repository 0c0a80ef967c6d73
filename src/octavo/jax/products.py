"""The product of two operands: float8 arrays straight into `dot_general` with float32 sums, and scales where they enter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from octavo.jax.mesh import varying_like
from octavo.jax.operands import Operand, spread, unscaled
from octavo.table import Accumulator

__all__ = ["check_accumulator", "product", "widened_float8"]

_SMALL = 1 << 26
"""Multiply-adds up to which XLA's float32 product is faster on processors than its bfloat16 one, which else takes half its time."""


def check_accumulator(accumulator: Accumulator, place: str) -> None:
    """Raise ValueError for sums that XLA does not form; place: recipe and GEMM."""
    match accumulator:
        case Accumulator.FLOAT32 | Accumulator.BFLOAT16_OUT:
            return
        case Accumulator.HOPPER_FAST | Accumulator.HOPPER_SPLIT:
            raise ValueError(
                f"{place}: {accumulator.value} sums are emulated by octavo.torch on the CPU alone; here the hardware adds: use the "
                "recipe without on_hopper"
            )


def product(left: Operand, right: Operand, accumulator: Accumulator) -> Array:
    """`left @ right.T` of two operand matrices [M, K] and [N, K], scales undone, float32 [M, N].

    Scales of blocks that are powers of two, or that leave the product of scale and value exact, are multiplied into bfloat16 operands;
    others enter partial sums over their part of K.  Those of tensors and rows come last, then the accumulator's rounding.
    """
    steps = {step for operand in (left, right) if (step := _step(operand)) is not None}
    if len(steps) > 1:
        raise ValueError(
            f"blocks along the contracted axis are {sorted(steps)} long in the two operands of a GEMM; give both the same length"
        )
    y = _partial(left, right, steps.pop()) if steps else _dot(_folded(left), _folded(right), left.axis, right.axis)
    y = unscaled(y, left.scale, right.scale)
    for operand in (left, right):
        if operand.factor is not None:
            y = y * operand.factor
    if not steps:
        y = y * _rows(left)[:, None] if _by_rows(left) else y
        y = y * _rows(right)[None, :] if _by_rows(right) else y
    # As a pair of conversions XLA would leave it out.
    return lax.reduce_precision(y, 8, 7) if accumulator is Accumulator.BFLOAT16_OUT else y


def _step(operand: Operand) -> int | None:
    """How many elements along K share a scale that has to enter a partial sum; None where there is none."""
    if operand.scales is None or operand.whole or _by_rows(operand):
        return None
    return operand.block[operand.axis]


def _by_rows(operand: Operand) -> bool:
    """Whether scales are left for after the sum: those that span K."""
    if operand.scales is None or operand.whole:
        return False
    return operand.block[operand.axis] >= operand.values.shape[operand.axis]


def _rows(operand: Operand) -> Array:
    """The scale of each row of the operand matrix, float32 [rows]."""
    assert operand.scales is not None
    per_block = operand.scales[:, 0] if operand.axis == 1 else operand.scales[0]
    across = operand.block[1 - operand.axis]
    return jnp.repeat(per_block, across)[: operand.values.shape[1 - operand.axis]]


def _folded(operand: Operand) -> Array:
    """Values, with those scales multiplied in that leave them exact."""
    if operand.scales is None or not operand.whole:
        return operand.values
    values = operand.values.astype(jnp.float32) * spread(operand.scales, operand.block, operand.values.shape)
    return values.astype(jnp.bfloat16)


def _dot(left: Array, right: Array, axis: int, other: int) -> Array:
    """The sum over K, float32 [M, N]."""

    def dot(a: Array, b: Array) -> Array:
        exact = a.dtype == jnp.float32 or b.dtype == jnp.float32
        return lax.dot_general(
            a,
            b,
            (((axis,), (other,)), ((), ())),
            precision=lax.Precision.HIGHEST if exact else None,
            preferred_element_type=jnp.float32,
        )

    if left.dtype.itemsize > 1 and left.dtype == right.dtype:
        return dot(left, right)
    if left.dtype.itemsize > 1 or right.dtype.itemsize > 1:
        wide = jnp.promote_types(*(jnp.bfloat16 if x.dtype.itemsize == 1 else x.dtype for x in (left, right)))
        return dot(left.astype(wide), right.astype(wide))
    wide = jnp.float32 if left.size * right.shape[1 - other] <= _SMALL else jnp.bfloat16
    return lax.platform_dependent(left, right, cpu=_widened(dot, wide), default=dot)  # type: ignore[no-any-return]


def _widened(dot: Callable[[Array, Array], Array], dtype: Any) -> Callable[[Array, Array], Array]:
    """Processors multiply no float8; both dtypes hold it, and the products are exact in both."""
    wide = widened_float8 if dtype == jnp.float32 else functools.partial(lax.convert_element_type, new_dtype=dtype)
    return lambda a, b: dot(wide(a), wide(b))


@jax.jit
def widened_float8(x: Array) -> Array:
    """x in float32; `octavo.jax.check` knows it by this name.

    The two formats whose exponents and mantissas fit float16's places go by way of that, in half of XLA's own time.
    """
    lift = {jnp.dtype(jnp.float8_e5m2): 8, jnp.dtype(jnp.float8_e4m3fn): 7}.get(x.dtype)
    if lift is None:
        return x.astype(jnp.float32)
    code = lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint16)
    magnitude = code & np.uint16(0x7F)
    bits = (magnitude << np.uint16(lift)) | ((code & np.uint16(0x80)) << np.uint16(8))
    y = lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
    if lift == 8:
        return y
    # E4M3's exponents are 8 less than float16's, and all ones is NaN.
    return jnp.where(magnitude == np.uint16(0x7F), np.float32(np.nan), y * np.float32(256))


def _partial(left: Operand, right: Operand, step: int) -> Array:
    """The sum over K with the scales of blocks in it, `step` elements at a time: float32 [M, N]."""
    m, n = (operand.values.shape[1 - operand.axis] for operand in (left, right))
    (one, d_one), (two, d_two) = _parts(left, step), _parts(right, step)

    def add(y: Array, part: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        a, b, d_a, d_b = part
        return y + _dot(a, b, 1, 1) * d_a[:, None] * d_b[None, :], None

    start = varying_like(jnp.zeros((m, n), jnp.float32), one, two, d_one, d_two)
    return lax.scan(add, start, (one, two, d_one, d_two))[0]


def _parts(operand: Operand, step: int) -> tuple[Array, Array]:
    """The parts of K: values [parts, rows, step], filled up with zeros, and the scale of each row in each, float32 [parts, rows]."""
    values = _folded(operand)
    values = values if operand.axis == 1 else values.T
    rows, length = values.shape
    parts = -(-length // step)
    values = jnp.pad(values, ((0, 0), (0, parts * step - length))).reshape(rows, parts, step).swapaxes(0, 1)
    if _step(operand) is None:
        return values, jnp.ones((parts, rows), jnp.float32)
    assert operand.scales is not None
    scales = operand.scales.T if operand.axis == 1 else operand.scales
    return values, jnp.repeat(scales, operand.block[1 - operand.axis], axis=1)[:, :rows]
