"""The XLA backend: casts of JAX arrays, eager or inside `jax.jit`, on any device.

Formats, modes and specs are static; scales, seeds and offsets may be traced.  Everything is integer arithmetic on bit patterns
(`octavo.kernels.xla_floats` says why), so compilers and devices do not enter.

NaN in a format without one raises ValueError where the values are known.  Inside `jax.jit`, which cannot raise, it becomes the
largest value, positive.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from octavo.formats import Format
from octavo.kernels.xla_floats import (
    FLOAT32,
    FLOAT64,
    Layout,
    convert,
    divide,
    multiply,
    multiply_flushing,
    round_to,
    unpack,
    wide_product,
)
from octavo.reference import overflow_codes, reject_nan
from octavo.rounding import Overflow, Rounding, checked_counter, require_seed

__all__ = [
    "amax",
    "any_nan",
    "bits_of",
    "codes_of",
    "counters",
    "decode",
    "draws_of",
    "encode",
    "float_array",
    "layout_of",
    "nearest_codes",
    "quantize",
    "random_bits",
    "refuse",
    "scaled",
    "settled",
    "static",
    "value_bits",
]

_U32 = np.uint32
settled: Any = lax.optimization_barrier
"""Its argument, computed before its consumers and not once for each of their elements."""


def static(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return functools.partial(jax.jit, static_argnames=names)


def encode(
    x: Array,
    format: Format,
    *,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    seed: int | Array | None = None,
    offset: int | Array = 0,
) -> Array:
    """The codes of `x`, uint8 of its shape (uint32 for the formats of more than 8 bits); see `octavo.encode`.

    x: float32, bfloat16, float16, or float64 where JAX has it.  seed, offset: integers, or both 32-bit words of one as uint32 [2], low
    word first, which may be traced.
    """
    codes, nan = _encode(float_array(x), *counters(rounding, seed, offset, x.size), format, rounding, overflow)
    refuse(nan, format)
    return codes  # type: ignore[no-any-return]


def decode(codes: Array, format: Format) -> Array:
    """The values of `codes`, float32 of their shape, exact.

    Raises ValueError for another dtype than `encode` gives, and for a code beyond the format's bits; traced, such a code decodes to NaN.
    """
    _check_array(codes)
    held = jnp.uint8 if format.bits <= 8 else jnp.uint32
    if codes.dtype != held:
        raise ValueError(f"codes of {format.name} are {held.dtype}; got {codes.dtype}: `encode` makes them")
    if format.bits != 8 and codes.size and is_known(codes) and int(codes.max()) >= 1 << format.bits:
        raise ValueError(f"{format.name} has codes 0 to {(1 << format.bits) - 1}; got {int(codes.max())}")
    return _decode(codes, format)  # type: ignore[no-any-return]


def quantize(
    x: Array,
    format: Format,
    *,
    scale: float | Array = 1.0,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    seed: int | Array | None = None,
    offset: int | Array = 0,
) -> Array:
    """`decode(encode(x * scale)) / scale` in x's dtype; the product and quotient in float32, in float64 for float64.

    scale: positive and finite, a number or a 0-d array; the rest as in `encode`.
    """
    layout = layout_of(float_array(x))
    with np.errstate(over="ignore", under="ignore"):
        used = scale if isinstance(scale, Array) else layout.floating(scale)
    if is_known(used) and not (0 < float(used) < math.inf):
        raise ValueError(f"a scale is positive and finite (in float32, unless x is float64); got {scale}")
    used = None if is_known(used) and float(used) == 1 else used
    values, nan = _quantize(x, used, *counters(rounding, seed, offset, x.size), format, rounding, overflow)
    refuse(nan, format)
    return values  # type: ignore[no-any-return]


@jax.jit
def amax(x: Array) -> Array:
    """The largest magnitude in `x`, float32 [], rounded where x is float64: 0 of an empty array, NaN if x holds NaN."""
    layout = layout_of(float_array(x))
    return FLOAT32.floats(convert(layout.magnitude(bits_of(x)).max(initial=layout.unsigned(0)), layout, FLOAT32))


def random_bits(seed: int | Array, offset: int | Array, count: int) -> Array:
    """`octavo.rounding.random_bits`: the 32 random bits of elements `offset` to `offset + count - 1`, uint32 [count]."""
    return _random_bits(*counters(Rounding.STOCHASTIC, seed, offset, count), count)  # type: ignore[no-any-return]


def is_known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _check_array(x: Any) -> None:
    if not isinstance(x, Array):
        raise ValueError(
            f"this backend casts arrays of JAX; got {type(x).__name__}: use octavo.encode, or jax.numpy.asarray"
        )


def float_array(x: Any) -> Array:
    """x itself.  Raises ValueError for what is no float array."""
    _check_array(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(
            f"a cast takes float32, float64, float16 or bfloat16; got {x.dtype}: convert it to float32 first"
        )
    return x  # type: ignore[no-any-return]


def layout_of(x: Array) -> Layout:
    """What x is computed in."""
    return FLOAT64 if x.dtype == jnp.float64 else FLOAT32


def bits_of(x: Array) -> Array:
    """The bits of x in its layout."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << _U32(16)
    return layout_of(x).bits(x)


def refuse(nan: Array | None, format: Format) -> None:
    if nan is not None and is_known(nan) and bool(nan):
        raise reject_nan(format)


def _words(name: str, value: Any, end: int) -> Any:
    """An integer as two 32-bit words, low word first."""
    if isinstance(value, Array):
        if value.shape != (2,) or value.dtype != jnp.uint32:
            raise ValueError(f"{name} as an array is uint32 [2], low word first; got {value.dtype} {value.shape}")
        return value
    whole = checked_counter(name, value, end)
    return np.array([whole & 0xFFFFFFFF, whole >> 32], np.uint32)


def counters(rounding: Rounding, seed: Any, offset: Any, size: int) -> tuple[Any, Any]:
    """The words of seed and offset."""
    require_seed(rounding, seed)
    return _words("seed", 0 if seed is None else seed, 1 << 64), _words("offset", offset, (1 << 63) - size)


@static("count")
def _random_bits(seed: Array, offset: Array, count: int) -> Array:
    low = (offset[0] >> _U32(2)) | (offset[1] << _U32(30))
    blocks = low + jnp.arange((count + 6) // 4, dtype=jnp.uint32)
    c0, c1 = blocks, (offset[1] >> _U32(2)) + (blocks < low).astype(jnp.uint32)
    c2 = c3 = jnp.zeros_like(c0)
    multipliers = jnp.uint32(0xD2511F53), jnp.uint32(0xCD9E8D57)
    for round_ in range(10):
        k0, k1 = (seed[i] + _U32(round_ * weyl & 0xFFFFFFFF) for i, weyl in enumerate((0x9E3779B9, 0xBB67AE85)))
        (high0, low0), (high1, low1) = (wide_product(c, m) for c, m in zip((c0, c2), multipliers, strict=True))
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return lax.dynamic_slice(jnp.stack([c0, c1, c2, c3], -1).reshape(-1), (offset[0] & _U32(3),), (count,))


def codes_of(
    bits: Array, layout: Layout, format: Format, rounding: Rounding, overflow: Overflow, draws: Array | None = None
) -> Array:
    """The codes of words; NaN where there is none: the largest value."""
    if rounding is Rounding.NEAREST_EVEN and layout is FLOAT32 and format.signed and format.bits <= 8:
        return nearest_codes(bits, format, overflow)  # a third of the time
    # As in the reference: to nearest even E8M0 rounds as if even steps led from 2**-126 to 0.
    lowest = format.emin if format.signed or rounding is Rounding.NEAREST_EVEN else format.emin - 1
    magnitude = layout.magnitude(bits)
    significand, exponent = unpack(bits, layout, normalised=lowest < 1 - layout.bias)
    modes: Any = {"emin": format.emin, "lowest": lowest, "rounding": rounding, "draws": draws}
    code = round_to(significand, exponent, mantissa_bits=format.mantissa_bits, **modes).astype(jnp.int32)
    finite_overflow, infinite = overflow_codes(format, overflow)
    over = format.max_code if rounding is Rounding.TOWARD_ZERO else finite_overflow
    code = jnp.where(code > format.max_code, over, jnp.maximum(code, 0))
    code = jnp.where(magnitude >= layout.infinity, infinite, code)

    held = jnp.uint8 if format.bits <= 8 else jnp.uint32
    is_nan, negative = magnitude > layout.infinity, bits >= layout.sign
    if format.nan_code is None:
        return jnp.where(is_nan | ~negative, code, code | format.sign_mask).astype(held)
    is_nan |= code == format.nan_code
    if format.signed:
        signed = negative if format.has_negative_zero else negative & (code != 0)
        code = jnp.where(signed, code | format.sign_mask, code)
    else:
        is_nan |= (magnitude == 0) if overflow is Overflow.NONE else False
        is_nan |= negative & (magnitude != 0)
    return jnp.where(is_nan, format.nan_code, code).astype(held)


def nearest_codes(bits: Array, format: Format, overflow: Overflow) -> Array:
    """The codes of words of float32 to nearest even, uint8, for signed formats of 8 bits and fewer; as in `codes_of`."""
    magnitude, drop = FLOAT32.magnitude(bits), 23 - format.mantissa_bits
    tie = (magnitude >> _U32(drop)) & _U32(1)
    rebased = magnitude - _U32((127 - format.bias) << 23) if format.bias < 127 else magnitude
    normal = (rebased + _U32((1 << (drop - 1)) - 1) + tie) >> _U32(drop)
    # Added to a number whose last bit is worth the format's smallest, a subnormal is rounded by the processor.
    tiny, lift = np.float32(format.tiny), np.float32(format.smallest_subnormal * 2.0**23)
    small = FLOAT32.bits(jnp.minimum(FLOAT32.floats(magnitude), tiny) + lift) & _U32(0x7FFFFF)
    code = jnp.where(magnitude < tiny.view(_U32), small, normal)

    finite, infinite = overflow_codes(format, overflow)
    if finite == format.max_code:
        code = jnp.minimum(code, _U32(format.max_code))
    else:
        code = jnp.where(code > _U32(format.max_code), _U32(finite), code)
    if infinite != finite:
        code = jnp.where(magnitude == FLOAT32.infinity, _U32(infinite), code)
    sign = (bits >> _U32(31 - format.magnitude_bits)) & _U32(format.sign_mask)
    signed = code | (sign if format.has_negative_zero else jnp.where(code != 0, sign, _U32(0)))
    is_nan = magnitude > FLOAT32.infinity
    if format.nan_code is None:
        return jnp.where(is_nan, _U32(format.max_code), signed).astype(jnp.uint8)
    is_nan |= code == _U32(format.nan_code)
    return jnp.where(is_nan, _U32(format.nan_code), signed).astype(jnp.uint8)


def scaled(bits: Array, by: Array, layout: Layout, format: Format) -> Array:
    """The products of words, for `codes_of`."""
    # A draw sees 32 bits below the finest grid; what is smaller still may be flushed.
    if layout is FLOAT32 and format.smallest_subnormal >= 2.0**-93:
        return multiply_flushing(bits, by)
    return multiply(bits, by, layout)


def any_nan(bits: Array, layout: Layout, format: Format) -> Array | None:
    """Whether there is NaN, where the format has none."""
    return None if format.has_nan else (layout.magnitude(bits) > layout.infinity).any()


def value_bits(codes: Any, format: Format) -> Array:
    """The values of codes, as words of float32."""
    table = np.full(max(256, 1 << format.bits), FLOAT32.nan)
    table[: 1 << format.bits] = format.values.view(np.uint32)
    return look_up(jnp.asarray(table), codes)


def look_up(table: Array, codes: Any) -> Array:
    """The entry of a table for each code."""
    # Looked up in the same loop as they are computed, codes would be computed one by one.
    return table.at[settled(codes)].get(mode="promise_in_bounds")


@static("format")
def _decode(codes: Array, format: Format) -> Array:
    return FLOAT32.floats(value_bits(codes, format))


def draws_of(rounding: Rounding, seed: Array, offset: Array, shape: tuple[int, ...]) -> Array | None:
    """What stochastic rounding of an array of that shape draws; None for the other modes."""
    if rounding is not Rounding.STOCHASTIC:
        return None
    return jnp.reshape(_random_bits(seed, offset, math.prod(shape)), shape)


@static("format", "rounding", "overflow")
def _encode(
    x: Array, seed: Array, offset: Array, format: Format, rounding: Rounding, overflow: Overflow
) -> tuple[Array, Array | None]:
    bits, layout = bits_of(x), layout_of(x)
    codes = codes_of(bits, layout, format, rounding, overflow, draws_of(rounding, seed, offset, x.shape))
    return codes, any_nan(bits, layout, format)


@static("format", "rounding", "overflow")
def _quantize(
    x: Array,
    scale: Array | None,
    seed: Array,
    offset: Array,
    format: Format,
    rounding: Rounding,
    overflow: Overflow,
) -> tuple[Array, Array | None]:
    bits, layout = bits_of(x), layout_of(x)
    table = layout.bits(format.values.astype(layout.floating))
    if scale is not None:
        by = layout.bits(scale)
        bits, table = scaled(bits, by, layout, format), divide(table, by, layout)
    codes = codes_of(bits, layout, format, rounding, overflow, draws_of(rounding, seed, offset, x.shape))
    return look_up(layout.floats(table).astype(x.dtype), codes), any_nan(bits, layout, format)
