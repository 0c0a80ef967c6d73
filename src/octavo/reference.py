"""The definition of every cast: slow, obvious NumPy.  Each backend must equal it bit for bit.

A value is rounded in float64, where each step is exact for any float64, float32, float16 or bfloat16 input.  Scales and the products
with them are float32, or float64 where x is.  An operand matrix has its contracted axis last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.formats import E4M3FN, E8M0FNU, Format
from octavo.rounding import Overflow, Rounding, random_bits, require_seed
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

__all__ = [
    "SIGNS",
    "Codes",
    "block_shape",
    "decode",
    "decode_matrix",
    "encode",
    "encode_matrix",
    "hadamard",
    "overflow_codes",
    "quantize",
    "reject_nan",
]


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
            require_seed(rounding, seed)
            assert seed is not None
            draws = random_bits(seed, offset, value.size).reshape(value.shape)
            up = np.floor(np.ldexp(fraction, 32)) + draws >= 2.0**32

    # A mantissa that carries into 2**(M + 1) is the next binade's first code: the sum below needs no special case.
    code = np.ldexp((exponent - format.emin).astype(np.float64), format.mantissa_bits) + whole + up
    code = np.maximum(code, 0)
    finite_overflow, infinite = overflow_codes(format, overflow)
    over = format.max_code if rounding is Rounding.TOWARD_ZERO else finite_overflow
    code = np.where(code > format.max_code, over, code)
    held: Any = np.uint8 if format.bits <= 8 else np.uint32
    code = np.where(np.isinf(value), infinite, code).astype(held)

    nan = np.isnan(value) | (code == format.nan_code)
    negative = np.signbit(value)
    if format.signed:
        signed = negative & (format.has_negative_zero | (code != 0))
        code |= np.where(signed, format.sign_mask, 0).astype(held)
    else:
        nan |= negative & (value != 0) | (value == 0) & (overflow is Overflow.NONE)
    if format.nan_code is not None:
        code = np.where(nan, held(format.nan_code), code)
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


SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The signs of the random Hadamard transform, Transformer Engine's for NVFP4."""


def hadamard(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """`x @ (diag(SIGNS) @ H16 / 4)` for each 16 elements of the last axis, rounded to bfloat16: float32 [rows, columns], columns filled
    up with zeros to a multiple of 16.

    x: [rows, columns].  H16 is Sylvester's, and the sums are float32, in the order of the fast transform: elements 1, 2, 4, 8 apart.
    """
    rows, columns = x.shape
    padded = np.zeros((rows, -(-columns // 16) * 16), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        padded[:, :columns] = x
        y = (padded.reshape(-1, 16) * np.array(SIGNS, np.float32)).astype(np.float32)
        for apart in (1, 2, 4, 8):
            pairs = y.reshape(-1, 8 // apart, 2, apart)
            one, other = pairs[:, :, 0], pairs[:, :, 1]
            y = np.stack([one + other, one - other], axis=2).reshape(-1, 16)
        turned = _to_bfloat16(y * np.float32(0.25))
    return turned.reshape(padded.shape)


def _to_bfloat16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x rounded to bfloat16, to nearest even, NaN kept: in float32."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


class Codes(NamedTuple):
    """A cast operand matrix."""

    codes: npt.NDArray[np.uint8]
    """[rows, columns]; columns are more than x's where a transform filled them up."""
    scales: npt.NDArray[Any]
    """What decoding multiplies with, [rows / across, columns / along], rounded up: float32, E8M0 codes or, two-level, E4M3 codes."""
    amax: np.float32
    """Of the whole matrix, which the two-level scales of its blocks refer to."""


def block_shape(spec: TensorSpec, rows: int, columns: int) -> tuple[int, int]:
    """(across, along): how many rows and columns of an operand matrix share a scale; at least 1 each.

    Raises ValueError where a block does not divide and the spec forbids padding.
    """
    match spec.scaling:
        case Unscaled() | Current() | Delayed():
            return max(rows, 1), max(columns, 1)
        case Row():
            return 1, max(columns, 1)
        case Block(shape=shape, padding=padding) | TwoLevel(shape=shape, padding=padding):
            if not padding and (rows % shape[0] or columns % shape[1]):
                raise ValueError(
                    f"blocks of {shape} do not divide an operand of {(rows, columns)} (contracted axis last), and the spec forbids "
                    f"padding; write padding=True or choose sizes that they divide"
                )
            return shape


def _block_amax(x: npt.NDArray[Any], across: int, along: int, skip_nan: bool) -> npt.NDArray[np.float32]:
    """The amax of each block, NaN where it holds one unless that is skipped."""
    rows, columns = -(-x.shape[0] // across), -(-x.shape[1] // along)
    padded = np.zeros((rows * across, columns * along), x.dtype)
    padded[: x.shape[0], : x.shape[1]] = np.abs(x)
    blocks = padded.reshape(rows, across, columns, along)
    with np.errstate(over="ignore", invalid="ignore"):
        top = np.fmax.reduce(blocks, axis=(1, 3), initial=0) if skip_nan else blocks.max(axis=(1, 3), initial=0)
        return np.asarray(top, np.float32)


def _spread(per_block: npt.NDArray[Any], across: int, along: int, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """A value per block, repeated for each of its elements."""
    return per_block.repeat(across, 0)[: shape[0]].repeat(along, 1)[:, : shape[1]]


def _scales(
    x: npt.NDArray[Any], spec: TensorSpec, across: int, along: int, given: float
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], np.float32]:
    """Of each block: what its elements are multiplied with, and what decoding goes by; and the amax of all."""
    skip_nan = isinstance(spec.scaling, Block) and spec.scaling.skip_nan
    amax, total = _block_amax(x, across, along, skip_nan), np.float32(0)
    if x.size:
        total = np.float32(np.fmax.reduce(amax, axis=None) if skip_nan else amax.max())
    format, one = spec.format, np.float32(1)
    match spec.scaling:
        case Block() as block if block.scale.is_e8m0:
            codes = e8m0_codes(amax, format.max, format.emax, format.mantissa_bits, block).astype(np.uint8)
            return np.where(codes == 255, np.nan, np.ldexp(one, 127 - codes.astype(np.int32))), codes, total
        case Current() | Row() | Block():
            scale = amax_scale(amax, format.max, spec.scaling)
            return scale, one / scale, total
        case Delayed():
            scale = np.full(amax.shape, given, np.float32)
            return scale, one / scale, total
        case Unscaled():
            return np.ones_like(amax), np.ones_like(amax), total
        case TwoLevel():
            whole = two_level_scale(total.reshape(1), format.max, E4M3FN.max)
            codes = encode(two_level_target(amax, whole, format.max), E4M3FN)
            return two_level_encode_factor(decode(codes, E4M3FN), whole), codes, total


def encode_matrix(
    x: npt.NDArray[Any], spec: TensorSpec, *, scale: float = 1.0, seed: int | None = None, offset: int = 0
) -> Codes:
    """An operand matrix, [rows, columns] with its contracted axis last, cast as `spec` says.

    scale: of delayed scaling; seed, offset: of stochastic rounding, by an element's place in the matrix (as the transform left it).
    """
    if spec.transform is Transform.HADAMARD:
        x = hadamard(x)
    across, along = block_shape(spec, *x.shape)
    wide: Any = np.float64 if x.dtype == np.float64 else np.float32
    factor, scales, amax = _scales(x, spec, across, along, scale)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        scaled = x.astype(wide) * _spread(factor, across, along, (x.shape[0], x.shape[1])).astype(wide)
    codes = encode(scaled, spec.format, rounding=spec.rounding, overflow=spec.overflow, seed=seed, offset=offset)
    return Codes(codes, scales, amax)


def decode_matrix(cast: Codes, spec: TensorSpec) -> npt.NDArray[np.float32]:
    """The values of `encode_matrix`'s codes times their scales, in float32; a transform is not undone."""
    across, along = block_shape(spec, *cast.codes.shape)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        match spec.scaling:
            case Block() as block if block.scale.is_e8m0:
                factor = decode(cast.scales, E8M0FNU)
            case TwoLevel():
                reciprocal = np.float32(1) / np.float32(E4M3FN.max * spec.format.max)
                factor = decode(cast.scales, E4M3FN) * cast.amax * reciprocal
            case _:
                factor = cast.scales
        shape = (cast.codes.shape[0], cast.codes.shape[1])
        values: npt.NDArray[np.float32] = decode(cast.codes, spec.format) * _spread(factor, across, along, shape)
    return values
