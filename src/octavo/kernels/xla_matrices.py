"""The XLA backend for operand matrices: every scaling, equal to `octavo.reference`; the terms are those of `octavo.kernels.xla`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from octavo.formats import E4M3FN, E8M0FNU
from octavo.kernels.xla import (
    any_nan,
    bits_of,
    codes_of,
    counters,
    decode,
    draws_of,
    float_array,
    layout_of,
    refuse,
    scaled,
    settled,
    static,
    value_bits,
)
from octavo.kernels.xla_floats import FLOAT32, Floats, add, convert, multiply, multiply_flushing
from octavo.reference import SIGNS, Codes, block_shape
from octavo.rounding import Overflow, Rounding
from octavo.scaling import (
    Block,
    Current,
    Delayed,
    Row,
    TwoLevel,
    Unscaled,
    amax_scale,
    e8m0_codes,
    two_level_encode_factor,
    two_level_scale,
    two_level_target,
)
from octavo.table import TensorSpec, Transform

__all__ = ["decode_matrix", "encode_matrix", "hadamard", "quantize_matrix"]

_U32 = np.uint32


@jax.jit
def hadamard(x: Array) -> Array:
    """`octavo.reference.hadamard`: float32 [rows, columns], columns filled up with zeros to a multiple of 16; x: [rows, columns]."""
    columns = x.shape[1]
    bits = convert(bits_of(float_array(x)), layout_of(x), FLOAT32)
    padded = jnp.pad(bits, ((0, 0), (0, -columns % 16)))
    signs = np.where(np.array(SIGNS) < 0, FLOAT32.sign, _U32(0))
    y = padded.reshape(-1, 16) ^ signs
    for apart in (1, 2, 4, 8):
        pairs = y.reshape(-1, 8 // apart, 2, apart)
        one, other = pairs[:, :, 0], pairs[:, :, 1]
        y = jnp.stack([add(one, other), add(one, other ^ FLOAT32.sign)], axis=2)
        y = settled(y).reshape(-1, 16)
    y = multiply(y, FLOAT32.bits(0.25))
    rounded = (y + _U32(0x7FFF) + ((y >> _U32(16)) & _U32(1))) & _U32(0xFFFF0000)
    kept = jnp.where(FLOAT32.magnitude(y) > FLOAT32.infinity, y, rounded)
    return FLOAT32.floats(kept.reshape(padded.shape))


def encode_matrix(
    x: Array, spec: TensorSpec, *, scale: float | Array = 1.0, seed: int | Array | None = None, offset: int | Array = 0
) -> Codes:
    """An operand matrix, [rows, columns] with its contracted axis last, cast as `spec` says: `octavo.reference.encode_matrix`.

    scale: of delayed scaling, float32; seed, offset: as in `encode`.
    """
    size = x.shape[0] * _columns(x, spec)
    cast, nan = _encode_matrix(float_array(x), jnp.float32(scale), *counters(spec.rounding, seed, offset, size), spec)
    refuse(nan, spec.format)
    return cast  # type: ignore[no-any-return]


@static("spec")
def decode_matrix(cast: Codes, spec: TensorSpec) -> Array:
    """The values of `encode_matrix`'s codes times their scales, float32; a transform is not undone."""
    codes: Any = cast.codes
    match spec.scaling:
        case Unscaled():
            return decode(codes, spec.format)
        case Block() as block if block.scale.is_e8m0:
            factor = value_bits(cast.scales, E8M0FNU)
        case TwoLevel():
            reciprocal = np.float32(1) / np.float32(E4M3FN.max * spec.format.max)
            factor = multiply(value_bits(cast.scales, E4M3FN), FLOAT32.bits(cast.amax))
            factor = multiply(factor, FLOAT32.bits(reciprocal))
        case _:
            factor = FLOAT32.bits(cast.scales)
    blocks = _in_blocks(codes, *block_shape(spec, *codes.shape))
    values = value_bits(blocks, spec.format)
    magnitude = FLOAT32.magnitude(factor)
    subnormal = (magnitude != 0) & (magnitude < FLOAT32.bits(2.0**-126 / spec.format.smallest_subnormal))
    values = lax.cond(subnormal.any(), multiply, multiply_flushing, values, factor[:, None, :, None])
    return FLOAT32.floats(_out_of_blocks(values, codes.shape))


def quantize_matrix(
    x: Array, spec: TensorSpec, *, scale: float | Array = 1.0, seed: int | Array | None = None, offset: int | Array = 0
) -> Array:
    """`decode_matrix` of `encode_matrix`: float32 [rows, columns]."""
    size = x.shape[0] * _columns(x, spec)
    values, nan = _quantize_matrix(
        float_array(x), jnp.float32(scale), *counters(spec.rounding, seed, offset, size), spec
    )
    refuse(nan, spec.format)
    return values  # type: ignore[no-any-return]


def _columns(x: Array, spec: TensorSpec) -> int:
    """Columns as the spec's transform leaves them."""
    return -(-x.shape[1] // 16) * 16 if spec.transform is Transform.HADAMARD else x.shape[1]


def _in_blocks(x: Array, across: int, along: int) -> Array:
    """[rows / across, across, columns / along, along], filled up with zeros."""
    rows, columns = x.shape
    padded = jnp.pad(x, ((0, -rows % across), (0, -columns % along)))
    return padded.reshape(-(-rows // across), across, -(-columns // along), along)


def _out_of_blocks(blocks: Array, shape: tuple[int, int]) -> Array:
    rows, across, columns, along = blocks.shape
    return blocks.reshape(rows * across, columns * along)[: shape[0], : shape[1]]


class _Scales(NamedTuple):
    """Of each block."""

    factor: Array
    """What its elements are multiplied with, as words of float32."""
    held: Array
    """What decoding goes by."""


def _scales(peaks: Array, total: Array, spec: TensorSpec, given: Array) -> _Scales:
    """peaks: the amax of each block; total: of all; both words of float32."""
    format, peak = spec.format, Floats(peaks)
    match spec.scaling:
        case Block() as block if block.scale.is_e8m0:
            codes = e8m0_codes(peak.array, format.max, format.emax, format.mantissa_bits, block).astype(jnp.uint8)
            # 2**(127 - code), of which the last is subnormal
            normal = (_U32(254) - codes.astype(jnp.uint32)) << _U32(23)
            last = jnp.where(codes == 254, _U32(1 << 22), FLOAT32.nan)
            return _Scales(jnp.where(codes < 254, normal, last), codes)
        case Current() | Row() | Block():
            scale = amax_scale(peak, format.max, spec.scaling)
        case Delayed():
            scale = Floats(jnp.full_like(peaks, FLOAT32.bits(given)))
        case Unscaled():
            scale = Floats.of(jnp.ones(peaks.shape, jnp.float32))
            return _Scales(scale.bits, scale.array)
        case TwoLevel():
            whole = two_level_scale(Floats(total.reshape(1)), format.max, E4M3FN.max)
            target = two_level_target(peak, whole, format.max)
            codes = codes_of(target.bits, FLOAT32, E4M3FN, Rounding.NEAREST_EVEN, Overflow.SATURATE)
            return _Scales(two_level_encode_factor(Floats(value_bits(codes, E4M3FN)), whole).bits, codes)
    return _Scales(scale.bits, (1.0 / scale).array)


@static("spec")
def _encode_matrix(x: Array, scale: Array, seed: Array, offset: Array, spec: TensorSpec) -> tuple[Codes, Array | None]:
    if spec.transform is Transform.HADAMARD:
        x = hadamard(x)
    layout, format = layout_of(x), spec.format
    across, along = block_shape(spec, *x.shape)
    bits = _in_blocks(bits_of(x), across, along)
    magnitude, zero = layout.magnitude(bits), layout.unsigned(0)
    if isinstance(spec.scaling, Block) and spec.scaling.skip_nan:
        magnitude = jnp.where(magnitude > layout.infinity, zero, magnitude)
    peaks = convert(magnitude.max(axis=(1, 3), initial=zero), layout, FLOAT32)
    total = peaks.max(initial=_U32(0))
    factor, held = settled(_scales(peaks, total, spec, scale))
    if not isinstance(spec.scaling, Unscaled):
        bits = scaled(bits, convert(factor, FLOAT32, layout)[:, None, :, None], layout, format)
    draws = draws_of(spec.rounding, seed, offset, x.shape)
    draws = None if draws is None else _in_blocks(draws, across, along)
    codes = codes_of(bits, layout, format, spec.rounding, spec.overflow, draws)
    cast = Codes(_out_of_blocks(codes, x.shape), held, FLOAT32.floats(total))  # type: ignore[arg-type]
    return cast, any_nan(bits, layout, format)


@static("spec")
def _quantize_matrix(
    x: Array, scale: Array, seed: Array, offset: Array, spec: TensorSpec
) -> tuple[Array, Array | None]:
    cast, nan = _encode_matrix(x, scale, seed, offset, spec)
    return decode_matrix(cast, spec), nan
