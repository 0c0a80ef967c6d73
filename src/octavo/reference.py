"""The definition of every cast: slow, obvious NumPy.  Each backend must equal it bit for bit.

All arithmetic is in float64, where each step below is exact for any float64, float32, float16 or bfloat16 input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.formats import Format
from octavo.rounding import Overflow, Rounding, random_bits

__all__ = ["decode", "encode", "overflow_codes", "quantize", "reject_nan"]


def reject_nan(format: Format) -> ValueError:
    """The error for NaN in a format that cannot hold it."""
    return ValueError(
        f"{format.name} has no NaN, but the input holds one; replace it first (nan_to_num) or choose a format with NaN"
    )


def overflow_codes(format: Format, overflow: Overflow) -> tuple[int, int]:
    """What a finite overflow and what +Inf are encoded as under `overflow`, sign aside."""
    special = format.inf_code if format.has_inf else format.nan_code
    if special is None:
        return format.max_code, format.max_code
    match overflow:
        case Overflow.SATURATE:
            return format.max_code, format.max_code
        case Overflow.SATURATE_FINITE:
            return format.max_code, special
        case Overflow.NONE:
            return special, special


def encode(
    x: npt.NDArray[Any],
    format: Format,
    *,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    seed: int | None = None,
    offset: int = 0,
) -> npt.NDArray[np.uint8]:
    """The codes of `x`, uint8 of its shape; see `octavo.encode` for the contract."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        value = np.asarray(x).astype(np.float64)
    if np.isnan(value).any() and format.nan_code is None:
        raise reject_nan(format)
    finite = np.isfinite(value)
    magnitude = np.abs(np.where(finite, value, 0.0))

    exponent = np.where(magnitude > 0, np.frexp(magnitude)[1] - 1, format.emin)  # frexp's mantissa is in [0.5, 1)
    # E8M0 ends at its code 0, 2**-127; to nearest even it rounds as torch and ml_dtypes do, as if even steps led from 2**-126 to 0.
    lowest = format.emin if format.signed or rounding is Rounding.NEAREST_EVEN else format.emin - 1
    exponent = np.maximum(exponent, lowest)
    in_ulps = np.ldexp(magnitude, format.mantissa_bits - exponent)
    whole = np.floor(in_ulps)
    fraction = in_ulps - whole
    match rounding:
        case Rounding.NEAREST_EVEN:
            up = (fraction > 0.5) | ((fraction == 0.5) & (whole % 2 == 1))
        case Rounding.TOWARD_ZERO:
            up = np.zeros(fraction.shape, bool)
        case Rounding.NEAREST_AWAY:
            up = fraction >= 0.5
        case Rounding.STOCHASTIC:
            if seed is None:
                raise ValueError("stochastic rounding draws from a seed, and none was given; pass seed=0, say")
            draws = random_bits(seed, offset, value.size).reshape(value.shape)
            up = np.floor(np.ldexp(fraction, 32)) + draws >= 2.0**32

    # A mantissa that carries into 2**(M + 1) is the next binade's first code: the sum below needs no special case.
    code = np.ldexp((exponent - format.emin).astype(np.float64), format.mantissa_bits) + whole + up
    code = np.maximum(code, 0)
    finite_overflow, infinite = overflow_codes(format, overflow)
    over = format.max_code if rounding is Rounding.TOWARD_ZERO else finite_overflow
    code = np.where(code > format.max_code, over, code)
    code = np.where(np.isinf(value), infinite, code).astype(np.uint8)

    nan = np.isnan(value) | (code == format.nan_code)
    negative = np.signbit(value)
    if format.signed:
        signed = negative & (format.has_negative_zero | (code != 0))
        code |= np.where(signed, format.sign_mask, 0).astype(np.uint8)
    else:
        nan |= negative & (value != 0) | (value == 0) & (overflow is Overflow.NONE)
    if format.nan_code is not None:
        code = np.where(nan, np.uint8(format.nan_code), code)
    return code


def decode(codes: npt.NDArray[np.uint8], format: Format) -> npt.NDArray[np.float32]:
    """The values of `codes`, float32 of their shape, exact."""
    if codes.size and int(codes.max()) >= 1 << format.bits:
        raise ValueError(f"{format.name} has codes 0 to {(1 << format.bits) - 1}; got {int(codes.max())}")
    return np.asarray(format.values[codes])


def quantize(
    x: npt.NDArray[Any],
    format: Format,
    *,
    scale: float = 1.0,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    seed: int | None = None,
    offset: int = 0,
) -> npt.NDArray[Any]:
    """`decode(encode(x * scale)) / scale` in x's dtype; the product and quotient in float32, in float64 for float64."""
    x = np.asarray(x)
    wide: Any = np.float64 if x.dtype == np.float64 else np.float32
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        scaled: npt.NDArray[Any] = x.astype(wide) * wide(scale)
        codes = encode(scaled, format, rounding=rounding, overflow=overflow, seed=seed, offset=offset)
        values: npt.NDArray[Any] = decode(codes, format).astype(wide) / wide(scale)
        return values.astype(x.dtype)
