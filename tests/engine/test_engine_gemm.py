"""Matrix products on the CPU: the documented order of sums to the bit, float64 within its bound, in every layout and on any threads."""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo import engine
from octavo.engine.kernels.gemm import DEPTH, TALL, product
from octavo.engine.kernels.tile import COLUMNS, ROWS

Matrix = npt.NDArray[np.float32]
F32 = np.float32


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Tests set PyTorch's number of threads, which is also the engine's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> Matrix:
    return np.random.Generator(np.random.Philox((seed, *shape))).normal(0, 1, shape).astype(F32)


def fused(a: Any, b: Any, c: Any) -> Matrix:
    """a * b + c of float32 numbers, rounded once: the float64 sum is rounded to odd, which the second rounding cannot tell from exact."""
    p, c = np.float64(a) * np.float64(b), np.float64(c)  # the product is exact
    total = np.asarray(p + c)
    part = total - p
    rest = (p - (total - part)) + (c - part)
    bits = total.view(np.int64)
    step = np.where((rest > 0) == (total > 0), 1, -1)
    odd = np.where((rest != 0) & (bits & 1 == 0), bits + step, bits).view(np.float64)
    return odd.astype(F32)


def rounded(x: Fraction) -> float:
    """The float32 nearest to x, ties to even, of a number that is in the normal range."""
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x))) - 23
    exponent += (abs(x) >= Fraction(2) ** (exponent + 24)) - (abs(x) < Fraction(2) ** (exponent + 23))
    return float(round(x / Fraction(2) ** exponent) * Fraction(2) ** exponent)


SHORT = st.floats(2.0**-10, 2.0**10, width=32) | st.sampled_from([1 + 2.0**-23, 1 - 2.0**-24, 4097.0, 2.0**-7])


@given(SHORT, SHORT, SHORT, st.integers(-60, 30), st.booleans(), st.booleans())
def test_the_model_of_a_fused_sum_is_exact(
    a: float, b: float, c: float, shift: int, minus: bool, cancels: bool
) -> None:
    c = float(F32(a * b)) if cancels else math.ldexp(c, shift)
    c = -c if minus else c
    assert float(fused(F32(a), F32(b), F32(c))) == rounded(Fraction(a) * Fraction(b) + Fraction(c))


def model(
    a: Matrix,
    b: Matrix,
    *,
    alpha: float = 1.0,
    onto: Matrix | None = None,
    bias: Matrix | None = None,
    relu: bool = False,
    mask: Matrix | None = None,
) -> Matrix:
    """What the module's docstring promises, rounding by rounding."""
    (rows, depth), columns = a.shape, b.shape[1]
    pieces = max(1, -(-depth // 400))
    factor, at_once = F32(alpha), onto is not None or pieces == 1
    out = np.zeros((rows, columns), F32) if onto is None else onto.copy()
    for i in range(pieces):
        piece = np.zeros((rows, columns), F32)
        for k in range(depth * i // pieces, depth * (i + 1) // pieces):
            piece = fused(a[:, k, None], b[None, k], piece)
        piece = piece * factor if at_once else piece
        out = piece if i == 0 and onto is None else out + piece
    if not at_once and factor != 1:
        out = out * factor
    if bias is not None:
        out = out + bias
    if relu:
        out = np.where(out < 0, F32(0), out)
    if mask is not None:
        out = np.where(mask > 0, out, F32(0))
    return out


def assert_same_bits(found: Any, expected: Matrix) -> None:
    np.testing.assert_array_equal(
        np.ascontiguousarray(found).view(np.int32), np.ascontiguousarray(expected).view(np.int32)
    )


def run(a: Matrix, b: Matrix, **what: Any) -> Matrix:
    """`product` into a matrix amid others, which must stay as they are."""
    onto = what.pop("onto", None)
    around = np.full((a.shape[0] + 2, b.shape[1] + 5), F32(-7))
    inside = around[1:-1, 2 : 2 + b.shape[1]]
    if onto is not None:
        inside[...] = onto
    given = {key: engine.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in what.items()}
    product(engine.from_numpy(a), engine.from_numpy(b), engine.from_numpy(inside), add=onto is not None, **given)
    found = inside.copy()
    inside[...] = -7
    assert (around == -7).all()
    return found


SIZES = [
    (1, 1, 1),
    (1, 1, 0),
    (3, 5, 0),
    (1, COLUMNS, 9),
    (ROWS, COLUMNS, 17),
    (ROWS + 1, COLUMNS + 1, 31),
    (3 * ROWS - 1, 2 * COLUMNS - 1, DEPTH),
    (5, 7, DEPTH + 1),
    (2, 33, 3 * DEPTH + 1),
    (TALL + 15, 37, 29),
    (19, 5 * COLUMNS + 3, 2 * DEPTH - 1),
    (70, 65, 64),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_are_fused_along_k_in_pieces(size: tuple[int, int, int]) -> None:
    m, n, k = size
    a, b = draw(m, k), draw(k, n)
    assert_same_bits(run(a, b), model(a, b))
    assert_same_bits(engine.matmul(engine.from_numpy(a), engine.from_numpy(b)).numpy(), model(a, b))
    assert_same_bits(run(a.T.copy().T, b.T.copy().T, alpha=-0.3), model(a, b, alpha=-0.3))


EPILOGUES = [
    ("bias",),
    ("relu",),
    ("mask",),
    ("bias", "relu"),
    ("alpha", "bias"),
    ("onto",),
    ("alpha", "onto"),
    ("alpha", "onto", "bias", "relu", "mask"),
]


@pytest.mark.parametrize("parts", EPILOGUES, ids="-".join)
@pytest.mark.parametrize("size", [(ROWS + 3, COLUMNS + 7, 21), (9, 2 * COLUMNS, 2 * DEPTH + 5)], ids=str)
def test_what_follows_a_product_comes_in_its_order(parts: tuple[str, ...], size: tuple[int, int, int]) -> None:
    m, n, k = size
    a, b = draw(m, k), draw(k, n)
    values = {
        "alpha": 1 / 3,
        "bias": draw(n, seed=1),
        "relu": True,
        "mask": draw(m, n, seed=2),
        "onto": draw(m, n, seed=3),
    }
    what = {part: values[part] for part in parts}
    assert_same_bits(run(a, b, **what), model(a, b, **what))


def test_scales_divide_the_product() -> None:
    a, b, bias = draw(9, 30), draw(30, 11), draw(11)
    scales = engine.from_numpy(np.array([3.0, 0.7], F32))
    alpha = 0.5 * np.float64(F32(1) / F32(3.0)) * np.float64(F32(1) / F32(0.7))
    found = run(a, b, alpha=0.5, bias=bias, scales=(scales.address, scales.address + 4))
    assert_same_bits(found, model(a, b, alpha=float(alpha), bias=bias))
    assert_same_bits(run(a, b, scales=(0, scales.address)), model(a, b, alpha=float(F32(1) / F32(3.0))))


def laid_out(x: Matrix, layout: str) -> Matrix:
    """The same numbers, with NaN between and around them."""
    rows, columns = x.shape
    match layout:
        case "rows":
            out = np.full((rows + 2, columns + 3), F32("nan"))[1:-1, 1:-2]
        case "columns":
            out = np.full((columns + 2, rows + 3), F32("nan"))[1:-1, 1:-2].T
        case "far rows":
            out = np.full((rows, columns + 160), F32("nan"))[:, 5 : 5 + columns]
        case "far columns":
            out = np.full((columns, rows + 160), F32("nan"))[:, 5 : 5 + rows].T
        case "every second":
            out = np.full((3 * rows, 2 * columns), F32("nan"))[1::3, 1::2]
        case _:
            out = np.full((rows + 1, columns + 1), F32("nan"))[:0:-1, :0:-1]
    out[...] = x
    return out


@pytest.mark.parametrize("left", ["rows", "columns", "far rows", "far columns", "every second", "reversed"])
@pytest.mark.parametrize("right", ["rows", "columns", "far rows", "far columns", "every second", "reversed"])
def test_every_layout_gives_the_same_bits(left: str, right: str) -> None:
    for m, n, k in ((1, 1, 3), (2 * ROWS + 1, COLUMNS + 5, 37), (5 * ROWS, 5 * COLUMNS + 1, DEPTH + 9)):
        a, b = draw(m, k), draw(k, n)
        expected = run(a, b)
        assert_same_bits(run(laid_out(a, left), laid_out(b, right)), expected)
        assert_same_bits(
            engine.masked_matmul(
                engine.from_numpy(laid_out(a, left)),
                engine.from_numpy(laid_out(b, right)),
                engine.from_numpy(laid_out(np.ones((m, n), F32), left)),
            ).numpy(),
            expected,
        )


def test_one_row_may_stand_for_all() -> None:
    row, b = draw(1, 50), draw(50, 40)
    a = np.lib.stride_tricks.as_strided(row, (9, 50), (0, 4))
    assert_same_bits(run(a, b), np.repeat(run(row, b), 9, axis=0))
    assert_same_bits(run(b.T, a.T), run(b.T, np.ascontiguousarray(a.T)))


@pytest.mark.parametrize("seed", range(12))
def test_it_is_as_near_to_float64_as_the_sums_are_long(seed: int) -> None:
    sizes = np.random.Generator(np.random.Philox(seed)).integers(1, [400, 400, 1500])
    m, n, k = (int(size) for size in sizes)
    a, b, bias, onto = draw(m, k, seed=seed), draw(k, n, seed=seed), draw(n), draw(m, n)
    exact = 0.7 * (a.astype(np.float64) @ b) + onto + bias
    scale = 0.7 * (np.abs(a).astype(np.float64) @ np.abs(b)) + np.abs(onto) + np.abs(bias)
    found = run(a, b, alpha=float(F32(0.7)), bias=bias, onto=onto)
    bound = (DEPTH + -(-k // DEPTH) + 4) * 2.0**-24
    assert (np.abs(found - (exact + (float(F32(0.7)) - 0.7) * (a.astype(np.float64) @ b))) <= bound * scale).all()


@pytest.mark.parametrize("size", [(512, 65, 33), (20, 700, 401), (129, 130, 131), (64, 64, 64), (3, 2, 60000)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(size: tuple[int, int, int]) -> None:
    m, n, k = size
    a, b, bias, mask, onto = draw(m, k), draw(k, n), draw(n), draw(m, n), draw(m, n, seed=1)
    found = []
    for lanes in (1, 2, 3):
        torch.set_num_threads(lanes)
        plain = run(a, b, bias=bias, relu=True, mask=mask)
        found.append((plain, run(a, b, onto=onto, alpha=0.1), run(b.T, a.T)))
    for one, other in itertools.pairwise(found):
        for before, after in zip(one, other, strict=True):
            assert_same_bits(before, after)
    assert_same_bits(found[0][2], run(a, b).T)


def test_nan_and_inf_stay_in_their_rows_and_columns() -> None:
    m, n, k = ROWS + 2, COLUMNS + 3, DEPTH + 30
    a, b = np.abs(draw(m, k)) + 1, np.abs(draw(k, n)) + 1
    a[1, 7], a[3, 420], b[11, 5], b[DEPTH, n - 1], a[5, 30] = np.nan, np.inf, np.nan, -np.inf, np.inf
    b[30, 8] = 0
    found = run(a, b)
    with np.errstate(invalid="ignore"):
        expected = a.astype(np.float64) @ b.astype(np.float64)
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(found), kind(expected))
    assert np.isnan(found).any()
    assert np.isposinf(found).any()
    assert np.isneginf(found).any()
    rectified = run(a, b, relu=True, bias=np.zeros(n, F32))
    np.testing.assert_array_equal(np.isnan(rectified), np.isnan(expected))
    np.testing.assert_array_equal(rectified[np.isneginf(expected)], 0)
    mask = np.where(np.arange(n) % 2, F32(1), F32("nan")) * np.ones((m, 1), F32)
    hidden = run(a, b, mask=mask)
    assert not hidden[:, ::2].any()
    np.testing.assert_array_equal(np.isnan(hidden[:, 1::2]), np.isnan(expected[:, 1::2]))


def test_overflow_is_infinite_and_subnormal_numbers_stay() -> None:
    big = np.full((3, 40), F32(1e38))
    assert np.isposinf(run(big, np.ones((40, 2), F32))).all()
    tiny = np.full((3, 4), F32(2.0**-140))
    assert (run(tiny, np.ones((4, 2), F32)) == 2.0**-138).all()


def test_add_matmul_adds_in_place() -> None:
    a, b, c = draw(10, 20), draw(20, 12), draw(10, 12)
    expected = model(a, b, alpha=-0.25, onto=c)
    target = engine.from_numpy(c.copy())
    assert engine.add_matmul_(target, engine.from_numpy(a), engine.from_numpy(b), -0.25) is None
    assert_same_bits(target.numpy(), expected)
    assert target.version == 1
    wide = engine.from_numpy(np.zeros((10, 24), F32))
    every = wide[:, ::2]  # rows with gaps run in NumPy
    engine.add_matmul_(every, engine.from_numpy(a), engine.from_numpy(b))
    np.testing.assert_allclose(every.numpy(), a.astype(np.float64) @ b, rtol=0, atol=2e-5)
    assert not wide.numpy()[:, 1::2].any()


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32, np.float16], ids=lambda x: np.dtype(x).name)
def test_other_dtypes_multiply_as_in_numpy(dtype: Any) -> None:
    a, b = (10 * draw(4, 7)).astype(dtype), (10 * draw(7, 3)).astype(dtype)
    found = engine.matmul(engine.from_numpy(a), engine.from_numpy(b))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.numpy(), a @ b)
    mixed = engine.matmul(engine.from_numpy(a), engine.from_numpy(draw(7, 3)))
    assert mixed.dtype == np.result_type(dtype, np.float32)
    np.testing.assert_array_equal(mixed.numpy(), a @ draw(7, 3))


def test_leading_dimensions_broadcast() -> None:
    a, b = draw(2, 1, 4, 7), draw(3, 7, 5)
    found = engine.from_numpy(a) @ engine.from_numpy(b)
    assert found.shape == (2, 3, 4, 5)
    np.testing.assert_allclose(found.numpy(), a.astype(np.float64) @ b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.bool_], ids=lambda x: np.dtype(x).name)
def test_a_mask_of_any_dtype_keeps_what_is_positive(dtype: Any) -> None:
    a, b, mask = draw(5, 6), draw(6, 7), draw(5, 7).round().clip(-1, 1)
    found = engine.masked_matmul(engine.from_numpy(a), engine.from_numpy(b), engine.from_numpy(mask.astype(dtype)))
    kept = mask != 0 if dtype is np.bool_ else mask > 0
    np.testing.assert_allclose(found.numpy(), np.where(kept, a.astype(np.float64) @ b, 0), rtol=0, atol=1e-5)
