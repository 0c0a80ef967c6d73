"""What the GPU kernels do to one value: decoding, rounding, random bits, the scale of a block.  Triton, on int32 and uint32.

Rounding works on a float32's bits, so neither subnormals nor fused multiply-adds can touch it; what floating-point arithmetic is left
(products with a scale, quotients) stands alone and is rounded by the instruction itself.
"""

from __future__ import annotations

import enum
import functools

import numpy as np
import triton
import triton.language as tl

from octavo.formats import E4M3FN, Format
from octavo.reference import overflow_codes
from octavo.rounding import Overflow, Rounding
from octavo.scaling import Block, BlockScale, Current, Delayed, Row, TwoLevel, Unscaled, zero_code_limit
from octavo.table import TensorSpec

__all__ = ["HARDWARE", "Kind", "Scales", "constants", "mode_of", "rule_constants"]


class Kind(enum.IntEnum):
    """What a tensor holds, as the kernels load and store it."""

    FLOAT32 = 0
    BFLOAT16 = 1
    """Seen as int16: its bits are the upper half of a float32's."""
    FLOAT16 = 2
    CODES = 3


class Scales(enum.IntEnum):
    """What the scales of a cast matrix are held in."""

    FLOAT32 = 0
    E8M0 = 1
    TWO_LEVEL = 2


# A kernel takes module-level integers only as tl.constexpr.
FLOAT32, BFLOAT16, FLOAT16, CODES = (tl.constexpr(int(kind)) for kind in Kind)
E8M0_SCALES, TWO_LEVEL_SCALES = tl.constexpr(int(Scales.E8M0)), tl.constexpr(int(Scales.TWO_LEVEL))
NEAREST_EVEN, TOWARD_ZERO, NEAREST_AWAY, STOCHASTIC = (tl.constexpr(number) for number in range(4))
HARDWARE = tl.constexpr(4)
"""A fifth mode: nearest-even and saturating by the processor's own instruction, for E4M3FN and E5M2."""
TWO_LEVEL = tl.constexpr(len(BlockScale))
"""The rule after those of `BlockScale`: NVFP4's."""
_POWER_OF_TWO, _RCEIL, _FLOOR, _CEIL = (
    tl.constexpr(list(BlockScale).index(rule))
    for rule in (BlockScale.POWER_OF_TWO, BlockScale.RCEIL, BlockScale.FLOOR, BlockScale.CEIL)
)
_FIRST_E8M0 = tl.constexpr(min(number for number, rule in enumerate(BlockScale) if rule.is_e8m0))
_MAGNITUDE, _INF, _NAN, _FLOAT32_MAX = (tl.constexpr(x) for x in (0x7FFFFFFF, 0x7F800000, 0x7FC00000, 0x7F7FFFFF))


def mode_of(rounding: Rounding) -> int:
    """The number that the kernels know a rounding by."""
    return list(Rounding).index(rounding)


@functools.lru_cache(maxsize=256)
def constants(format: Format, overflow: Overflow, rounding: Rounding) -> tuple[int, ...]:
    """What the kernels take as FORMAT: all that the format and the modes decide."""
    finite_overflow, infinite = overflow_codes(format, overflow)
    return (
        format.mantissa_bits,
        format.bias,
        format.max_code,
        format.max_code if rounding is Rounding.TOWARD_ZERO else finite_overflow,
        infinite,
        -1 if format.inf_code is None else format.inf_code,
        -1 if format.nan_code is None else format.nan_code,
        format.magnitude_bits,
        int(format.has_negative_zero),
    )


@functools.lru_cache(maxsize=256)
def rule_constants(spec: TensorSpec) -> tuple[int | float, ...]:
    """What the kernels take as RULE, of a scaling in rows or blocks: its number, whether NaN is skipped, the bits of amax's floor,
    format.max, its reciprocal, and the bits of the largest amax whose RCEIL code is 0."""
    maximum = spec.format.max
    match spec.scaling:
        case Block(scale=scale, epsilon=epsilon, skip_nan=skip):
            number = list(BlockScale).index(scale)
        case Row(power_of_two=power_of_two, epsilon=epsilon):
            number, skip = (
                list(BlockScale).index(BlockScale.POWER_OF_TWO if power_of_two else BlockScale.FLOAT32),
                False,
            )
        case TwoLevel():
            number, epsilon, skip = TWO_LEVEL.value, 0.0, False
        case Unscaled() | Current() | Delayed():
            raise AssertionError(f"{spec} has one scale")
    reciprocal = float(np.float32(1.0) / np.float32(maximum))
    return number, int(skip), _bits(epsilon), maximum, reciprocal, _bits(zero_code_limit(maximum))


def _bits(value: float) -> int:
    """The bits of a float32."""
    return int(np.float32(value).view(np.int32))


E4M3 = tl.constexpr(constants(E4M3FN, Overflow.SATURATE, Rounding.NEAREST_EVEN))
"""FORMAT of NVFP4's scales."""


@triton.jit
def as_int(value):
    """The bits of float32."""
    return value.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    """The float32 of these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widen(loaded, KIND: tl.constexpr):
    """What was loaded, as float32; exact."""
    return as_float(loaded.to(tl.int32) << 16) if KIND == BFLOAT16 else loaded.to(tl.float32)


@triton.jit
def to_bfloat16(value):
    """float32 to the bits of bfloat16, int16, to nearest even, NaN kept."""
    bits = as_int(value)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & _MAGNITUDE) > _INF, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def narrow(value, KIND: tl.constexpr):
    """float32 as it is stored, to nearest even."""
    if KIND == BFLOAT16:
        stored = to_bfloat16(value)
    elif KIND == FLOAT16:
        stored = value.to(tl.float16)
    else:
        stored = value
    return stored


@triton.jit
def philox(block, seed_low, seed_high):
    """Philox4x32-10: the four words, uint32, of each counter `block` (int64) under the key (seed_low, seed_high), int32."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        high0, high2 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low2 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def draw(position, seed_low, seed_high):
    """The random bits, uint32, of each position (int64)."""
    c0, c1, c2, c3 = philox(position >> 2, seed_low, seed_high)
    word = (position & 3).to(tl.int32)
    return tl.where(word < 2, tl.where(word == 0, c0, c1), tl.where(word == 2, c2, c3))


@triton.jit
def draw_quads(block, seed_low, seed_high):
    """The random bits of four positions, from 4 * block on, for each block: the last axis becomes four times as long."""
    c0, c1, c2, c3 = philox(block, seed_low, seed_high)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def encode(value, draws, FORMAT: tl.constexpr, MODE: tl.constexpr):
    """The codes, int32, of float32; draws: uint32 of its shape, looked at where MODE is stochastic."""
    if MODE == HARDWARE:
        if FORMAT[0] == 3:
            code = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
        else:
            code = value.to(tl.float8e5).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        code = _encode_bits(as_int(value), draws, FORMAT, MODE)
    return code


@triton.jit
def _encode_bits(bits, draws, FORMAT: tl.constexpr, MODE: tl.constexpr):
    """The codes of float32 bits, without floating-point arithmetic."""
    M: tl.constexpr = FORMAT[0]
    EMIN: tl.constexpr = 1 - FORMAT[1]
    MAX_CODE: tl.constexpr = FORMAT[2]
    NAN_CODE: tl.constexpr = FORMAT[6]
    magnitude = bits & _MAGNITUDE
    field = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | tl.where(field > 0, 0x800000, 0)
    exponent = tl.maximum(field, 1) - 127
    place = tl.maximum(exponent, EMIN)
    drop = 23 - M + place - exponent
    cut = tl.minimum(drop, 25)  # all 24 bits, and the half above them
    whole = significand >> cut
    if MODE == NEAREST_EVEN:
        whole = (significand + (1 << (cut - 1)) - 1 + (whole & 1)) >> cut
    if MODE == NEAREST_AWAY:
        whole = (significand + (1 << (cut - 1))) >> cut
    if MODE == STOCHASTIC:
        rest = (significand & ((1 << cut) - 1)).to(tl.uint32, bitcast=True)
        up = tl.maximum(32 - drop, 0).to(tl.uint32, bitcast=True)
        down = tl.minimum(tl.maximum(drop - 32, 0), 31).to(tl.uint32, bitcast=True)
        likelihood = (rest << up) >> down
        whole += tl.where(tl.add(likelihood, draws, sanitize_overflow=False) < likelihood, 1, 0)
    code = ((place - EMIN) << M) + whole  # a carry into bit M + 1 is the next binade's first code
    code = tl.where(code > MAX_CODE, FORMAT[3], code)
    code = tl.where(magnitude == _INF, FORMAT[4], code)
    sign = (bits >> (31 - FORMAT[7])) & (1 << FORMAT[7])
    signed = code | sign
    if not FORMAT[8]:  # there is no -0
        signed = tl.where(code == 0, 0, signed)
    if NAN_CODE >= 0:
        signed = tl.where((magnitude > _INF) | (code == NAN_CODE), NAN_CODE, signed)
    return signed


@triton.jit
def decode(code, FORMAT: tl.constexpr):
    """The values, float32, of codes (int32)."""
    M: tl.constexpr = FORMAT[0]
    BIAS: tl.constexpr = FORMAT[1]
    INF_CODE: tl.constexpr = FORMAT[5]
    WIDTH: tl.constexpr = FORMAT[7]
    STEP: tl.constexpr = 2.0 ** (1 - BIAS - M)
    magnitude = code & ((1 << WIDTH) - 1)
    normal = (magnitude << (23 - M)) + ((127 - BIAS) << 23)
    bits = tl.where(magnitude >> M == 0, as_int(magnitude.to(tl.float32) * STEP), normal)
    bits = tl.where(magnitude > FORMAT[2], _NAN, bits)
    if INF_CODE >= 0:
        bits = tl.where(magnitude == INF_CODE, _INF, bits)
    sign = (code >> WIDTH) << 31
    if not FORMAT[8]:  # the code of -0 is NaN
        bits = tl.where((magnitude == 0) & (sign != 0), _NAN, bits)
    return as_float(bits | sign)


@triton.jit
def from_e8m0(code):
    """The values, float32, of E8M0 codes (int32): 2**-127 is a subnormal."""
    return as_float(tl.where(code == 0, 0x400000, tl.where(code == 255, _NAN, code << 23)))


@triton.jit
def _quotient_rule(peak, RULE: tl.constexpr):
    """`octavo.scaling.amax_scale`."""
    peak = tl.maximum(peak, RULE[2])
    usable = (peak > 0) & (peak < _INF)
    maximum = tl.full(peak.shape, RULE[3], tl.float32)
    scale = as_int(tl.div_rn(maximum, as_float(tl.where(usable, peak, 0x3F800000))))
    scale = tl.where(scale < _INF, scale, _FLOAT32_MAX)
    if RULE[0] == _POWER_OF_TWO:
        scale = scale & _INF
    scale = as_float(tl.where(usable, scale, 0x3F800000))
    return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _e8m0_rule(peak, EMAX: tl.constexpr, M: tl.constexpr, RULE: tl.constexpr):
    """`octavo.scaling.e8m0_codes`."""
    if RULE[0] == _RCEIL:
        small = peak < (67 << 23)  # 2**-60
        lifted = as_float(peak) * tl.where(small, 18446744073709551616.0, 1.0)
        bits = as_int(lifted * RULE[4])
        code = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0) - tl.where(small, 64, 0)
        code = tl.where(peak <= RULE[5], 0, tl.maximum(code, 1))
    elif RULE[0] == _FLOOR:
        code = (peak >> 23) - EMAX
    elif RULE[0] == _CEIL:
        code = (peak >> 23) + tl.where((peak & 0x7FFFFF) != 0, 1, 0) - EMAX
    else:
        code = (tl.add(peak, 1 << (22 - M), sanitize_overflow=False) >> 23) - EMAX  # only a NaN passes 2**31
    code = tl.minimum(tl.maximum(code, 0), 254)
    code = tl.where(peak >= _INF, 254 if RULE[1] else 255, code)
    factor = tl.where(code == 254, 0x400000, tl.where(code == 255, _NAN, (254 - code) << 23))
    return as_float(factor), code


@triton.jit
def _two_level_rule(peak, whole, RULE: tl.constexpr):
    """`two_level_target` and `two_level_encode_factor` of `octavo.scaling`; whole: the tensor's scale."""
    largest = as_float(tl.full(peak.shape, _FLOAT32_MAX, tl.int32))
    target = as_float(peak) * (whole * RULE[4])
    target = tl.where(target > largest, largest, target)
    code = _encode_bits(as_int(target), peak, E4M3, NEAREST_EVEN)
    one = tl.full(peak.shape, 1.0, tl.float32)
    factor = tl.div_rn(one, decode(code, E4M3) * tl.div_rn(one, one * whole))
    return tl.where(factor > largest, largest, factor), code


@triton.jit
def block_scale(peak, whole, FORMAT: tl.constexpr, RULE: tl.constexpr):
    """Of each block, from the bits of its amax: what its elements are multiplied with, and its scale as it is stored.

    whole: where a float32 lies, the tensor's scale; only two levels read it.
    """
    M: tl.constexpr = FORMAT[0]
    EMAX: tl.constexpr = (FORMAT[2] >> M) - FORMAT[1]
    if RULE[0] == TWO_LEVEL:
        factor, scale = _two_level_rule(peak, tl.load(whole), RULE)
    elif RULE[0] >= _FIRST_E8M0:
        factor, scale = _e8m0_rule(peak, EMAX, M, RULE)
    else:
        factor, scale = _quotient_rule(peak, RULE)
    return factor, scale
