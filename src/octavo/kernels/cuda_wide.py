"""The GPU casts that are rare: float64 sources and E8M0, in torch's float64 operators."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.formats import Format
from octavo.reference import overflow_codes
from octavo.rounding import Overflow, Rounding

__all__ = ["decode", "encode"]


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent, float64; exponent: int64, of a normal number."""
    return ((exponent + 1023) << 52).view(torch.float64)


def encode(x: Tensor, format: Format, rounding: Rounding, overflow: Overflow, draws: Tensor | None) -> Tensor:
    """The codes of float64 `x`, int64 of its shape; NaN is not refused; draws: int64 of x's shape, or None.

    This is `octavo.reference.encode`, step by step.
    """
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0)
    lowest = format.emin if format.signed or rounding is Rounding.NEAREST_EVEN else format.emin - 1
    exponent = torch.where(magnitude > 0, (magnitude.view(torch.int64) >> 52) - 1023, format.emin).clamp(min=lowest)
    in_ulps = magnitude * _power_of_two(format.mantissa_bits - exponent)
    whole = in_ulps.floor()
    fraction = in_ulps - whole
    match rounding:
        case Rounding.NEAREST_EVEN:
            up = (fraction > 0.5) | ((fraction == 0.5) & (whole % 2 == 1))
        case Rounding.TOWARD_ZERO:
            up = torch.zeros_like(fraction, dtype=torch.bool)
        case Rounding.NEAREST_AWAY:
            up = fraction >= 0.5
        case Rounding.STOCHASTIC:
            assert draws is not None
            up = (fraction * 2.0**32).floor().long() + draws >= 1 << 32
    code = ((exponent - format.emin) << format.mantissa_bits) + whole.long() + up.long()
    code = code.clamp(min=0)
    finite_overflow, infinite = overflow_codes(format, overflow)
    over = format.max_code if rounding is Rounding.TOWARD_ZERO else finite_overflow
    code = torch.where(code > format.max_code, over, code)
    code = torch.where(x.isinf(), infinite, code)

    nan = x.isnan() | (code == (-1 if format.nan_code is None else format.nan_code))
    negative = x.signbit()
    if format.signed:
        signed = negative if format.has_negative_zero else negative & (code != 0)
        code = torch.where(signed, code | format.sign_mask, code)
    else:
        nan = nan | (negative & (x != 0))
        if overflow is Overflow.NONE:
            nan = nan | (x == 0)
    if format.nan_code is not None:
        code = torch.where(nan, format.nan_code, code)
    return code


def decode(codes: Tensor, format: Format) -> Tensor:
    """The values of `codes`, float32 of their shape."""
    table = torch.from_numpy(format.values.copy()).to(codes.device)
    return table[codes.int()]
