"""The definition against slower ones: exact rational arithmetic, published tables of results, and gfloat for random bits."""

import bisect
import functools
import math
from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from octavo import reference
from octavo.formats import E2M1FN, E4M3FN, E5M2, E8M0FNU, FORMATS, Format, Specials
from octavo.rounding import Overflow, Rounding, random_bits

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAN, INF = math.nan, math.inf
NEAREST_EVEN, TOWARD_ZERO, NEAREST_AWAY, STOCHASTIC = Rounding
SIGNED = [format for format in FORMATS.values() if format.signed]


def by_name(format: Format) -> str:
    return format.name


@functools.cache
def table(format: Format) -> npt.NDArray[np.float32]:
    """What each code means, by ml_dtypes; E3M4FN, which it lacks, is E3M4 with numbers where that has Inf and NaN."""
    codes = np.arange(1 << format.bits, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        if hasattr(ml_dtypes, format.name):
            return codes.view(getattr(ml_dtypes, format.name)).astype(np.float32)
        lower = (codes & 0x8F | np.minimum(codes & 0x70, 0x60)).view(ml_dtypes.float8_e3m4).astype(np.float32)
    values = np.where(codes & 0x70 == 0x70, 2 * lower, lower)
    values[codes & 0x7F == 0x7F] = np.nan
    return values


def assert_same(values: npt.ArrayLike, expected: npt.ArrayLike, inputs: npt.ArrayLike) -> None:
    """Equal, NaNs being one and zeros keeping their sign; names the first inputs that are not."""
    got, want = np.asarray(values, np.float64), np.asarray(expected, np.float64)
    same = (np.isnan(got) & np.isnan(want)) | ((got == want) & (np.signbit(got) == np.signbit(want)))
    wrong = np.flatnonzero(~same)[:5]
    lines = [f"{np.asarray(inputs).reshape(-1)[i]!r} -> {got[i]!r}, not {want[i]!r}" for i in wrong]
    assert not lines, "\n".join(lines)


def special_value(format: Format) -> float:
    """What lies beyond the largest finite value of the format, by its kind of specials."""
    return {Specials.IEEE: INF, Specials.NAN_ONLY: NAN, Specials.UNSIGNED_ZERO: NAN, Specials.FINITE: format.max}[
        format.specials
    ]


@functools.cache
def ladder(format: Format) -> list[Fraction]:
    """Magnitudes by code, and one rung above the largest: that at which the next code would stand."""
    magnitudes = sorted({Fraction(float(value)) for value in table(format) if math.isfinite(value) and value >= 0})
    top, below = magnitudes[-1], magnitudes[-2]
    return [*magnitudes, top + (top - below) * (1 if format.mantissa_bits else 2)]


def neighbours(magnitude: Fraction, format: Format) -> dict[Rounding, int]:
    """The rung that a magnitude goes to under each rounding; past the end, the last one."""
    rungs = ladder(format)
    low = bisect.bisect_right(rungs, magnitude) - 1
    if low == len(rungs) - 1 or rungs[low] == magnitude:
        return dict.fromkeys((NEAREST_EVEN, TOWARD_ZERO, NEAREST_AWAY), low)
    down, up = magnitude - rungs[low], rungs[low + 1] - magnitude
    tie_up = low % 2 == 1 or format.mantissa_bits == 0  # a significand of no bits is odd
    return {
        NEAREST_EVEN: low + (up < down or (up == down and tie_up)),
        TOWARD_ZERO: low,
        NEAREST_AWAY: low + (up <= down),
    }


def defined(x: npt.NDArray[np.float64], format: Format) -> dict[tuple[Rounding, Overflow], npt.NDArray[np.float64]]:
    """The value that each element of x is cast to, under each rounding and overflow policy, by exact comparisons alone."""
    rungs = np.array([float(rung) for rung in ladder(format)])
    magnitudes, places = np.unique(np.where(np.isfinite(x), np.abs(x), 0.0), return_inverse=True)
    found = [neighbours(Fraction(float(magnitude)), format) for magnitude in magnitudes]
    special = special_value(format)
    results = {}
    for rounding in (NEAREST_EVEN, TOWARD_ZERO, NEAREST_AWAY):
        rung = np.array([place[rounding] for place in found])[places]
        for overflow in Overflow:
            beyond = special if overflow is Overflow.NONE and rounding is not TOWARD_ZERO else format.max
            infinite = format.max if overflow is Overflow.SATURATE else special
            value = np.where(rung == len(rungs) - 1, beyond, rungs[rung])
            value = np.where(np.isinf(x), infinite, value)
            value = np.where(np.isnan(x), NAN, value)
            value = np.copysign(value, np.where(np.signbit(x) & ((value != 0) | format.has_negative_zero), -1.0, 1.0))
            results[rounding, overflow] = value
    return results


def cast(x: npt.NDArray[np.generic], format: Format, rounding: Rounding, overflow: Overflow) -> npt.NDArray[np.float32]:
    return table(format)[reference.encode(x, format, rounding=rounding, overflow=overflow)]


def half_precision(dtype: np.dtype, format: Format) -> npt.NDArray[np.generic]:
    """All 65,536 patterns of a 16-bit float, signalling NaNs made quiet; without NaN for a format that has none."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    infinity, quiet_bit = (0x7F80, 0x40) if dtype == BFLOAT16 else (0x7C00, 0x200)
    nan = patterns & np.uint16(0x7FFF) > infinity
    x = np.where(nan, patterns | np.uint16(quiet_bit), patterns).view(dtype)
    return x if format.has_nan else x[~nan]


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("format", SIGNED, ids=by_name)
def test_half_precision_is_cast_as_exact_comparisons_say(format: Format, dtype: np.dtype) -> None:
    x = half_precision(dtype, format)
    for (rounding, overflow), expected in defined(x.astype(np.float64), format).items():
        assert_same(cast(x, format, rounding, overflow), expected, x)


@pytest.mark.parametrize("format", FORMATS.values(), ids=by_name)
def test_midpoints_and_their_float64_neighbours_are_cast_as_exact_comparisons_say(format: Format) -> None:
    rungs = np.array([float(rung) for rung in ladder(format)])
    points = np.concatenate([rungs, (rungs[:-1] + rungs[1:]) / 2, rungs / 2, 3 * rungs])
    points = np.concatenate([points, np.nextafter(points, INF), np.nextafter(points, 0), [INF, 1.7e308]])
    x = np.concatenate([points, -points])
    if not format.signed:
        x = points[points >= 2.0**-126]  # below, see the test of E8M0's bottom
    for (rounding, overflow), expected in defined(x, format).items():
        assert_same(cast(x, format, rounding, overflow), expected, x)


@pytest.mark.parametrize("format", SIGNED, ids=by_name)
def test_float64_subnormals_become_zero_and_keep_their_sign(format: Format) -> None:
    x = np.array([5e-324, -5e-324, 0.0, -0.0])
    minus = -0.0 if format.has_negative_zero else 0.0
    assert_same(cast(x, format, NEAREST_EVEN, Overflow.SATURATE), [0.0, minus, 0.0, minus], x)


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("format", FORMATS.values(), ids=by_name)
def test_representable_values_never_move(format: Format, rounding: Rounding) -> None:
    values = table(format)
    codes = np.flatnonzero(np.isfinite(values)).astype(np.uint8)
    for seed in range(20):
        again = reference.encode(
            values[codes], format, rounding=rounding, overflow=Overflow.NONE, seed=seed, offset=977 * seed
        )
        assert_same(values[again], values[codes], values[codes])


@pytest.mark.parametrize(
    ("name", "largest_kept", "first_over"),
    [
        ("float8_e4m3fn", 464.0, math.nextafter(464.0, INF)),
        ("float8_e5m2", math.nextafter(61440.0, 0), 61440.0),
        ("float8_e3m4", math.nextafter(15.75, 0), 15.75),
        ("float8_e3m4fn", 30.5, math.nextafter(30.5, INF)),
        ("float8_e4m3", math.nextafter(248.0, 0), 248.0),
        ("float8_e4m3fnuz", math.nextafter(248.0, 0), 248.0),
        ("float8_e5m2fnuz", math.nextafter(61440.0, 0), 61440.0),
        ("float8_e4m3b11fnuz", math.nextafter(31.0, 0), 31.0),
        ("float8_e8m0fnu", math.nextafter(1.5 * 2.0**127, 0), 1.5 * 2.0**127),
    ],
)
def test_nearest_even_leaves_the_finite_range_at_the_documented_place(
    name: str, largest_kept: float, first_over: float
) -> None:
    format = FORMATS[name]
    x = np.array([largest_kept, first_over])
    assert_same(cast(x, format, NEAREST_EVEN, Overflow.NONE), [format.max, special_value(format)], x)
    assert_same(cast(x, format, NEAREST_EVEN, Overflow.SATURATE), [format.max, format.max], x)


# torch 2.13 saturates E4M3FN and nothing else; ml_dtypes never does; CUDA's casts are those of __NV_SATFINITE.
PUBLISHED = [
    # format, input, torch, ml_dtypes, CUDA
    (E4M3FN, 464.0, 448.0, 448.0, 448.0),
    (E4M3FN, 465.0, 448.0, NAN, 448.0),
    (E4M3FN, 1e9, 448.0, NAN, 448.0),
    (E4M3FN, INF, 448.0, NAN, 448.0),
    (E4M3FN, NAN, NAN, NAN, NAN),
    (E4M3FN, -0.0, -0.0, -0.0, -0.0),
    (E4M3FN, 17.0, 16.0, 16.0, 16.0),
    (E4M3FN, 17.000002, 18.0, 18.0, 18.0),
    (E4M3FN, 2.0**-10, 0.0, 0.0, 0.0),
    (E4M3FN, 1.9 * 2.0**-10, 2.0**-9, 2.0**-9, 2.0**-9),
    (E4M3FN, 1.5 * 2.0**-9, 2.0**-8, 2.0**-8, 2.0**-8),
    (E5M2, 61439.0, 57344.0, 57344.0, 57344.0),
    (E5M2, 61440.0, INF, INF, 57344.0),
    (E5M2, 1.1250001, 1.25, 1.25, 1.25),
]


@pytest.mark.parametrize(
    ("format", "x", "torch", "ml", "cuda"), PUBLISHED, ids=[f"{row[0].name}-{row[1]!r}" for row in PUBLISHED]
)
def test_other_libraries_results_come_of_their_overflow_policy(
    format: Format, x: float, torch: float, ml: float, cuda: float
) -> None:
    single = np.array([x, -x], np.float32)
    torch_policy = Overflow.SATURATE if format is E4M3FN else Overflow.NONE
    for policy, expected in ((torch_policy, torch), (Overflow.NONE, ml), (Overflow.SATURATE, cuda)):
        assert_same(cast(single, format, NEAREST_EVEN, policy), [expected, -expected], single)


def test_infinity_under_saturate_finite_is_nan_in_e4m3fn_and_infinity_in_e5m2() -> None:
    x = np.array([1e9, INF, -INF], np.float32)
    assert_same(cast(x, E4M3FN, NEAREST_EVEN, Overflow.SATURATE_FINITE), [448.0, NAN, NAN], x)
    assert_same(cast(x, E5M2, NEAREST_EVEN, Overflow.SATURATE_FINITE), [57344.0, INF, -INF], x)


def test_float64_is_rounded_once() -> None:
    x = np.array([17 + 2.0**-40, 17 - 2.0**-40, 17.0])
    assert_same(cast(x, E4M3FN, NEAREST_EVEN, Overflow.SATURATE), [18.0, 16.0, 16.0], x)
    assert_same(cast(x.astype(np.float32), E4M3FN, NEAREST_EVEN, Overflow.SATURATE), [16.0, 16.0, 16.0], x)


def test_e8m0_rounds_below_its_second_value_as_ml_dtypes_does() -> None:
    x = np.arange(1 << 23, (1 << 24) + (1 << 22), 37, dtype=np.uint32)
    x = np.concatenate([np.arange(1, 1 << 23, 61, dtype=np.uint32), x]).view(np.float32)
    with np.errstate(invalid="ignore"):
        theirs = x.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert_same(cast(x, E8M0FNU, NEAREST_EVEN, Overflow.NONE), theirs, x)


def test_e8m0_takes_negatives_as_nan_and_zero_as_its_smallest_value_unless_nothing_saturates() -> None:
    x = np.array([0.0, -0.0, -3.0, -INF, NAN, INF])
    smallest, largest = 2.0**-127, 2.0**127
    for overflow, zero, infinite in (
        (Overflow.SATURATE, smallest, largest),
        (Overflow.SATURATE_FINITE, smallest, NAN),
        (Overflow.NONE, NAN, NAN),
    ):
        assert_same(cast(x, E8M0FNU, NEAREST_EVEN, overflow), [zero, zero, NAN, NAN, NAN, infinite], x)


def test_nan_is_refused_by_the_formats_without_one() -> None:
    with pytest.raises(
        ValueError, match="float4_e2m1fn has no NaN, but the input holds one; replace it first"
    ) as error:
        reference.encode(np.array([1.0, NAN]), E2M1FN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16, np.dtype(np.float16)], ids=str)
def test_signalling_nans_are_nan_without_a_warning(dtype: np.dtype) -> None:
    patterns = {"float32": 0x7F800001, "bfloat16": 0x7F81, "float16": 0x7C01}
    x = np.array([patterns[str(dtype)]], f"uint{8 * dtype.itemsize}").view(dtype)
    assert np.isnan(table(E4M3FN)[reference.encode(x, E4M3FN)]).all()


def test_decode_looks_the_codes_up() -> None:
    for format in FORMATS.values():
        codes = np.arange(1 << format.bits, dtype=np.uint8).reshape(2, -1)
        values = reference.decode(codes, format)
        assert (values.dtype, values.shape) == (np.float32, codes.shape)
        assert_same(values.reshape(-1), table(format), codes)
    with pytest.raises(ValueError, match="float4_e2m1fn has codes 0 to 15; got 16"):
        reference.decode(np.array([3, 16], np.uint8), E2M1FN)


def gfloat_format(format: Format) -> gfloat.FormatInfo:
    """The format as gfloat describes it."""
    high_nans = {Specials.IEEE: 2**format.mantissa_bits - 1, Specials.NAN_ONLY: 1}.get(format.specials, 0)
    return gfloat.FormatInfo(
        format.name,
        format.bits,
        format.mantissa_bits + 1,
        bias=format.bias,
        is_signed=format.signed,
        domain=gfloat.Domain.Extended if format.specials is Specials.IEEE else gfloat.Domain.Finite,
        has_nz=format.signed and format.specials is not Specials.UNSIGNED_ZERO,
        num_high_nans=high_nans,
        has_subnormals=format.signed,
        is_twos_complement=False,
    )


def spread(format: Format, count: int, dtype: type, seed: int) -> npt.NDArray[np.generic]:
    """Random numbers of either sign from well below the smallest subnormal of the format to just above its maximum."""
    generator = np.random.default_rng(seed)
    low = math.log2(format.smallest_subnormal) - 6 if format.signed else -126
    exponents = generator.uniform(low, format.emax + 1.5, count)
    signs = generator.choice([-1.0, 1.0], count) if format.signed else 1.0
    with np.errstate(over="ignore"):
        return (signs * 2.0**exponents).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("format", FORMATS.values(), ids=by_name)
def test_stochastic_rounding_of_given_bits_is_that_of_gfloat(format: Format, dtype: type) -> None:
    x = spread(format, 50_000, dtype, seed=1)
    seed, offset = 0x1234_5678_9ABC_DEF0, 13
    draws = random_bits(seed, offset, x.size).astype(np.int64)
    for saturate in (True, False) if format.has_nan else (True,):
        expected = gfloat.round_ndarray(
            gfloat_format(format), x.astype(np.float64), gfloat.RoundMode.StochasticFastest, saturate, draws, 32
        )
        overflow = Overflow.SATURATE if saturate else Overflow.NONE
        codes = reference.encode(x, format, rounding=STOCHASTIC, overflow=overflow, seed=seed, offset=offset)
        assert_same(table(format)[codes], expected, x)


BINADES = [
    (0.0, E4M3FN.tiny),
    *((2.0**exponent, 2.0 ** (exponent + 1)) for exponent in range(E4M3FN.emin, E4M3FN.emax)),
]


@pytest.mark.parametrize(("low", "high"), BINADES)
def test_stochastic_rounding_is_unbiased_in_every_binade(low: float, high: float) -> None:
    gap = max(low, E4M3FN.tiny) * E4M3FN.eps
    x = np.random.default_rng(2).uniform(low, high, 1 << 16).astype(np.float32)
    x *= np.where(np.arange(x.size) % 2, -1, 1).astype(np.float32)
    fraction = np.abs(x.astype(np.float64)) / gap % 1
    codes = reference.encode(x, E4M3FN, rounding=STOCHASTIC, seed=7)
    moved = (np.abs(table(E4M3FN)[codes]) - np.abs(x.astype(np.float64))) / gap
    assert np.all(np.abs(moved) < 1)
    assert abs(moved.sum()) < 4 * math.sqrt((fraction * (1 - fraction)).sum())


@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.75, 2.0**-10, 1 - 2.0**-10])
@pytest.mark.parametrize("base", [0.0, E4M3FN.smallest_subnormal, 1.0, 256.0])
def test_stochastic_rounding_goes_up_as_often_as_the_fraction_says(base: float, fraction: float) -> None:
    count = 1 << 16
    gap = max(base, E4M3FN.tiny) * E4M3FN.eps
    codes = reference.encode(np.full(count, base + fraction * gap), E4M3FN, rounding=STOCHASTIC, seed=3)
    values = table(E4M3FN)[codes]
    assert set(np.unique(values)) == {np.float32(base), np.float32(base + gap)}
    ups = int((values > base).sum())
    assert abs(ups - count * fraction) < 4 * math.sqrt(count * fraction * (1 - fraction))


def test_stochastic_rounding_goes_up_from_the_very_fraction_that_carries() -> None:
    draws = random_bits(21, 0, 1000).astype(np.float64)
    fraction = (2.0**32 - draws) / 2.0**32
    for base in (0.0, 16.0):
        gap = max(base, E4M3FN.tiny) * E4M3FN.eps
        up = reference.encode(base + fraction * gap, E4M3FN, rounding=STOCHASTIC, seed=21)
        stay = reference.encode(base + (fraction - 2.0**-32) * gap, E4M3FN, rounding=STOCHASTIC, seed=21)
        assert np.all(table(E4M3FN)[up] == base + gap)
        assert np.all(table(E4M3FN)[stay] == base)


def test_stochastic_rounding_needs_a_seed_and_repeats_with_it() -> None:
    x = spread(E5M2, 1000, np.float32, seed=5)
    with pytest.raises(ValueError, match="stochastic rounding draws from a seed, and none was given; pass seed=0, say"):
        reference.encode(x, E5M2, rounding=STOCHASTIC)
    first, again, other = (reference.encode(x, E5M2, rounding=STOCHASTIC, seed=seed) for seed in (8, 8, 9))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("scale", [1.0, 3.7, 2.0**-20, 1e10])
@pytest.mark.parametrize("format", SIGNED, ids=by_name)
def test_quantize_scales_and_unscales_in_float32_and_in_float64_for_float64(format: Format, scale: float) -> None:
    x = spread(format, 3000, np.float64, seed=4) / scale
    for dtype in (np.float64, np.float32, BFLOAT16):
        source = x.astype(dtype)
        wide = np.float64 if dtype is np.float64 else np.float32
        products = [wide(element) * wide(scale) for element in source]
        rounded = defined(np.array(products, np.float64), format)[NEAREST_EVEN, Overflow.SATURATE]
        expected = np.array([wide(value) / wide(scale) for value in rounded]).astype(dtype)
        got = reference.quantize(source, format, scale=scale)
        assert got.dtype == source.dtype
        assert_same(got, expected, source)
