"""GEMM operands: tensors cast as a cell of the recipe's table says, held in arrays of `float8_*`.

Formats of fewer than 8 bits, which XLA does not multiply, ride in `float8_e4m3fn` arrays, whose values include all of theirs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from octavo.formats import BFLOAT16, E3M4FN, E4M3FN, E8M0FNU, FLOAT16, Format
from octavo.jax.mesh import max_over_mesh
from octavo.kernels import xla, xla_matrices
from octavo.kernels.xla_floats import FLOAT32
from octavo.reference import block_shape
from octavo.rounding import Rounding
from octavo.scaling import Block, BlockScale, Current, Delayed, Row, TwoLevel, Unscaled, amax_scale
from octavo.table import TensorSpec, Transform

__all__ = ["Operand", "amax", "amax_for", "as_decoded", "carrier", "cast", "seed_words", "spread", "unscaled"]

_U32 = np.uint32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "factor", "scales"],
    meta_fields=["axis", "block", "whole"],
)
@dataclass(frozen=True)
class Operand:
    """What a GEMM multiplies: a matrix of codes or, uncast, of numbers, and what undoes their scales."""

    values: Array
    """[rows, contracted] where axis is 1, [contracted, rows] where it is 0."""
    axis: int
    """The contracted axis."""
    scale: Array | None = None
    """float32 []: what values were multiplied with, of a tensor with one scale."""
    factor: Array | None = None
    """float32 []: what two-level scales are multiplied with."""
    scales: Array | None = None
    """What values are multiplied with, of each block of the values' layout."""
    block: tuple[int, int] = (1, 1)
    """(rows, columns) of one, in that layout."""
    whole: bool = True
    """Whether scales can be multiplied into the values without rounding; else they enter the sum (`octavo.jax.products`)."""

    def turned(self) -> Operand:
        """For the GEMM that contracts the other axis."""
        return replace(self, axis=1 - self.axis)


@functools.cache
def carrier(format: Format) -> Any:
    """The dtype that holds a format's values.  Raises ValueError for a float8 dtype that this backend cannot compile."""
    if format is E3M4FN or format.bits > 8:
        return jnp.dtype({"float16": jnp.float16, "tf32": jnp.float32}.get(format.name, jnp.bfloat16))
    dtype = jnp.dtype(getattr(jnp, format.name) if format.bits == 8 else jnp.float8_e4m3fn)
    codes = jax.ShapeDtypeStruct((2, 2), jnp.uint8)
    try:
        jax.jit(lambda x: lax.bitcast_convert_type(x, dtype).astype(jnp.bfloat16)).lower(codes).compile()
    except Exception as error:
        raise ValueError(
            f"XLA holds no {dtype.name} on the backend {jax.default_backend()}, which {format.name} needs; "
            "choose a recipe with float8_e4m3fn and float8_e5m2"
        ) from error
    return dtype


def amax(x: Array) -> Array:
    """The largest magnitude in x, float32 []: 0 of an empty array, NaN if x holds NaN."""
    if x.dtype == jnp.float64:
        return xla.amax(x)  # type: ignore[no-any-return]
    if not x.size:
        return jnp.zeros((), jnp.float32)
    wide = lax.stop_gradient(x).astype(jnp.float32)
    return lax.platform_dependent(wide, cpu=_amax_cpu, default=_amax)  # type: ignore[no-any-return]


@jax.custom_batching.custom_vmap
def amax_for(x: Array, state: Array) -> Array:
    """`amax` for a state; under `vmap` that of all examples which share one, and of each where they differ."""
    return amax(x)


@amax_for.def_vmap
def _amax_for_examples(axis_size: int, in_batched: list[bool], x: Array, state: Array) -> tuple[Array, bool]:
    batched, apart = in_batched
    if not apart:
        return amax_for(x, state), False
    return (jax.vmap(amax)(x) if batched else jnp.broadcast_to(amax(x), axis_size)), True


def _amax(x: Array) -> Array:
    return jnp.max(jnp.abs(x))


def _amax_cpu(x: Array) -> Array:
    """The same where subnormals are flushed: as integers they count, but take three times as long."""
    peak = _amax(x)
    exact = lambda x: FLOAT32.floats(jnp.max(FLOAT32.magnitude(FLOAT32.bits(x)).astype(jnp.int32)).astype(jnp.uint32))  # noqa: E731
    return lax.cond(peak == 0, exact, lambda _: peak, x)  # type: ignore[no-any-return]


def seed_words(draws: Array | None, *, advance: bool) -> Array | None:
    """The words of a pass's seed, uint32 [2], from a layer's draws (`octavo.jax.state`); advance: a training pass, one step on."""
    if draws is None:
        return None
    words = draws.astype(jnp.uint32)
    return jnp.stack([(words[2] | (words[3] << 16)) + _U32(advance), words[0] | (words[1] << 16)])


def cast(
    x: Array,
    spec: TensorSpec | None,
    *,
    axis: int,
    scale: Array | None = None,
    seed: Array | None = None,
    number: int = 0,
    axes: tuple[str, ...] = (),
) -> Operand:
    """The operand that a matrix makes.

    x: float32, bfloat16, float16 or float64, contracted along axis; scale: float32 [], of delayed scaling; seed: uint32 [2], of random
    draws; number: of the cell, for them; axes: of the mesh, over which a tensor's amax is taken inside `shard_map`.  NaN in a format
    without one becomes its largest value where it is traced, else ValueError.
    """
    if spec is None:
        return Operand(x, axis)
    if spec.format.bits > 8:
        return Operand(_rounded(x, spec.format), axis)
    one = isinstance(spec.scaling, (Unscaled, Current, Delayed))
    plain = spec.rounding is Rounding.NEAREST_EVEN and spec.transform is Transform.NONE
    if not (one and plain) or x.dtype == jnp.float64:
        return _in_matrix(x if axis == 1 else x.T, spec, scale, seed, number, axes)
    if isinstance(spec.scaling, Current):
        scale = amax_scale(max_over_mesh(amax(x), axes), spec.format.max, spec.scaling)
    scale = None if isinstance(spec.scaling, Unscaled) else scale
    codes = xla.nearest_codes(_scaled(x, scale), spec.format, spec.overflow)
    return Operand(_carried(codes, spec.format), axis, scale)


def _scaled(x: Array, scale: Array | None) -> Array:
    """The bits of `x * scale` in float32; products under 2**-126 in magnitude may come as zero."""
    bits = xla.bits_of(x) if x.dtype == jnp.bfloat16 else FLOAT32.bits(x.astype(jnp.float32))
    return bits if scale is None else xla.scaled(bits, FLOAT32.bits(scale), FLOAT32, E4M3FN)


def _carried(codes: Array, format: Format) -> Array:
    """Codes as numbers, in the format's carrier."""
    dtype = carrier(format)
    if format.bits == 8 and dtype.itemsize == 1:
        return lax.bitcast_convert_type(codes, dtype)
    code = codes.astype(jnp.uint32)
    magnitude = code & _U32((1 << format.magnitude_bits) - 1)
    normal = (magnitude << _U32(23 - format.mantissa_bits)) + _U32((127 - format.bias) << 23)
    small = magnitude.astype(jnp.float32) * np.float32(format.smallest_subnormal)
    bits = jnp.where(magnitude < _U32(1 << format.mantissa_bits), FLOAT32.bits(small), normal)
    if format.nan_code is not None:
        bits = jnp.where(magnitude == _U32(format.nan_code), FLOAT32.nan, bits)
    sign = (code & _U32(format.sign_mask)) << _U32(31 - format.magnitude_bits)
    return FLOAT32.floats(bits | sign).astype(dtype)


def _in_matrix(
    x: Array, spec: TensorSpec, scale: Array | None, seed: Array | None, number: int, axes: tuple[str, ...]
) -> Operand:
    """The operand of a matrix whose contracted axis is the last, by the kernels of every scaling, rounding and transform."""
    offset = np.array([0, number << 24], np.uint32)
    given = 1.0 if scale is None else scale
    if isinstance(spec.scaling, Current):
        # One scale, known beforehand, so that both ways of casting undo the same.
        scale = given = amax_scale(max_over_mesh(xla.amax(x), axes), spec.format.max, spec.scaling)
        spec = replace(spec, scaling=Delayed())
    found: Any = xla_matrices.encode_matrix(x, spec, scale=given, seed=seed, offset=jnp.asarray(offset))
    values = _carried(found.codes, spec.format)
    rows, columns = values.shape
    block = block_shape(spec, rows, columns)
    match spec.scaling:
        case Unscaled():
            return Operand(values, 1)
        case Current() | Delayed():
            return Operand(values, 1, scale)
        case TwoLevel():
            reciprocal = np.float32(1) / np.float32(E4M3FN.max * spec.format.max)
            held = lax.bitcast_convert_type(found.scales, jnp.float8_e4m3fn).astype(jnp.float32)
            return Operand(values, 1, factor=found.amax * reciprocal, scales=held, block=block)
        case Row():
            return Operand(values, 1, scales=found.scales, block=block, whole=False)
        case Block() as blocks:
            held = FLOAT32.floats(xla.value_bits(found.scales, E8M0FNU)) if blocks.scale.is_e8m0 else found.scales
            return Operand(values, 1, scales=held, block=block, whole=blocks.scale is not BlockScale.FLOAT32)


def as_decoded(y: Array, spec: TensorSpec | None, *, dtype: Any, **how: Any) -> Array:
    """A GEMM result, cast as `cast` does and decoded, where the recipe says so."""
    if spec is None:
        return y.astype(dtype)
    operand = cast(y, spec, axis=1, **how)
    values = operand.values[:, : y.shape[1]].astype(jnp.float32)
    if operand.scales is not None:
        values = values * spread(operand.scales, operand.block, values.shape)
    if operand.factor is not None:
        values = values * operand.factor
    return unscaled(values, operand.scale).astype(dtype)


def unscaled(y: Array, *scales: Array | None) -> Array:
    """y without the scales that its operands were multiplied with."""
    given = [scale for scale in scales if scale is not None]
    if not given:
        return y
    # The reciprocal of a scale above 2**126 would be subnormal, and flushed.
    power = [jnp.where(scale > np.float32(2.0**126), np.float32(2.0**-24), np.float32(1)) for scale in given]
    inverse = [np.float32(1) / (scale * one) for scale, one in zip(given, power, strict=True)]
    return y * math.prod(inverse[1:], start=inverse[0]) * math.prod(power[1:], start=power[0])


def spread(scales: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """A value per block, repeated for each of its elements."""
    (rows, columns), (high, wide) = scales.shape, block
    each = jnp.broadcast_to(scales[:, None, :, None], (rows, high, columns, wide))
    return each.reshape(rows * high, columns * wide)[: shape[0], : shape[1]]


def _rounded(x: Array, format: Format) -> Array:
    """x to nearest even in a wider format, finite overflow to Inf, in its carrier."""
    if x.dtype == jnp.float64:
        raise ValueError(
            f"{format.name} takes float32, bfloat16 and float16 layers; got float64: convert it to float32"
        )
    if format is FLOAT16:
        return x.astype(jnp.float16)
    drop = 23 - format.mantissa_bits
    bits = FLOAT32.bits(x.astype(jnp.float32))
    rounded = (bits + _U32((1 << (drop - 1)) - 1) + ((bits >> _U32(drop)) & _U32(1))) >> _U32(drop) << _U32(drop)
    bits = jnp.where(FLOAT32.magnitude(bits) > FLOAT32.infinity, FLOAT32.nan, rounded)
    if format is BFLOAT16:
        return lax.bitcast_convert_type((bits >> _U32(16)).astype(jnp.uint16), jnp.bfloat16)
    return FLOAT32.floats(bits)
