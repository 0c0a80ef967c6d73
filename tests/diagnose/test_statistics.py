"""Statistics of casts, against the definitions spelled out element by element in float64."""

import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import Overflow
from octavo.diagnose.statistics import TensorStatistics, measure
from octavo.formats import (
    BFLOAT16,
    E2M1FN,
    E2M3FN,
    E3M2FN,
    E3M4,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E8M0FNU,
    FLOAT16,
    FORMATS,
    TF32,
    Format,
)

FLOAT32_MAX = float(np.finfo(np.float32).max)
LIMITS = [
    (E4M3FN, 464.0),
    (E5M2, 61440.0),
    (E4M3FNUZ, 248.0),
    (E3M4, 15.75),
    (E2M3FN, 7.75),
    (E3M2FN, 30.0),
    (E2M1FN, 7.0),
    (E8M0FNU, 1.5 * 2.0**127),
    (FLOAT16, 65520.0),
    (BFLOAT16, 2.0**128 - 2.0**119),
    (TF32, 2.0**128 - 2.0**116),
]
"""The largest value and half a last place more."""

bits = st.integers(0, 2**32 - 1)
floats = st.one_of(
    bits.map(lambda value: float(np.uint32(value).view(np.float32)) if value & 0x7FFFFFFF <= 0x7F800000 else math.nan),
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, FLOAT32_MAX, 2.0**-149, -(2.0**-126), 464.0, 464.01]),
)
tensors = st.lists(floats, max_size=40).map(lambda values: np.array(values, np.float32))


def same(got: float, expected: float) -> bool:
    """Equal, NaN to NaN."""
    return got == expected or (math.isnan(got) and math.isnan(expected))


def fraction(part: int, whole: int) -> float:
    return float(Fraction(part, whole)) if whole else 0.0


def spelled_out(before: npt.NDArray[Any], after: npt.NDArray[Any], limit: float, scale: float) -> dict[str, Any]:
    """All that is measured but the format and the scale, one element at a time."""
    pairs = [(float(x), float(y)) for x, y in zip(before.ravel(), after.ravel(), strict=True)]
    finite = [(x, y) for x, y in pairs if math.isfinite(x)]
    nonzero = [(x, y) for x, y in finite if x != 0]
    places = [math.frexp(x)[1] - 1 for x, _ in nonzero]
    with np.errstate(over="ignore", under="ignore"):
        beyond = [abs(float(np.float32(x) * np.float32(scale))) > limit or not math.isfinite(y) for x, y in finite]
    kept = [(x, y) for x, y in finite if math.isfinite(y)]
    signal, noise = math.fsum(x * x for x, _ in kept), math.fsum((x - y) ** 2 for x, y in kept)
    sqnr = math.nan if signal == 0 else math.inf if noise == 0 else 10 * (math.log10(signal) - math.log10(noise))
    return {
        "count": len(pairs),
        "amax": max((abs(x) for x, _ in finite), default=0.0),
        "nan": sum(math.isnan(x) for x, _ in pairs),
        "inf": sum(math.isinf(x) for x, _ in pairs),
        "zeros": len(finite) - len(nonzero),
        "underflow": fraction(sum(y == 0 for _, y in nonzero), len(nonzero)),
        "overflow": fraction(sum(beyond), len(finite)),
        "sqnr_db": sqnr,
        "exponents": tuple((place, places.count(place)) for place in sorted(set(places))),
    }


def check(got: TensorStatistics, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        found = getattr(got, name)
        if name == "sqnr_db":
            assert same(found, value) or found == pytest.approx(value, rel=1e-12, abs=1e-9), name
        else:
            assert found == value, name


@given(tensors, st.sampled_from([1.0, 3.0, 2.0**100, 1e-30]))
def test_a_cast_that_ml_dtypes_made_is_measured_as_defined(before: npt.NDArray[np.float32], scale: float) -> None:
    with np.errstate(all="ignore"):
        scaled = before * np.float32(scale)
        after = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / np.float32(scale)
    got = measure(before, after, E4M3FN, scale)
    check(got, spelled_out(before, after, 464.0, scale))
    assert (got.format, got.scale) == ("float8_e4m3fn", float(np.float32(scale)))


@given(st.lists(st.tuples(floats, floats), max_size=40))
def test_any_two_tensors_are_measured_as_defined(pairs: list[tuple[float, float]]) -> None:
    both = np.array(pairs, np.float32).reshape(-1, 2)
    before, after = both[:, 0], both[:, 1]
    check(measure(before, after, E5M2, 0.25), spelled_out(before, after, 61440.0, 0.25))


@pytest.mark.parametrize("size", [1, 32767, 32768, 32769, 70001])
@pytest.mark.parametrize("special", [False, True])
def test_a_tensor_of_many_chunks_is_the_sum_of_them(size: int, special: bool) -> None:
    random = np.random.default_rng(size)
    before = (random.standard_normal(size) * np.exp2(random.integers(-30, 12, size))).astype(np.float32)
    if special:
        before[random.integers(0, size, 40)] = np.array(
            [np.nan, np.inf, -np.inf, 0, -0.0, 1e-40, 2e38, -448], "f4"
        ).repeat(5)
    after = octavo.quantize(before, E4M3FN, scale=0.5, overflow=Overflow.NONE)
    check(measure(before, after, E4M3FN, 0.5), spelled_out(before, after, 464.0, 0.5))


@pytest.mark.parametrize(("format", "limit"), LIMITS, ids=lambda value: getattr(value, "name", None))
def test_overflow_is_what_rounds_beyond_the_largest_value(format: Format, limit: float) -> None:
    middle = np.float32(limit)
    edge = np.array([format.max, np.nextafter(middle, np.float32(0)), middle, -middle], np.float32)
    beyond = np.array([np.nextafter(middle, np.float32(np.inf)), -FLOAT32_MAX], np.float32)
    for scale in (1.0, 2.0**3):
        x = np.concatenate([edge, beyond]) / np.float32(scale)
        expected = np.count_nonzero(np.abs(x.astype(np.float64) * scale) > limit)
        assert measure(x, np.clip(x, -1, 1), format, scale).overflow == expected / x.size


@pytest.mark.parametrize("format", [format for format in FORMATS.values() if format.signed], ids=lambda row: row.name)
def test_the_amax_of_current_scaling_never_counts_as_overflow(format: Format) -> None:
    amaxes = np.random.default_rng(5).uniform(1, 2, 200).astype(np.float32)
    for amax in amaxes:
        x = np.array([amax, 0.1], np.float32)
        scale = float(np.float32(format.max) / amax)
        assert measure(x, octavo.quantize(x, format, scale=scale), format, scale).overflow == 0


def test_what_becomes_inf_or_nan_overflows_whatever_the_scale_says() -> None:
    before = np.array([1, 2, 3, 4, np.nan, np.inf], np.float32)
    after = np.array([np.nan, np.inf, 3, 4, np.nan, np.inf], np.float32)
    assert measure(before, after, E4M3FN).overflow == 0.5
    assert measure(before, after, E4M3FN).sqnr_db == math.inf


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)])
def test_nothing_has_no_statistics(shape: tuple[int, ...]) -> None:
    got = measure(np.empty(shape, np.float32), np.empty(shape, np.float32), E4M3FN)
    assert (got.count, got.amax, got.nan, got.inf, got.zeros, got.underflow, got.overflow) == (0, 0, 0, 0, 0, 0, 0)
    assert math.isnan(got.sqnr_db)
    assert got.exponents == ()


def test_zeros_neither_underflow_nor_have_a_ratio() -> None:
    zeros = np.array([0.0, -0.0, 0.0], np.float32)
    got = measure(zeros, zeros, E4M3FN)
    assert (got.count, got.zeros, got.underflow, got.overflow, got.amax, got.exponents) == (3, 3, 0, 0, 0, ())
    assert math.isnan(got.sqnr_db)


def test_only_nan_and_inf_leave_nothing_to_measure() -> None:
    x = np.array([np.nan, np.inf, -np.inf, -np.nan], np.float32)
    got = measure(x, x, E5M2)
    assert (got.nan, got.inf, got.zeros, got.amax, got.underflow, got.overflow) == (2, 2, 0, 0, 0, 0)
    assert math.isnan(got.sqnr_db)
    assert got.exponents == ()


def test_the_ends_of_float32_have_their_exponents() -> None:
    powers = np.ldexp(1.0, np.arange(-149, 128)).astype(np.float32)
    assert measure(powers, powers, TF32).exponents == tuple((exponent, 1) for exponent in range(-149, 128))
    below = np.nextafter(powers[1:], np.float32(0))
    assert measure(below, below, TF32).exponents == tuple((exponent, 1) for exponent in range(-149, 127))
    top = np.array([FLOAT32_MAX, -FLOAT32_MAX], np.float32)
    got = measure(top, -top, E5M2)
    assert (got.amax, got.exponents, got.overflow) == (FLOAT32_MAX, ((127, 2),), 1.0)
    assert got.sqnr_db == pytest.approx(10 * math.log10(0.25))


def test_any_strides_and_ranks_measure_alike() -> None:
    x = np.random.default_rng(2).standard_normal((6, 8)).astype(np.float32)
    y = octavo.quantize(x, E2M1FN)
    expected = measure(x.ravel(), y.ravel(), E2M1FN)
    assert measure(x, y, E2M1FN) == expected
    assert measure(x.reshape(2, 3, 8), y.reshape(2, 3, 8), E2M1FN) == expected
    part = measure(x[::-2, ::3], y[::-2, ::3], E2M1FN)
    check(part, spelled_out(x[::-2, ::3], y[::-2, ::3], 7.0, 1.0))
    assert measure(x[0, 0, ...], y[0, 0, ...], E2M1FN).count == 1
    x.flags.writeable = y.flags.writeable = False
    assert measure(x, y, E2M1FN) == expected


def test_a_scale_for_each_row_or_block_decides_overflow_element_by_element() -> None:
    x = np.array([[1, 100, np.nan, 8], [1, 100, 8, 0]], np.float32)
    y = np.zeros_like(x)
    rows = np.array([[1.0], [6.0]])
    got = measure(x, y, E4M3FN, rows)
    assert (got.overflow, got.scale) == (1 / 7, None)
    blocks = rows.repeat(4, 1)
    blocks[0, 3] = 60
    assert measure(x, y, E4M3FN, blocks.astype(np.float32)).overflow == 2 / 7
    blocks[1] = np.nan
    assert measure(x, y, E4M3FN, blocks).overflow == 1 / 7


def test_an_array_of_one_scale_is_that_scale() -> None:
    x = np.array([1, 100, 8], np.float32)
    assert measure(x, x, E4M3FN, np.array([[6.0]])) == measure(x, x, E4M3FN, 6.0)
    block_with_nan = measure(np.array([1, np.nan], np.float32), np.full(2, np.nan, np.float32), E4M3FN, [np.nan])
    assert (block_with_nan.overflow, block_with_nan.scale) == (1.0, None)


def test_without_a_scale_overflow_is_not_known() -> None:
    x = np.array([1, 1000, 0], np.float32)
    got = measure(x, np.array([1, 448, 0], np.float32), E4M3FN, None)
    assert math.isnan(got.overflow)
    assert (got.scale, got.amax, got.zeros, got.underflow) == (None, 1000.0, 1, 0.0)


@pytest.mark.parametrize("other", [np.float64, np.float16, np.int32, ml_dtypes.bfloat16])
def test_other_dtypes_are_refused(other: Any) -> None:
    x = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=rf"float32 arrays; before is {np.dtype(other)}: convert it first$"):
        measure(x.astype(other), x, E4M3FN)
    with pytest.raises(ValueError, match=rf"float32 arrays; after is {np.dtype(other)}: convert it first$"):
        measure(x, x.astype(other), E4M3FN)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keeps its shape; got \(3,\) before and \(1, 3\) after"):
        measure(np.ones(3, np.float32), np.ones((1, 3), np.float32), E4M3FN)
    with pytest.raises(ValueError, match=r"broadcast to the tensor's shape \(3,\); got \(2,\): repeat"):
        measure(np.ones(3, np.float32), np.ones(3, np.float32), E4M3FN, [1.0, 2.0])


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, 1e39, 1e-60])
def test_a_scale_is_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match=r"^a scale is positive and finite in float32; got "):
        measure(np.ones(3, np.float32), np.ones(3, np.float32), E4M3FN, scale)


def test_importing_diagnose_loads_no_framework_and_no_plotting() -> None:
    modules = "dumps, page, records, statistics"
    program = f"import sys; from octavo.diagnose import {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "jax", "numba", "matplotlib", "tensorboard", "jinja2"} & set(loaded.stdout.split())
