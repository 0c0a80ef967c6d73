"""Casts of operand matrices against independent oracles: peers, ml_dtypes, and the published formulas in plain float32."""

import math
from collections.abc import Iterator
from typing import Any

import gfloat
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gfloat import formats as gfloat_formats
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

from octavo.formats import E2M1FN, E2M3FN, E3M2FN, E3M4FN, E4M3FN, E5M2, FORMATS, Format
from octavo.recipes import TensorSpec, Transform
from octavo.reference import SIGNS, Codes, decode_matrix, encode_matrix, hadamard
from octavo.rounding import Overflow, Rounding, random_bits
from octavo.scaling import Block, BlockScale, Current, Delayed, Row, Scaling, TwoLevel, Unscaled, e8m0_codes

F32 = np.float32
FLT_MAX = np.finfo(np.float32).max
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAN, INF = math.nan, math.inf
RCEIL, FLOOR, CEIL, EVEN = BlockScale.RCEIL, BlockScale.FLOOR, BlockScale.CEIL, BlockScale.EVEN
MX_RULES = (FLOOR, RCEIL, CEIL, EVEN)
MX_FORMATS = (E4M3FN, E5M2, E2M3FN, E3M2FN, E2M1FN)
SIGNED = [format for format in FORMATS.values() if format.signed]

Matrix = npt.NDArray[Any]


def by_name(value: Any) -> str:
    return str(getattr(value, "name", value))


def matrix(rows: int, columns: int, seed: int, low: float = -90, high: float = 90) -> npt.NDArray[np.float32]:
    """Normal numbers whose size changes from 16 to 16 and from row to row, zeros of either sign, and a block of zeros."""
    generator = np.random.default_rng(seed)
    sizes = generator.uniform(low, high, (rows, -(-columns // 16))).repeat(16, 1)[:, :columns]
    x = (generator.normal(size=(rows, columns)) * 2.0**sizes).astype(np.float32)
    x[generator.random(x.shape) < 0.02] = 0.0
    x[generator.random(x.shape) < 0.02] = -0.0
    x[:1, :33] = 0
    return x


def element_codes(values: Matrix, format: Format) -> npt.NDArray[np.uint8]:
    """ml_dtypes' codes of values clipped to the format's range, NaN kept."""
    clipped = np.clip(values, -format.max, format.max)
    if hasattr(ml_dtypes, format.name):
        with np.errstate(invalid="ignore"):
            return clipped.astype(getattr(ml_dtypes, format.name)).view(np.uint8)
    assert format is E3M4FN  # which ml_dtypes lacks: E3M4 with one more binade in the place of Inf and NaN
    upper = np.abs(clipped) >= 8
    halved = np.where(upper, clipped / 2, clipped).astype(ml_dtypes.float8_e3m4).view(np.uint8)
    return halved + np.where(upper, 0x10, 0).astype(np.uint8)


def element_values(codes: npt.NDArray[np.uint8], format: Format) -> npt.NDArray[np.float32]:
    """What ml_dtypes takes codes for."""
    return codes.view(getattr(ml_dtypes, format.name)).astype(np.float32)


def blocks(shape: tuple[int, int], across: int, along: int) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    """(place among the scales, place in the matrix) of each block."""
    for i in range(0, shape[0], across):
        for j in range(0, shape[1], along):
            yield (i // across, j // along), (slice(i, i + across), slice(j, j + along))


def mx(format: Format, rule: BlockScale = RCEIL, **settings: Any) -> TensorSpec:
    return TensorSpec(format, Block(shape=(1, 32), scale=rule, **settings))


def amax_of(block: Matrix) -> np.float32:
    return F32(np.abs(block).max())


# torchao


TORCHAO_FORMATS: dict[Format, Any] = {
    E4M3FN: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
    E2M3FN: "fp6_e2m3",
    E3M2FN: "fp6_e3m2",
    E2M1FN: torch.float4_e2m1fn_x2,
}


def torchao(x: npt.NDArray[Any], format: Format, rule: BlockScale) -> tuple[Matrix, Matrix, npt.NDArray[np.float32]]:
    """torchao 0.18's E8M0 codes, element codes and decoded values of blocks of 32."""
    source = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == BFLOAT16 else torch.from_numpy(x)
    kind = TORCHAO_FORMATS[format]
    scales, data = to_mx(source, kind, 32, ScaleCalculationMode[rule.name])
    codes = data.view(torch.uint8).numpy()
    if format is E2M1FN:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(x.shape)
    decoded = to_dtype(data, scales, kind, 32, torch.float32)
    return scales.view(torch.uint8).numpy(), codes, decoded.numpy()


def just_above_a_power_of_two(x: Matrix, format: Format) -> npt.NDArray[np.bool_]:
    """Where float32's log2 of amax / MAX, which torchao's RCEIL takes, may round down to a whole number."""
    quotient = np.abs(x.astype(np.float32)).reshape(x.shape[0], -1, 32).max(axis=2) / F32(format.max)
    mantissa = quotient.view(np.uint32) & 0x7FFFFF
    return (mantissa > 0) & (mantissa < 32)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
@pytest.mark.parametrize("rule", MX_RULES, ids=by_name)
@pytest.mark.parametrize("format", MX_FORMATS, ids=by_name)
def test_mx_blocks_are_torchao_s(format: Format, rule: BlockScale, dtype: np.dtype) -> None:
    x = matrix(300, 256, seed=11).astype(dtype)
    scales, codes, decoded = torchao(x, format, rule)
    ours = encode_matrix(x, mx(format, rule))
    usual = ~just_above_a_power_of_two(x, format) if rule is RCEIL else np.ones(scales.shape, bool)
    assert usual.mean() > 0.999
    assert np.array_equal(ours.scales[usual], scales[usual])
    elements = usual.repeat(32, 1)
    assert np.array_equal(ours.codes[elements], codes[elements])
    assert np.array_equal(decode_matrix(ours, mx(format, rule))[elements], decoded[elements])


@pytest.mark.parametrize("rule", [FLOOR, CEIL, EVEN], ids=by_name)
@pytest.mark.parametrize("format", MX_FORMATS, ids=by_name)
def test_mx_scales_are_torchao_s_for_amaxes_of_any_bits(format: Format, rule: BlockScale) -> None:
    patterns = np.random.default_rng(2).integers(0, 0x7F800000, (400, 32), np.uint32)
    x = np.where(np.arange(32) == 5, patterns, patterns >> 3).view(np.float32)
    scales, codes, _ = torchao(x, format, rule)
    ours = encode_matrix(x, mx(format, rule))
    assert np.array_equal(ours.scales, scales)
    usual = scales[:, 0] > 0
    assert np.array_equal(ours.codes[usual], codes[usual])


def test_mx_nan_is_torchao_s() -> None:
    x = np.ones((2, 64), np.float32)
    x[0, 3], x[1, 40] = NAN, -NAN
    for format in (E4M3FN, E5M2):
        for rule in MX_RULES:
            scales, _, decoded = torchao(x, format, rule)
            ours = encode_matrix(x, mx(format, rule))
            assert np.array_equal(ours.scales, scales)
            assert np.array_equal(ours.scales == 255, [[True, False], [False, True]])
            assert np.array_equal(decode_matrix(ours, mx(format, rule)), decoded, equal_nan=True)


def one_block(*values: float) -> npt.NDArray[np.float32]:
    """A block of 32 that begins with these values, the rest zeros."""
    x = np.zeros((1, 32), np.float32)
    x[0, : len(values)] = values
    return x


TORCHAO_SLIPS = {
    "log2 in float32 is a whole number just above a power of two": (E4M3FN, RCEIL, 469762176.0, 147, 148),
    "the same below one, of a large binade": (E5M2, RCEIL, 57344 * 2.0**60 * (1 + 2.0**-21), 187, 188),
    "Inf has the exponent 128, of which emax is taken": (E4M3FN, FLOOR, INF, 247, 255),
    "the same by CEIL": (E5M2, CEIL, INF, 240, 255),
    "the same by EVEN": (E4M3FN, EVEN, INF, 247, 255),
    "Inf has the largest scale, as in Transformer Engine": (E4M3FN, RCEIL, INF, 254, 255),
}


@pytest.mark.parametrize(("format", "rule", "amax", "theirs", "ours"), TORCHAO_SLIPS.values(), ids=list(TORCHAO_SLIPS))
def test_where_torchao_s_scale_code_is_another(
    format: Format, rule: BlockScale, amax: float, theirs: int, ours: int
) -> None:
    x = one_block(amax, 1.0)
    assert torchao(x, format, rule)[0].item() == theirs
    assert encode_matrix(x, mx(format, rule)).scales.item() == ours


@pytest.mark.parametrize(
    ("rule", "theirs"), [(FLOOR, 2.0**-127), (CEIL, 2.0**-127), (EVEN, 2.0**-127), (RCEIL, 0.0)], ids=by_name
)
def test_where_torchao_decodes_the_smallest_scale_to_another_value(rule: BlockScale, theirs: float) -> None:
    """It divides by 2**-126 (RCEIL: by 1) under a scale of 2**-127."""
    x = one_block(2.0**-126)
    assert torchao(x, E4M3FN, rule)[2][0, 0] == theirs
    assert decode_matrix(encode_matrix(x, mx(E4M3FN, rule)), mx(E4M3FN, rule))[0, 0] == 2.0**-126


def test_where_torchao_makes_numbers_of_nan() -> None:
    x = one_block(1.0, NAN)
    for format in (E2M1FN, E2M3FN, E3M2FN):
        assert torchao(x, format, FLOOR)[0].item() == 255
        with pytest.raises(ValueError, match=f"{format.name} has no NaN, but the input holds one"):
            encode_matrix(x, mx(format, FLOOR))
        for rule in MX_RULES:  # an Inf, too, makes the scale NaN, and with it the block
            with pytest.raises(ValueError, match=f"{format.name} has no NaN"):
                encode_matrix(one_block(INF), mx(format, rule))
            assert encode_matrix(one_block(INF), mx(format, rule, skip_nan=True)).codes[0, 0] == format.max_code


# gfloat


GFLOAT_FORMATS = {
    E4M3FN: gfloat_formats.format_info_mxfp8_e4m3,
    E5M2: gfloat_formats.format_info_mxfp8_e5m2,
    E2M3FN: gfloat_formats.format_info_mxfp6_e2m3,
    E3M2FN: gfloat_formats.format_info_mxfp6_e3m2,
    E2M1FN: gfloat_formats.format_info_mxfp4_e2m1,
}
GFLOAT_ROUNDINGS = {
    Rounding.NEAREST_EVEN: gfloat.RoundMode.TiesToEven,
    Rounding.TOWARD_ZERO: gfloat.RoundMode.TowardZero,
    Rounding.NEAREST_AWAY: gfloat.RoundMode.TiesToAway,
}


@pytest.mark.parametrize("rounding", GFLOAT_ROUNDINGS, ids=by_name)
@pytest.mark.parametrize("format", MX_FORMATS, ids=by_name)
def test_floor_blocks_are_gfloat_s(format: Format, rounding: Rounding) -> None:
    info = GFLOAT_FORMATS[format]
    x = matrix(12, 96, seed=5, low=-125, high=110)
    x[3, :32] = one_block(2.0**-149, 2.0**-126)
    spec = TensorSpec(format, Block(shape=(1, 32), scale=FLOOR), rounding)
    ours = encode_matrix(x, spec)
    for (i, j), place in blocks(x.shape, 1, 32):
        block = x[place][0].astype(np.float64)
        scale = gfloat.compute_scale_amax(info.etype.emax, block)
        scale_code, *codes = gfloat.encode_block(info, scale, block / scale, GFLOAT_ROUNDINGS[rounding])
        assert ours.scales[i, j] == scale_code
        assert ours.codes[place].tolist() == [codes]
        decoded = list(gfloat.decode_block(info, [scale_code, *codes]))
        assert decode_matrix(ours, spec)[place].tolist() == [decoded]


@pytest.mark.parametrize("format", MX_FORMATS, ids=by_name)
def test_stochastic_blocks_of_given_bits_are_gfloat_s(format: Format) -> None:
    info = GFLOAT_FORMATS[format]
    x = matrix(40, 96, seed=6)
    spec = TensorSpec(format, Block(shape=(1, 32), scale=FLOOR), Rounding.STOCHASTIC)
    ours = encode_matrix(x, spec, seed=99, offset=7)
    draws = random_bits(99, 7, x.size).astype(np.int64).reshape(x.shape)
    for _, place in blocks(x.shape, 1, 32):
        block = x[place].astype(np.float64)
        scaled = block / gfloat.compute_scale_amax(info.etype.emax, block)
        rounded = gfloat.round_ndarray(info.etype, scaled, gfloat.RoundMode.StochasticFastest, True, draws[place], 32)
        assert np.array_equal(element_values(ours.codes[place], format), rounded)


# Formulas


def float_block_scale(amax: np.float32, maximum: float, epsilon: float, power_of_two: bool) -> np.float32:
    """Transformer Engine's scale of a block, in float32."""
    amax = amax if math.isnan(amax) else max(amax, F32(epsilon))
    if amax == 0 or not math.isfinite(amax):
        return F32(1)
    with np.errstate(over="ignore"):
        scale = min(F32(maximum) / amax, FLT_MAX)
    return F32(2.0 ** (math.frexp(scale)[1] - 1)) if power_of_two else scale


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize("power_of_two", [True, False], ids=["power of two", "float32"])
@pytest.mark.parametrize("shape", [(1, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("format", [E4M3FN, E5M2], ids=by_name)
def test_float32_blocks_are_the_formula_s(
    format: Format, shape: tuple[int, int], power_of_two: bool, epsilon: float
) -> None:
    x = matrix(260, 300, seed=1, low=-40, high=40)
    x[5, 10], x[6, 200], x[129, 280] = INF, 1e-41, NAN
    x[6, 128:200] = x[6, 201:256] = 0
    rule = BlockScale.POWER_OF_TWO if power_of_two else BlockScale.FLOAT32
    spec = TensorSpec(format, Block(shape=shape, scale=rule, epsilon=epsilon))
    ours = encode_matrix(x, spec)
    decoded = decode_matrix(ours, spec)
    assert ours.scales.dtype == np.float32
    for place, inside in blocks(x.shape, *shape):
        scale = float_block_scale(amax_of(x[inside]), format.max, epsilon, power_of_two)
        back = F32(1) / scale
        codes = element_codes(x[inside] * scale, format)
        assert ours.scales[place] == back
        values = element_values(codes, format)
        assert np.array_equal(element_values(ours.codes[inside], format), values, equal_nan=True)
        assert np.array_equal(decoded[inside], values * back, equal_nan=True)


def ceiling_code(amax: np.float32, maximum: float) -> int:
    """The E8M0 code of amax * fl(1 / MAX) in float32: its exponent, and one more where a bit below is set."""
    value = F32(amax * (F32(1) / F32(maximum)))
    if np.isnan(value):
        return 255
    if np.isinf(value):
        return 254
    if value <= 2.0**-127:
        return 0
    exponent, mantissa = divmod(int(value.view(np.uint32)), 1 << 23)
    return exponent + (mantissa > 0 and exponent < 254)


@pytest.mark.parametrize("format", SIGNED, ids=by_name)
def test_rceil_codes_are_the_formula_s(format: Format) -> None:
    generator = np.random.default_rng(4)
    edges = np.ldexp(F32(format.max), np.arange(-136, 127 - format.emax)).view(np.int32)
    bits = np.concatenate(
        [generator.integers(0, 0x7F800000, 4000), *(edges + step for step in range(-3, 4)), range(40), [0x7F7FFFFF]]
    )
    amaxes = bits[(bits >= 0) & (bits < 0x7F800000)].astype(np.int32).view(np.float32)
    codes = e8m0_codes(amaxes, format.max, format.emax, format.mantissa_bits, Block(scale=RCEIL))
    assert codes.dtype == np.int32
    assert codes.tolist() == [ceiling_code(amax, format.max) for amax in amaxes]
    special = np.array([INF, NAN, -NAN], np.float32)
    for skip_nan, expected in ((True, [254, 255, 255]), (False, [255, 255, 255])):
        scaling = Block(scale=RCEIL, skip_nan=skip_nan)
        assert e8m0_codes(special, format.max, format.emax, format.mantissa_bits, scaling).tolist() == expected


@pytest.mark.parametrize("format", SIGNED, ids=by_name)
def test_rceil_is_the_exact_ceiling_for_every_mantissa(format: Format) -> None:
    amaxes = np.arange(0x3F800000, 0x40000000, dtype=np.int32).view(np.float32)
    scales = 2.0 ** (e8m0_codes(amaxes, format.max, format.emax, format.mantissa_bits, Block(scale=RCEIL)) - 127.0)
    inexact = (amaxes > format.max * scales) | (amaxes <= format.max * scales / 2)
    # One ulp above 15.5 * 2**k the float32 product is 2**k itself; such an element rounds to 15.5 without saturating.
    assert amaxes[inexact].tolist() == ([1.9375 + 2.0**-23] if format.max == 15.5 else [])


def transformer_engine_mx(block: npt.NDArray[np.float32], format: Format) -> tuple[int, npt.NDArray[np.uint8]]:
    """Its MXFP8: NaN passed over by amax, Inf the largest scale, elements times the exact power of two."""
    code = ceiling_code(F32(np.fmax.reduce(np.abs(block), axis=None, initial=0)), format.max)
    with np.errstate(over="ignore"):
        return code, element_codes(block * F32(2.0 ** (127 - code)), format)


@pytest.mark.parametrize("format", [E4M3FN, E5M2], ids=by_name)
def test_blocks_that_skip_nan_are_transformer_engine_s(format: Format) -> None:
    x = matrix(40, 96, seed=8, low=-140, high=120)
    x[1, :3], x[2, 40], x[3, 70], x[4, :32] = (NAN, 3, -1), INF, -INF, NAN
    x[5, 3], x[5, 4], x[6, 7] = NAN, INF, FLT_MAX
    spec = mx(format, skip_nan=True)
    ours = encode_matrix(x, spec)
    for place, inside in blocks(x.shape, 1, 32):
        code, codes = transformer_engine_mx(x[inside], format)
        assert ours.scales[place] == code
        values = element_values(codes, format)
        assert np.array_equal(element_values(ours.codes[inside], format), values, equal_nan=True)
    assert np.array_equal(np.isnan(decode_matrix(ours, spec)), np.isnan(x))
    assert ours.amax == INF


def nvfp4(x: npt.NDArray[np.float32], across: int) -> Iterator[tuple[Any, Any, int, Any, Any]]:
    """(place among scales, place in the matrix, E4M3 code, E2M1 codes, values) of each block, as Transformer Engine has them."""
    with np.errstate(over="ignore", divide="ignore", under="ignore"):
        peak = amax_of(x)
        whole = F32(1) if peak == 0 else min(F32(2688) / peak, FLT_MAX)
        whole = F32(1) if whole == 0 else whole
        for place, inside in blocks(x.shape, across, 16):
            target = min(amax_of(x[inside]) * F32(whole * F32(F32(1) / F32(6))), FLT_MAX)
            code = element_codes(np.array([target]), E4M3FN)
            block = element_values(code, E4M3FN)[0]
            encode = min(F32(1) / F32(block * F32(F32(1) / whole)), FLT_MAX)
            codes = element_codes(x[inside] * encode, E2M1FN)
            decode = F32(F32(block * peak) * F32(F32(1) / F32(2688)))
            yield place, inside, code.item(), codes, element_values(codes, E2M1FN) * decode


@pytest.mark.parametrize("across", [1, 16])
@pytest.mark.parametrize("low", [-4, -30, -140])
@pytest.mark.parametrize("size", [2.0**-120, 2.0**-60, 1.0, 2.0**100])
def test_two_level_blocks_are_nvfp4_s(across: int, low: float, size: float) -> None:
    x = matrix(48, 80, seed=3, low=low, high=0) * F32(size)
    spec = TensorSpec(E2M1FN, TwoLevel(shape=(across, 16)))
    for source in (x, np.zeros_like(x), x[:1, 33:39]):
        ours = encode_matrix(source, spec)
        decoded = decode_matrix(ours, spec)
        assert ours.amax == amax_of(source)
        for place, inside, scale, codes, values in nvfp4(source, across):
            assert ours.scales[place] == scale
            assert np.array_equal(ours.codes[inside], codes)
            assert np.array_equal(decoded[inside], values)


def sylvester() -> npt.NDArray[np.float64]:
    """Sylvester's Hadamard matrix of order 16."""
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    return np.kron(np.kron(two, two), np.kron(two, two))


@pytest.mark.parametrize("columns", [16, 48, 5, 33])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16], ids=str)
def test_the_transform_is_a_product_with_a_matrix(columns: int, dtype: np.dtype) -> None:
    """Exactly, where float32 sums are exact: for numbers of few bits, whatever their common size."""
    generator = np.random.default_rng(columns)
    x = (generator.integers(-255, 256, (20, columns)) * 2.0 ** generator.integers(-60, 60, (20, 1))).astype(dtype)
    padded = np.zeros((20, -(-columns // 16) * 16))
    padded[:, :columns] = x
    turned = (padded.reshape(-1, 16) @ (np.diag(SIGNS) @ sylvester() / 4)).reshape(padded.shape)
    result = hadamard(x)
    assert result.dtype == np.float32
    assert np.array_equal(result, turned.astype(BFLOAT16).astype(np.float32))
    assert SIGNS == (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def test_transforming_both_operands_leaves_their_product() -> None:
    left, right = (np.random.default_rng(seed).integers(-3, 4, (6, 48)).astype(np.float32) for seed in (1, 2))
    assert np.array_equal(hadamard(left) @ hadamard(right).T, left @ right.T)


def test_a_transformed_matrix_is_cast_as_the_transform_left_it() -> None:
    x = matrix(6, 40, seed=12, low=-3, high=3)
    spec = TensorSpec(E2M1FN, TwoLevel(), Rounding.STOCHASTIC, transform=Transform.HADAMARD)
    ours = encode_matrix(x, spec, seed=4, offset=9)
    plain = TensorSpec(E2M1FN, TwoLevel(), Rounding.STOCHASTIC)
    expected = encode_matrix(hadamard(x), plain, seed=4, offset=9)
    assert ours.codes.shape == (6, 48)
    assert all(np.array_equal(one, other) for one, other in zip(ours, expected, strict=True))


# ml_dtypes as the element cast


ALL_SCALINGS: list[Scaling] = [
    Unscaled(),
    Current(),
    Delayed(),
    Row(power_of_two=True),
    Block(shape=(2, 24), scale=BlockScale.FLOAT32),
    *(Block(shape=(1, 32), scale=rule) for rule in MX_RULES),
    TwoLevel(shape=(2, 16)),
]


@pytest.mark.parametrize("scaling", ALL_SCALINGS, ids=lambda scaling: type(scaling).__name__)
@pytest.mark.parametrize("format", SIGNED, ids=by_name)
def test_elements_are_ml_dtypes_casts_of_what_they_are_multiplied_with(format: Format, scaling: Scaling) -> None:
    x = matrix(30, 75, seed=9, low=-20, high=12)
    ours = encode_matrix(x, TensorSpec(format, scaling), scale=3.0)
    factor = np.empty(x.shape, np.float32)
    across, along = getattr(scaling, "shape", (1 if isinstance(scaling, Row) else 30, 75))
    peak = amax_of(x)
    for place, inside in blocks(x.shape, across, along):
        amax = amax_of(x[inside])
        match scaling:
            case Unscaled():
                factor[inside] = 1
            case Delayed():
                factor[inside] = 3
            case TwoLevel():
                whole = F32(format.max * 448) / peak
                scale = element_values(ours.scales[place].reshape(1), E4M3FN)[0]
                with np.errstate(divide="ignore"):
                    factor[inside] = min(F32(1) / F32(scale * F32(F32(1) / whole)), FLT_MAX)
            case Block(scale=rule) if rule in MX_RULES:
                scale = ours.scales[place].reshape(1).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[0]
                factor[inside] = F32(1) / scale
            case _:
                factor[inside] = float_block_scale(amax, format.max, 0.0, isinstance(scaling, Row))
    with np.errstate(over="ignore"):
        assert np.array_equal(ours.codes, element_codes(x * factor, format))
    assert ours.amax == peak


def test_every_e8m0_scale_decodes_as_ml_dtypes_has_it() -> None:
    scales = np.arange(256, dtype=np.uint8).reshape(1, 256)
    codes = np.tile(np.arange(128, dtype=np.uint8)[:32], (1, 256))
    expected = element_values(codes, E4M3FN) * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32).repeat(32, 1)
    decoded = decode_matrix(Codes(codes, scales, F32(0)), mx(E4M3FN))
    assert np.array_equal(decoded, expected, equal_nan=True)


# Rows and edges


ROWS: dict[str, tuple[list[float], tuple[int, int, int, int, int]]] = {
    "256": ([256.0], (127, 127, 127, 127, 127)),
    "448": ([448.0], (127, 127, 128, 127, 127)),
    "449": ([449.0], (127, 128, 128, 127, 128)),
    "480": ([480.0], (127, 128, 128, 127, 128)),
    "495.99997": ([495.99997], (127, 128, 128, 127, 128)),
    "496": ([496.0], (127, 128, 128, 128, 128)),
    "511.99997": ([511.99997], (127, 128, 128, 128, 128)),
    "255.99998": ([255.99998], (126, 127, 127, 127, 127)),
    "469762176": ([469762176.0], (147, 148, 148, 147, 148)),
    "469762080": ([469762080.0], (147, 148, 148, 147, 148)),
    "469762048": ([448 * 2.0**20], (147, 147, 148, 147, 147)),
    "zeros": ([0.0, -0.0], (0, 0, 0, 0, 0)),
    "Inf": ([INF, 1.0], (255, 255, 255, 255, 254)),
    "NaN, 3, -1": ([NAN, 3.0, -1.0], (255, 255, 255, 255, 120)),
    "2^-126": ([2.0**-126], (0, 0, 0, 0, 0)),
    "2^-118": ([2.0**-118], (1, 1, 1, 1, 1)),
    "FLT_MAX": ([float(FLT_MAX)], (246, 247, 247, 247, 247)),
}
COLUMNS = (mx(E4M3FN, FLOOR), mx(E4M3FN, RCEIL), mx(E4M3FN, CEIL), mx(E4M3FN, EVEN), mx(E4M3FN, RCEIL, skip_nan=True))


@pytest.mark.parametrize(("values", "codes"), ROWS.values(), ids=list(ROWS))
def test_the_table_of_scale_codes(values: list[float], codes: tuple[int, ...]) -> None:
    cast = [encode_matrix(one_block(*values), spec) for spec in COLUMNS]
    assert tuple(int(one.scales.item()) for one in cast) == codes
    for one, spec in zip(cast, COLUMNS, strict=True):
        decoded = decode_matrix(one, spec)[0]
        if 255 in one.scales:
            assert np.isnan(decoded).all()
        else:
            scale = 2.0 ** (int(one.scales.item()) - 127)
            elements = element_values(element_codes(one_block(*values) / scale, E4M3FN), E4M3FN)
            with np.errstate(over="ignore", invalid="ignore"):
                assert np.array_equal(decoded, elements[0] * F32(scale), equal_nan=True)
            assert np.array_equal(np.signbit(decoded), np.signbit(one_block(*values)[0]))


@pytest.mark.parametrize("scaling", ALL_SCALINGS, ids=lambda scaling: type(scaling).__name__)
def test_empty_matrices_are_cast_to_empty_ones(scaling: Scaling) -> None:
    for shape in ((0, 40), (3, 0), (0, 0)):
        for transform in Transform:
            spec = TensorSpec(E4M3FN, scaling, transform=transform)
            ours = encode_matrix(np.zeros(shape, np.float32), spec)
            assert (ours.codes.size, ours.codes.dtype, ours.scales.size, ours.amax) == (0, np.uint8, 0, 0)
            assert decode_matrix(ours, spec).shape == ours.codes.shape


@pytest.mark.parametrize("scaling", [s for s in ALL_SCALINGS if isinstance(s, (Block, TwoLevel))], ids=str)
def test_the_last_blocks_hold_what_there_is(scaling: Block | TwoLevel) -> None:
    across, along = scaling.shape
    x = matrix(5 * across - 1 if across > 1 else 5, 3 * along + 5, seed=7, low=-6, high=6)
    filled = np.zeros((-(-x.shape[0] // across) * across, -(-x.shape[1] // along) * along), np.float32)
    filled[: x.shape[0], : x.shape[1]] = x
    spec = TensorSpec(E4M3FN, scaling)
    ours, whole = encode_matrix(x, spec), encode_matrix(filled, spec)
    assert np.array_equal(ours.scales, whole.scales)
    assert np.array_equal(ours.codes, whole.codes[: x.shape[0], : x.shape[1]])


@pytest.mark.parametrize("shape", [(4, 33), (5, 32), (1, 31)], ids=str)
def test_blocks_that_must_divide_say_what_does_not(shape: tuple[int, int]) -> None:
    for scaling in (Block(shape=(2, 32), padding=False), TwoLevel(shape=(2, 32), padding=False)):
        assert encode_matrix(np.ones((4, 64), np.float32), TensorSpec(E4M3FN, scaling)).scales.shape == (2, 2)
        with pytest.raises(ValueError, match="write padding=True or choose sizes that they divide") as error:
            encode_matrix(np.ones(shape, np.float32), TensorSpec(E4M3FN, scaling))
        assert f"blocks of (2, 32) do not divide an operand of {shape}" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", [E4M3FN, E5M2, E2M1FN], ids=by_name)
def test_blocks_at_the_ends_of_float32(format: Format) -> None:
    """Subnormal amaxes meet the smallest scale, FLT_MAX is cast without overflow on the way."""
    tiny, huge = one_block(2.0**-149, 2.0**-140, -(2.0**-127)), one_block(float(FLT_MAX), -1.0)
    for rule in MX_RULES:
        ours = encode_matrix(tiny, mx(format, rule))
        assert ours.scales.item() == 0
        assert np.array_equal(ours.codes, element_codes(tiny.astype(np.float64) * 2.0**127, format))
        ours = encode_matrix(huge, mx(format, rule))
        assert ours.codes[0, 0] == element_codes(FLT_MAX / F32(2.0 ** (int(ours.scales.item()) - 127)), format)
    plain = encode_matrix(tiny, TensorSpec(format, Block(shape=(1, 32), scale=BlockScale.FLOAT32)))
    assert plain.scales.item() == F32(1) / FLT_MAX
    assert np.array_equal(plain.codes, element_codes(tiny * FLT_MAX, format))
    power = encode_matrix(tiny, TensorSpec(format, Block(shape=(1, 32), scale=BlockScale.POWER_OF_TWO)))
    assert power.scales.item() == 2.0**-127


def test_a_block_whose_two_level_scale_underflows_decodes_to_zero() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, 0], x[0, 16:19] = 6 * 448, (2.0**-9, -(2.0**-9), 0)
    spec = TensorSpec(E2M1FN, TwoLevel())
    ours = encode_matrix(x, spec)
    assert ours.scales.tolist() == [[0x7E, 0]]
    assert ours.codes[0, 16:20].tolist() == [7, 15, 0, 0]
    assert decode_matrix(ours, spec)[0, 16:].tolist() == [0] * 16


def test_two_level_scales_of_special_values() -> None:
    x = one_block(INF, 1.0)
    spec = TensorSpec(E2M1FN, TwoLevel())
    ours = encode_matrix(x, spec)
    assert ours.scales.tolist() == [[0x7E, 0]]
    assert ours.codes[0, :2].tolist() == [7, 0]
    assert decode_matrix(ours, spec)[0, 0] == INF
    with pytest.raises(ValueError, match="float4_e2m1fn has no NaN, but the input holds one"):
        encode_matrix(one_block(NAN), spec)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("scaling", [*ALL_SCALINGS, Block(scale=RCEIL, skip_nan=True)], ids=str)
def test_half_precision_is_cast_as_the_float32_it_is(scaling: Scaling, dtype: np.dtype) -> None:
    x = matrix(20, 70, seed=13, low=-8, high=8).astype(dtype)
    if isinstance(scaling, Block):
        x[3, 4] = NAN
    spec = TensorSpec(E4M3FN, scaling)
    for one, other in zip(encode_matrix(x, spec), encode_matrix(x.astype(np.float32), spec), strict=True):
        assert np.array_equal(one, other, equal_nan=True)


def test_float64_is_rounded_once() -> None:
    x = one_block(256.0, 1.0).astype(np.float64)
    x[0, 1] = 17 + 2.0**-40
    assert encode_matrix(x, mx(E4M3FN)).codes[0, :2].tolist() == element_codes(np.array([256.0, 18]), E4M3FN).tolist()
    rounded = encode_matrix(x.astype(np.float32), mx(E4M3FN))
    assert rounded.codes[0, 1] == element_codes(np.array([16.0]), E4M3FN)


STOCHASTIC_SCALINGS = [Unscaled(), Row(), Block(shape=(1, 32), scale=RCEIL), TwoLevel()]


@pytest.mark.parametrize("scaling", STOCHASTIC_SCALINGS, ids=lambda scaling: type(scaling).__name__)
def test_draws_go_by_the_place_in_the_matrix(scaling: Scaling) -> None:
    x = matrix(6, 96, seed=14, low=-3, high=3)
    x[:, 0] = 100.0  # one amax for each row, and for all
    spec = TensorSpec(E2M1FN, scaling, Rounding.STOCHASTIC)
    whole = encode_matrix(x, spec, seed=5, offset=1000)
    assert not np.array_equal(whole.codes, encode_matrix(x, spec, seed=6, offset=1000).codes)
    for row in range(6):
        part = encode_matrix(x[row : row + 1], spec, seed=5, offset=1000 + 96 * row)
        assert np.array_equal(part.codes[0], whole.codes[row])
    below = encode_matrix(x[2:], spec, seed=5, offset=1000 + 2 * 96)
    assert np.array_equal(below.codes, whole.codes[2:])
    one = encode_matrix(x[:1], spec, seed=5)
    if isinstance(scaling, (Unscaled, Block)):
        for start in (0, 32, 64):
            part = encode_matrix(x[:1, start:], spec, seed=5, offset=start)
            assert np.array_equal(part.codes, one.codes[:, start:])


def test_a_matrix_with_random_rounding_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="stochastic rounding draws from a seed, and none was given; pass seed=0, say"):
        encode_matrix(np.ones((2, 32), np.float32), TensorSpec(E2M1FN, TwoLevel(), Rounding.STOCHASTIC))


def test_overflow_policies_hold_within_blocks() -> None:
    """Only FLOOR leaves amaxes beyond the largest value: 511 under a scale of 1."""
    for overflow, value in ((Overflow.SATURATE, 448), (Overflow.SATURATE_FINITE, 448), (Overflow.NONE, NAN)):
        spec = TensorSpec(E4M3FN, Block(shape=(1, 32), scale=FLOOR), overflow=overflow)
        decoded = decode_matrix(encode_matrix(one_block(511.0, -2.0), spec), spec)
        assert np.array_equal(decoded[0, :2], [value, -2], equal_nan=True)
