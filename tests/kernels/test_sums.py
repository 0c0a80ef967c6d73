"""Sums as Hopper's tensor cores add them, against the same in fractions; and what float32 sums may be off by, against integers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.formats import E3M4FN, E4M3FN, E5M2, FORMATS, Format
from octavo.kernels import sums, threads
from octavo.table import Accumulator
from octavo.torch import gemm

Matrix = npt.NDArray[np.float32]

FAST, SPLIT = Accumulator.HOPPER_FAST, Accumulator.HOPPER_SPLIT
SIGNED = [format for format in FORMATS.values() if format.signed]
PAIRS = list(itertools.combinations_with_replacement(SIGNED, 2))
every_pair = pytest.mark.parametrize(("left", "right"), PAIRS, ids=lambda format: format.name)
both = pytest.mark.parametrize("accumulator", [FAST, SPLIT], ids=lambda accumulator: accumulator.value)


def exponent(x: Fraction) -> int:
    """floor(log2 |x|) of a fraction of two powers, or of an integer and one."""
    return abs(x.numerator).bit_length() - x.denominator.bit_length()


def cut(x: Fraction, unit: Fraction) -> Fraction:
    return int(x / unit) * unit  # int cuts toward zero


def step(register: float, products: list[float]) -> float:
    """The register after one step; a Python float holds any product of two float32 of 24 bits, and any register."""
    terms = [register, *products]
    special = [term for term in terms if not math.isfinite(term)]
    if special:
        return sum(special)
    exact = [Fraction(term) for term in terms]
    e = max([exponent(term) for term in exact if term] + [-126])
    total = sum((cut(term, Fraction(2) ** (e - 13)) for term in exact), Fraction(0))
    if total == 0:
        return 0.0
    total = cut(total, Fraction(2) ** (exponent(total) - 13))
    return float(total) if abs(total) < 2**128 else math.copysign(math.inf, total)


def dot(a: list[float], b: list[float], accumulator: Accumulator) -> np.float32:
    """The definition, one result."""
    products = [x * y for x, y in zip(a, b, strict=True)]
    size = 128 if accumulator is SPLIT else max(len(products), 1)
    total = np.float32(0)
    for start in range(0, len(products), size):
        register, part = 0.0, products[start : start + size]
        for first in range(0, len(part), 32):
            register = step(register, part[first : first + 32])
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.float32(total + np.float32(register))
    return total


def expected(a: Matrix, b: Matrix, accumulator: Accumulator) -> Matrix:
    rows = [[dot(x.tolist(), y.tolist(), accumulator) for y in b] for x in a]
    return np.array(rows, np.float32).reshape(len(a), len(b))


def assert_same(actual: Matrix, wanted: Matrix) -> None:
    """Equal bits, signs of zeros among them, all NaNs being one."""
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(np.where(nan, 0, actual.view(np.uint32)), np.where(nan, 0, wanted.view(np.uint32)))


def finite(format: Format, shape: tuple[int, int], rng: np.random.Generator) -> Matrix:
    """Any finite values of the format."""
    values = format.values[np.isfinite(format.values)]
    return np.asarray(rng.choice(values, shape), np.float32)


def normal(format: Format, shape: tuple[int, int], rng: np.random.Generator) -> Matrix:
    """Normally distributed values, as the format holds them: to its nearest."""
    values = np.sort(format.values[np.isfinite(format.values)])
    middles = (values[1:] + values[:-1]) / 2
    return values[np.searchsorted(middles, rng.standard_normal(shape))]


@both
@every_pair
def test_every_pair_of_formats_adds_up_as_defined(left: Format, right: Format, accumulator: Accumulator) -> None:
    rng = np.random.default_rng(SIGNED.index(left) * 16 + SIGNED.index(right))
    for draw, k in ((finite, 33), (finite, 161), (normal, 300)):
        a, b = draw(left, (2, k), rng), draw(right, (3, k), rng)
        assert_same(sums.matmul(a, b, accumulator), expected(a, b, accumulator))


@both
@pytest.mark.parametrize("k", [0, 1, 7, 31, 32, 64, 127, 128, 129, 256, 400])
@pytest.mark.parametrize(("m", "n"), [(0, 3), (3, 0), (1, 1), (17, 2), (2, 65)])
def test_any_shape(m: int, n: int, k: int, accumulator: Accumulator) -> None:
    rng = np.random.default_rng(k)
    a, b = normal(E4M3FN, (m, k), rng), normal(E5M2, (n, k), rng)
    actual = sums.matmul(a, b, accumulator)
    assert (actual.shape, actual.dtype, actual.flags.c_contiguous) == ((m, n), np.float32, True)
    some = np.s_[:3], np.s_[-3:]
    assert_same(np.ascontiguousarray(actual[some]), np.ascontiguousarray(expected(a[some[0]], b[some[1]], accumulator)))


@both
@given(data=st.data())
def test_any_operands_of_twelve_bits(accumulator: Accumulator, data: Any) -> None:
    """Subnormals and the largest values too, whose sums leave float32's range at both ends, and NaN and Inf now and then."""
    low = data.draw(st.sampled_from([0, 0, 1, 20, 40, 60, 64, 90, 120, 180, 185, 190]), "lowest exponent field")
    span = data.draw(st.sampled_from([1, 4, 12, 40]), "exponents")
    k, seed = data.draw(st.integers(1, 170), "k"), data.draw(st.integers(0, 2**32), "seed")
    specials = data.draw(st.sampled_from([0.0, 0.0, 0.01]), "share of NaN, Inf and zeros")
    rng = np.random.default_rng(seed)

    def operand(rows: int) -> Matrix:
        fields = rng.integers(low, low + span, (rows, k)) << 23
        bits = fields | rng.integers(0, 1 << 11, (rows, k)) << 12 | rng.integers(0, 2, (rows, k)) << 31
        x = bits.astype(np.uint32).view(np.float32)
        chosen = rng.choice(np.array([np.nan, np.inf, -np.inf, 0, -0.0], np.float32), (rows, k))
        return np.where(rng.random((rows, k)) < specials, chosen, x)

    a, b = operand(2), operand(3)
    with np.errstate(invalid="ignore"):
        assert_same(sums.matmul(a, b, accumulator), expected(a, b, accumulator))


@both
def test_nan_and_inf_propagate_along_their_row_and_column_alone(accumulator: Accumulator) -> None:
    rng = np.random.default_rng(5)
    a, b = normal(E5M2, (20, 200), rng), np.maximum(np.abs(normal(E5M2, (70, 200), rng)), np.float32(0.5))
    clean = sums.matmul(a, b, accumulator)
    a[3, 190], a[4, 0], a[5, 64], a[6, :2], b[66, 17] = np.nan, np.inf, -np.inf, (np.inf, -np.inf), np.nan
    actual = sums.matmul(a, b, accumulator)
    others = np.setdiff1d(np.arange(70), 66)
    assert np.isnan(actual[3]).all()
    assert np.isnan(actual[:, 66]).all()
    assert (actual[4, others] == np.inf).all()
    assert (actual[5, others] == -np.inf).all()
    assert np.isnan(actual[6]).all()
    clean[3:7] = actual[3:7]
    assert_same(actual[:, others].copy(), clean[:, others].copy())


def test_ones_stop_counting_at_two_to_the_fourteenth() -> None:
    """From 2**14 on the unit is 2, and each 1 is cut off; 128 at a time they are all counted."""
    ones = np.ones((1, 32768), np.float32)
    assert sums.matmul(ones, ones, FAST).item() == 16384
    assert sums.matmul(ones, ones, SPLIT).item() == 32768


def test_terms_are_cut_toward_zero_below_thirteen_bits_under_the_largest() -> None:
    a = np.zeros((6, 33), np.float32)
    a[0, :2] = 1, 2**-13  # the last bit that counts
    a[1, :2] = 1, 1.875 * 2**-14  # gone
    a[2, :3] = 1, 1.875 * 2**-14, 1.875 * 2**-14  # gone one by one, though they are 1.875 * 2**-13 together
    a[3, :2] = -1, 1.875 * 2**-14  # -1: a term, not the sum, is cut
    a[4, :3] = 1, 1, 2**-13  # the sum is 2 + 2**-13, a bit too long
    a[5, 0], a[5, 32] = 1, 1.875 * 2**-14  # the register aligns as a product does
    ones = np.ones((1, 33), np.float32)
    assert sums.matmul(a, ones, FAST).ravel().tolist() == [1 + 2**-13, 1, 1, -1, 2, 1]


@both
def test_order_within_a_step_and_sign_do_not_matter(accumulator: Accumulator) -> None:
    rng = np.random.default_rng(6)
    a, b = finite(E4M3FN, (9, 256), rng), finite(E4M3FN, (70, 256), rng)
    wanted = sums.matmul(a, b, accumulator)
    order = rng.permuted(np.arange(256).reshape(8, 32), axis=1).ravel()
    assert_same(sums.matmul(a[:, order], b[:, order], accumulator), wanted)
    np.testing.assert_array_equal(sums.matmul(-a, b, accumulator), -wanted)
    assert_same(sums.matmul(b, a, accumulator), np.ascontiguousarray(wanted.T))


@both
def test_threads_do_not_matter(accumulator: Accumulator, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    a, b = normal(E4M3FN, (99, 300), rng), normal(E4M3FN, (130, 300), rng)
    results = []
    for count in (1, 2, 5):
        monkeypatch.setattr(threads, "count", lambda count=count: count)
        results.append(sums.matmul(a, b, accumulator))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@both
def test_strides_do_not_matter(accumulator: Accumulator) -> None:
    rng = np.random.default_rng(8)
    a, b = normal(E4M3FN, (200, 10), rng), normal(E4M3FN, (12, 400), rng)
    wanted = sums.matmul(np.ascontiguousarray(a.T), np.ascontiguousarray(b[:, ::2]), accumulator)
    assert_same(sums.matmul(a.T, b[:, ::2], accumulator), wanted)


def test_errors_at_4096_elements_are_those_reported_of_hopper() -> None:
    """Per cents in the tensor core alone (arXiv 2412.19437 says nearly 2 of normal data; of one sign it is worse), hardly any split."""
    rng = np.random.default_rng(9)
    a, b = np.abs(normal(E4M3FN, (64, 4096), rng)), np.abs(normal(E4M3FN, (64, 4096), rng))
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    fast, split = (np.abs(sums.matmul(a, b, way) - exact) / exact for way in (FAST, SPLIT))
    assert 0.06 < fast.max() < 0.09
    assert 0.0005 < split.max() < 0.001


def exact_values(format: Format) -> npt.NDArray[np.float64]:
    """What each code is worth, by ml_dtypes; of E3M4FN, which it lacks, by us."""
    if format is E3M4FN:
        return format.values.astype(np.float64)
    return np.arange(1 << format.bits, dtype=np.uint8).view(getattr(ml_dtypes, format.name)).astype(np.float64)


@every_pair
def test_every_product_of_every_pair_is_exact(left: Format, right: Format) -> None:
    """An outer product is a GEMM with one element along the contracted axis; at most 10 bits of 14 are used."""
    with np.errstate(invalid="ignore"):
        exact = np.outer(exact_values(left), exact_values(right))
    a, b = left.values.reshape(-1, 1).copy(), right.values.reshape(-1, 1).copy()
    for accumulator in (FAST, SPLIT):
        np.testing.assert_array_equal(sums.matmul(a, b, accumulator), exact)
    held = gemm.operand_dtype()
    by_library = gemm.matmul(torch.from_numpy(a).to(held), torch.from_numpy(b).to(held), b_transposed=True)
    np.testing.assert_array_equal(by_library.numpy(), exact)


@pytest.mark.parametrize("k", [1, 100, 128, 1000, 4096])
@pytest.mark.parametrize(
    ("left", "right", "bits"), [(E4M3FN, E4M3FN, 18), (E4M3FN, E5M2, 25), (E5M2, E5M2, 32)], ids=str
)
@pytest.mark.parametrize("draw", [finite, normal], ids=["any", "normal"])
def test_no_order_of_sums_leaves_its_bound(left: Format, right: Format, bits: int, k: int, draw: Any) -> None:
    """Against the sum in fixed point, in units of 2**-bits, which has no order."""
    rng = np.random.default_rng(k)
    a, b = draw(left, (4, k), rng), draw(right, (5, k), rng)
    unit = 2.0**-bits
    in_units = [
        (x / x_format.smallest_subnormal).astype(np.int64).astype(object) for x, x_format in ((a, left), (b, right))
    ]
    assert left.smallest_subnormal * right.smallest_subnormal == unit
    exact, size = in_units[0] @ in_units[1].T, abs(in_units[0]) @ abs(in_units[1]).T

    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    if left is right is E4M3FN:  # 36 bits of a product and 12 of the sum
        np.testing.assert_array_equal(a64 @ b64.T, (exact * unit).astype(np.float64))
    for i, j in np.ndindex(4, 5):
        assert math.fsum(a64[i] * b64[j]) == float(Fraction(exact[i, j]) * Fraction(unit))

    held = gemm.operand_dtype()
    by_library = gemm.matmul(torch.from_numpy(a).to(held), torch.from_numpy(b).to(held), b_transposed=True).numpy()
    # A step cuts 33 terms and their sum, each by less than 2**-13 of what was added up so far.
    steps, parts = -(-k // 32), -(-k // 128)
    bounds = (
        (by_library, Fraction(k, 2**24)),
        (sums.matmul(a, b, FAST), Fraction(34 * steps, 2**13)),
        (sums.matmul(a, b, SPLIT), Fraction(34 * min(steps, 4), 2**13) + Fraction(parts, 2**24)),
    )
    for result, bound in bounds:
        for i, j in np.ndindex(4, 5):
            error = abs(Fraction(float(result[i, j])) / Fraction(unit) - exact[i, j])
            assert error <= bound * size[i, j]


@pytest.mark.parametrize("accumulator", [Accumulator.FLOAT32, Accumulator.BFLOAT16_OUT])
def test_the_other_accumulators_are_turned_away(accumulator: Accumulator) -> None:
    x = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match=f"hopper-fast or hopper-split; {accumulator.value} is a library's GEMM"):
        sums.matmul(x, x, accumulator)


def test_operands_that_it_cannot_multiply_exactly_are_turned_away() -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"a is a float32 matrix, .* got float64 of shape \(2, 3\)"):
        sums.matmul(x.astype(np.float64), x, FAST)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"b is a float32 matrix, .* got float32 of shape \(3,\)"):
        sums.matmul(x, x[0], FAST)
    with pytest.raises(ValueError, match="last axes, which differ: 3 and 2"):
        sums.matmul(x, x[:, :2], FAST)
    with pytest.raises(ValueError, match="b holds values of more than 12 significant bits"):
        sums.matmul(x, x * np.float32(0.1), FAST)
    x[0, 0] = np.uint32(0x7FC00001).view(np.float32)  # a NaN is a NaN
    assert np.isnan(sums.matmul(x, x, FAST)[0]).all()
