"""Quantised tensors of every library: equal to the reference bit for bit, and cut, transposed and decoded by what it holds."""

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

import octavo
from octavo import QTensor, TensorSpec, Transform, reference
from octavo.formats import E2M1FN, E3M2FN, E4M3FN, E5M2
from octavo.qtensor import check, pack, unpack
from octavo.recipes import NAMED
from octavo.rounding import Rounding
from octavo.scaling import Block, BlockScale, Current, Delayed, Row, TwoLevel, Unscaled

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SEED, OFFSET, DELAYED_SCALE = 0xFEED_0123_4567_89AB, 1001, 6.5
HAS_XLA = importlib.util.find_spec("octavo.kernels.xla_matrices") is not None
NEEDS_XLA = pytest.mark.skipif(not HAS_XLA, reason="octavo.kernels.xla_matrices, the JAX casts, is not there")
every_library = pytest.mark.parametrize("library", ["numpy", "torch", pytest.param("jax", marks=NEEDS_XLA)])
CELLS = sorted(
    {spec for make in NAMED.values() for *_, spec in make().cells() if spec and spec.format.bits <= 8}, key=str
)
MORE = [
    TensorSpec(E4M3FN, Block(shape=(4, 8), scale=BlockScale.FLOAT32)),
    TensorSpec(E5M2, Block(shape=(3, 5), scale=BlockScale.EVEN)),
    TensorSpec(E4M3FN, Row()),
    TensorSpec(E2M1FN, Current()),
    TensorSpec(E4M3FN, Block(shape=(2, 24)), transform=Transform.HADAMARD),
    TensorSpec(E2M1FN, Unscaled(), transform=Transform.HADAMARD),
]
SHAPES = [
    (),
    (1,),
    (37,),
    (0,),
    (3, 0),
    (0, 5),
    (5, 33),
    (130, 257),
    (3, 4, 17),
    (2, 0, 3),
    (2, 3, 5, 19),
    (2, 1, 3, 2, 7),
]


def in_libraries(names: str, cases: list[Any], in_jax: list[Any]) -> pytest.MarkDecorator:
    """All cases in NumPy and torch; in JAX, which compiles for each spec and shape, those that tell its arrays apart."""
    several = "," in names
    params = [(*case, library) if several else (case, library) for case in cases for library in ("numpy", "torch")]
    lean = [pytest.param(*(case if several else (case,)), "jax", marks=NEEDS_XLA) for case in in_jax]
    return pytest.mark.parametrize(f"{names},library", [*params, *lean], ids=str)


def made(shape: tuple[int, ...], dtype: Any = np.float32) -> npt.NDArray[Any]:
    """Numbers of many sizes, some of them zeros of either sign, the same for the same shape."""
    rng = np.random.default_rng(len(shape) + sum(shape))
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-9, 9, shape))
    return np.asarray(np.where(rng.random(shape) < 0.1, np.copysign(0.0, x), x), np.float32).astype(dtype)


def to_library(x: npt.NDArray[Any], library: str) -> Any:
    """The same numbers as an array of the library; its own memory."""
    match library:
        case "torch" if x.dtype == BFLOAT16:
            return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
        case "torch":
            return torch.from_numpy(x.copy())
        case "jax":
            return importlib.import_module("jax.numpy").asarray(x)
    return x.copy()


def to_numpy(x: Any) -> npt.NDArray[Any]:
    if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view(BFLOAT16)
    return np.asarray(x)


def matrix(x: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """The operand matrix, one index at a time: the contracted elements of x in rows."""
    if x.ndim < 2:
        return np.array([list(x.reshape(-1))], x.dtype).reshape(1, x.size)
    leading = list(itertools.product(*map(range, x.shape[:-1])))
    rows = np.empty((len(leading), x.shape[-1]), x.dtype)
    for row, index in enumerate(leading):
        rows[row] = x[index]
    return np.ascontiguousarray(rows.T) if axis == 0 else rows


def scale_of(spec: TensorSpec) -> float:
    return DELAYED_SCALE if isinstance(spec.scaling, Delayed) else 1.0


def cast(x: Any, spec: TensorSpec, axis: int = -1) -> QTensor:
    return QTensor.encode(x, spec, axis=axis, seed=SEED, offset=OFFSET, scale=scale_of(spec))


def assert_same(got: Any, expected: npt.NDArray[Any]) -> None:
    """Of one dtype and shape and the same bits, NaNs being one."""
    values = to_numpy(got)
    assert (values.dtype, values.shape) == (expected.dtype, expected.shape)
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[values.dtype.itemsize]
    same = values.reshape(-1).view(bits) == expected.reshape(-1).view(bits)
    if values.dtype != np.uint8:
        same |= (np.isnan(values) & np.isnan(expected)).reshape(-1)
    assert same.all()


def assert_is_the_reference(q: QTensor, x: npt.NDArray[Any], axis: int = -1) -> None:
    """Codes, scales, amax and values are those of the definition."""
    operand = matrix(x, axis)
    expected = reference.encode_matrix(operand, q.spec, scale=scale_of(q.spec), seed=SEED, offset=OFFSET)
    assert_same(q.unpacked_codes(), expected.codes)
    assert_same(q.scales, expected.scales)
    if isinstance(q.spec.scaling, TwoLevel):
        assert_same(q.amax, np.asarray(expected.amax))
    else:
        assert q.amax is None
    if q.spec.transform is Transform.HADAMARD:
        return
    values = reference.decode_matrix(expected, q.spec)
    if axis == 0 and x.ndim > 1:
        values = np.ascontiguousarray(values.T)
    with np.errstate(over="ignore"):
        assert_same(q.decode(), values.reshape(x.shape).astype(x.dtype))


@in_libraries("spec", [*CELLS, *MORE], [*CELLS, *MORE])
def test_every_spec_is_cast_and_decoded_as_the_reference_says(spec: TensorSpec, library: str) -> None:
    for shape in [(45, 45)] if library == "jax" else [(45, 45), (67, 130), (3, 11, 70)]:
        for axis in (-1, 0):
            x = made(shape)
            assert_is_the_reference(cast(to_library(x, library), spec, axis), x, axis)


SOME = [
    TensorSpec(E4M3FN, Block(shape=(1, 32), scale=BlockScale.RCEIL)),
    TensorSpec(E2M1FN, TwoLevel(shape=(16, 16)), Rounding.STOCHASTIC),
    TensorSpec(E2M1FN, TwoLevel(), transform=Transform.HADAMARD),
    TensorSpec(E4M3FN, Row()),
    TensorSpec(E5M2, Current()),
    TensorSpec(E2M1FN, Unscaled()),
]


@in_libraries(
    "shape, spec", list(itertools.product(SHAPES, SOME)), [(shape, SOME[2]) for shape in [(), (7,), (0, 5), (3, 4, 17)]]
)
def test_any_shape_is_cast_and_comes_back_in_it(shape: tuple[int, ...], spec: TensorSpec, library: str) -> None:
    x = made(shape)
    source = to_library(x, library)
    for axis in (-1, 0):
        q = cast(source, spec, axis)
        assert (q.shape, q.axis, q.library, q.spec) == (shape, axis, library, spec)
        assert_is_the_reference(q, x, axis)
        values = q.decode()
        assert type(values) is type(source)
        assert (tuple(values.shape), values.dtype) == (shape, q.dtype)


@in_libraries(
    "dtype, spec",
    list(itertools.product([np.dtype(np.float16), BFLOAT16, np.dtype(np.float64)], SOME)),
    [(np.dtype(np.float16), SOME[0]), (BFLOAT16, SOME[0]), (BFLOAT16, SOME[2])],
)
def test_each_float_is_rounded_once_and_comes_back(dtype: np.dtype, spec: TensorSpec, library: str) -> None:
    x = made((19, 37), dtype)
    q = cast(to_library(x, library), spec)
    assert str(q.dtype).endswith(dtype.name)
    assert_is_the_reference(q, x)


def test_what_a_dtype_cannot_hold_decodes_to_inf() -> None:
    q = QTensor.encode(np.array([1.0, 60000.0], np.float16), TensorSpec(E5M2, Delayed()), scale=0.5)
    grown = replace(q, scales=q.scales * np.float32(4))
    assert grown.decode().tolist() == [4.0, math.inf]
    assert replace(grown, dtype=np.dtype(np.float32)).decode().tolist() == [4.0, 229376.0]


@pytest.mark.parametrize("spec", SOME, ids=str)
def test_views_are_cast_as_their_elements_are(spec: TensorSpec) -> None:
    whole = made((4, 40, 66))
    for view in (whole[::2, ::-3, 1::2], whole.transpose(2, 0, 1), np.asfortranarray(whole), whole[:, 3, :]):
        assert_is_the_reference(cast(view, spec), np.ascontiguousarray(view))
        assert_is_the_reference(cast(view, spec, 0), np.ascontiguousarray(view), 0)
    x = torch.from_numpy(whole)
    for view in (
        x[::2, ::3, 1::2],
        x.permute(2, 0, 1),
        x[:, 3].expand(3, 4, 66),
        torch.imag(torch.complex(x, x).conj()),
    ):
        assert_is_the_reference(cast(view, spec), np.ascontiguousarray(view.resolve_neg().numpy()))
        assert_is_the_reference(cast(view, spec, 0), np.ascontiguousarray(view.resolve_neg().numpy()), 0)


def test_gradients_are_left_behind() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    q = QTensor.encode(weight, TensorSpec(E4M3FN, Current()))
    assert not q.decode().requires_grad


@in_libraries("columns", [0, 1, 2, 7, 16, 33], [0, 7])
def test_four_bit_codes_are_packed_even_index_low(columns: int, library: str) -> None:
    codes = np.arange(3 * columns, dtype=np.uint8).reshape(3, columns) * 7 % 16
    packed = to_numpy(pack(to_library(codes, library)))
    assert packed.shape == (3, -(-columns // 2))
    for row, column in itertools.product(range(3), range(packed.shape[1])):
        low, high = packed[row, column] & 15, packed[row, column] >> 4
        assert low == codes[row, 2 * column]
        assert high == (codes[row, 2 * column + 1] if 2 * column + 1 < columns else 0)
    assert_same(unpack(to_library(packed, library), columns), codes)


def test_packed_codes_are_those_of_torch() -> None:
    values = np.array([[0.5, -6.0, 1.0, 4.0, -0.0]], np.float32)
    q = QTensor.encode(torch.from_numpy(values), TensorSpec(E2M1FN))
    assert q.codes.tolist() == [[0xF1, 0x62, 0x08]]
    assert q.codes.view(torch.float4_e2m1fn_x2).shape == (1, 3)


NBYTES = [
    (TensorSpec(E4M3FN, Current()), 5 * 33 + 4),
    (TensorSpec(E4M3FN, Row()), 5 * 33 + 5 * 4),
    (TensorSpec(E4M3FN, Block(shape=(1, 32), scale=BlockScale.RCEIL)), 5 * 33 + 5 * 2),
    (TensorSpec(E3M2FN, Block(shape=(2, 8))), 5 * 33 + 3 * 5 * 4),
    (TensorSpec(E2M1FN, Block(shape=(1, 32), scale=BlockScale.RCEIL)), 5 * 17 + 5 * 2),
    (TensorSpec(E2M1FN, TwoLevel()), 5 * 17 + 5 * 3 + 4),
    (TensorSpec(E2M1FN, TwoLevel(), transform=Transform.HADAMARD), 5 * 24 + 5 * 3 + 4),
]


@in_libraries("spec, nbytes", NBYTES, NBYTES[-1:])
def test_nbytes_counts_what_is_held(spec: TensorSpec, nbytes: int, library: str) -> None:
    q = QTensor.encode(to_library(made((5, 33)), library), spec)
    assert q.nbytes == nbytes
    assert q.codes.nbytes + q.scales.nbytes + (q.amax.nbytes if q.amax is not None else 0) == nbytes


HADAMARD_16 = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)], np.float64)
TURN = np.diag(np.array(reference.SIGNS, np.float64)) @ HADAMARD_16 / 4


@in_libraries("shape", [(4, 16), (3, 50), (2, 3, 5)], [(20, 20)])
def test_decoding_undoes_a_hadamard_transform(shape: tuple[int, ...], library: str) -> None:
    assert np.array_equal(TURN @ TURN.T, np.eye(16))
    spec = TensorSpec(E2M1FN, Unscaled(), transform=Transform.HADAMARD)  # small halves, whose sums float32 holds
    x = made(shape)
    for axis in (-1, 0):
        q = QTensor.encode(to_library(x, library), spec, axis=axis)
        rows, columns = matrix(x, axis).shape
        turned = E2M1FN.values[to_numpy(q.unpacked_codes())].astype(np.float64).reshape(rows, -1, 16)
        values = (turned @ TURN.T).reshape(rows, -1)[:, :columns].astype(np.float32)
        expected = np.ascontiguousarray(values.T if axis == 0 else values).reshape(x.shape)
        assert np.array_equal(to_numpy(q.decode()), expected)


@every_library
def test_a_hadamard_transform_comes_back_close_to_what_it_was(library: str) -> None:
    x = np.random.default_rng(3).standard_normal((8, 40)).astype(np.float32)
    spec = TensorSpec(E4M3FN, Block(shape=(1, 16), scale=BlockScale.RCEIL), transform=Transform.HADAMARD)
    values = to_numpy(QTensor.encode(to_library(x, library), spec).decode())
    assert np.linalg.norm(values - x) < 0.04 * np.linalg.norm(x)  # E4M3 alone: 2**-4 at most, 0.026 on average


@in_libraries("spec", [*CELLS, *MORE], SOME[2:3])
def test_a_transpose_is_the_same_codes_along_the_other_axis(spec: TensorSpec, library: str) -> None:
    x = made((37, 50))
    for axis in (-1, 0):
        q = cast(to_library(x, library), spec, axis)
        t = q.T
        assert t.codes is q.codes
        assert t.scales is q.scales
        assert (t.shape, t.axis) == ((50, 37), -1 - axis)
        assert_same(t.decode(), np.ascontiguousarray(to_numpy(q.decode()).T))
        assert_same(t.unpacked_codes(), to_numpy(cast(to_library(x.T, library), spec, -1 - axis).unpacked_codes()))
        assert (t.T.shape, t.T.axis) == (q.shape, q.axis)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)], ids=str)
def test_a_transpose_is_of_two_axes(shape: tuple[int, ...]) -> None:
    q = QTensor.encode(made(shape), TensorSpec(E4M3FN))
    with pytest.raises(ValueError, match=r"a transpose is of two axes; got the shape \("):
        q.transposed()


BLOCKS = TensorSpec(E4M3FN, Block(shape=(4, 8)))
FOURS = TensorSpec(E2M1FN, TwoLevel(shape=(1, 5)))
TURNED = TensorSpec(E2M1FN, TwoLevel(shape=(2, 8)), transform=Transform.HADAMARD)
LEGAL = [
    (BLOCKS, -1, (10, 21), np.s_[4:8]),
    (BLOCKS, -1, (10, 21), np.s_[8:]),
    (BLOCKS, -1, (10, 21), np.s_[:, 8:16]),
    (BLOCKS, -1, (10, 21), np.s_[-6:, 16:]),
    (BLOCKS, 0, (21, 10), np.s_[8:16, 4:8]),
    (BLOCKS, 0, (21, 10), np.s_[..., 8:10]),
    (BLOCKS, -1, (3, 8, 21), np.s_[1:3]),
    (BLOCKS, -1, (3, 8, 21), np.s_[1:, 4:8, 8:]),
    (BLOCKS, -1, (6, 2, 9), np.s_[2:4]),
    (BLOCKS, -1, (1, 6, 9), np.s_[:, 4:]),
    (BLOCKS, -1, (3, 5, 9), np.s_[:, 0:5, 8:]),
    (BLOCKS, 0, (3, 8, 9), np.s_[1:2, :, 4:]),
    (BLOCKS, -1, (10, 21), np.s_[4:4]),
    (BLOCKS, -1, (10, 21), np.s_[:, 16:8]),
    (BLOCKS, -1, (40,), np.s_[8:24]),
    (BLOCKS, -1, (), np.s_[...]),
    (FOURS, -1, (6, 33), np.s_[1:4, 5:20]),
    (FOURS, -1, (6, 33), np.s_[:, 30:]),
    (FOURS, -1, (2, 3, 33), np.s_[:, 1:2, 5:]),
    (FOURS, 0, (33, 6), np.s_[5:25, 1:]),
    (TURNED, -1, (6, 50), np.s_[2:, 16:32]),
    (TURNED, -1, (6, 50), np.s_[:, 32:]),
    (TensorSpec(E4M3FN, Current()), -1, (6, 33), np.s_[1:3, 5:6]),
    (TensorSpec(E2M1FN, Delayed()), 0, (6, 33), np.s_[1:4, 5:6]),
    (TensorSpec(E4M3FN, Row()), -1, (6, 33), np.s_[1:3, 5:6]),
    (TensorSpec(E4M3FN, Row()), 0, (2, 3, 33), np.s_[:, 2:, 5:6]),
]


@in_libraries("spec, axis, shape, index", LEGAL, [LEGAL[i] for i in (3, 7, 17)])
def test_a_slice_decodes_to_the_slice(
    spec: TensorSpec, axis: int, shape: tuple[int, ...], index: Any, library: str
) -> None:
    x = made(shape)
    q = cast(to_library(x, library), spec, axis)
    part = q[index]
    assert_same(part.decode(), to_numpy(q.decode())[index].copy())
    assert (part.axis, part.spec, part.library) == (q.axis, q.spec, library)
    if isinstance(spec.scaling, Block):  # whose scales know nothing of one another
        alone = cast(to_library(np.ascontiguousarray(x[index]), library), spec, axis)
        assert_same(part.codes, to_numpy(alone.codes))
        assert_same(part.scales, to_numpy(alone.scales))


def test_slices_that_lie_side_by_side_are_views() -> None:
    q = QTensor.encode(made((16, 32)), BLOCKS)
    assert np.shares_memory(q[4:12, 8:].codes, q.codes)


@pytest.mark.parametrize(
    ("spec", "axis", "shape", "index", "message"),
    [
        (BLOCKS, -1, (10, 21), np.s_[5:8], "axis 0 is cut at 5, .*4x8.* 4 along it.*; cut at 4 or 8,"),
        (BLOCKS, -1, (10, 21), np.s_[4:9], "axis 0 is cut at 9, .*; cut at 8 or 10,"),
        (BLOCKS, -1, (10, 21), np.s_[:, 3:], "axis 1 is cut at 3, .*4x8.* 8 along it.*; cut at 0 or 8,"),
        (BLOCKS, 0, (21, 10), np.s_[:, 3:], "axis 1 is cut at 3, .*4x8.* 4 along it.*; cut at 0 or 4,"),
        (BLOCKS, 0, (21, 10), np.s_[3:], "axis 0 is cut at 3, .*; cut at 0 or 8,"),
        (BLOCKS, -1, (6, 2, 9), np.s_[1:4], "axis 0 is cut at 1, .*; cut at 0 or 2,"),
        (BLOCKS, -1, (3, 5, 9), np.s_[:, :4], "axis 1 is cut at 4, .*; cut at 0 or 5,"),
        (FOURS, -1, (6, 33), np.s_[:, 4:], "axis 1 is cut at 4, .*; cut at 0 or 5,"),
        (TURNED, -1, (6, 50), np.s_[:, 8:], "axis 1 is cut at 8, .*hadamard.* 16 along it.*; cut at 0 or 16,"),
        (BLOCKS, -1, (10, 21), 4, "slices of step 1; axis 0 got 4"),
        (BLOCKS, -1, (10, 21), np.s_[::2], "slices of step 1; axis 0 got slice"),
        (BLOCKS, -1, (10, 21), np.s_[:, :, :], "2 axes take as many slices; got 3"),
        (BLOCKS, -1, (), np.s_[:1], "0 axes take as many slices; got 1"),
    ],
)
def test_a_cut_through_a_block_is_an_error_that_names_where_to_cut(
    spec: TensorSpec, axis: int, shape: tuple[int, ...], index: Any, message: str
) -> None:
    q = cast(made(shape), spec, axis)
    with pytest.raises(ValueError, match=message) as error:
        q[index]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block", [(1, 5), (2, 3), (4, 8)])
@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7), (3, 2, 2, 6), (1, 7, 9)])
def test_every_cut_is_the_slice_or_an_error_with_bounds_that_work(
    shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    spec = TensorSpec(E2M1FN, Block(shape=block))
    for axis in (-1, 0):
        q = cast(made(shape), spec, axis)
        values = q.decode()
        for cut_axis, size in enumerate(shape):
            before = (slice(None),) * cut_axis
            for start in range(size + 1):
                try:
                    assert_same(q[(*before, slice(start, None))].decode(), values[(*before, slice(start, None))].copy())
                except ValueError as error:
                    low, high = str(error).split("cut at ")[2].removesuffix(", or decode() first").split(" or ")
                    assert int(low) < start < int(high)
                    for bound in (int(low), int(high)):
                        assert_same(q[(*before, slice(bound))].decode(), values[(*before, slice(bound))].copy())


def test_equality_is_identity() -> None:
    q, again = (QTensor.encode(made((3, 3)), TensorSpec(E4M3FN)) for _ in range(2))
    assert q == q
    assert q != again
    assert len({q, again}) == 2
    with pytest.raises(AttributeError):
        q.axis = 0  # type: ignore[misc]
    with pytest.raises(TypeError, match="no elements to go through"):
        iter(q)


def test_repr_is_one_line() -> None:
    q = QTensor.encode(torch.zeros(3, 40, dtype=torch.bfloat16), TensorSpec(E2M1FN, TwoLevel()), axis=0)
    assert repr(q) == "QTensor([3, 40] bfloat16 as e2m1fn 1x16 two-level, axis 0, torch, 124 bytes)"


SPEC = TensorSpec(E4M3FN, Current())
SQUARE = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QTensor.encode(np.ones(3, np.int64), SPEC), "made of float32, .*; got int64: convert it"),
        (lambda: QTensor.encode(torch.ones(3, dtype=torch.int8), SPEC), "got torch.int8: convert it"),
        (lambda: QTensor.encode(np.ones(3, bool), SPEC), "got bool: convert it"),
        (lambda: QTensor.encode(np.ones(3, np.complex64), SPEC), "got complex64: convert it"),
        (lambda: QTensor.encode([1.0, 2.0], SPEC), "numpy, torch, jax; got list: wrap it in numpy.asarray"),
        (lambda: QTensor.encode(torch.ones(3, device="meta"), SPEC), "tensors on cpu and cuda; got one on meta"),
        (lambda: QTensor.encode(SQUARE, SPEC, axis=1), "axis is -1, the last, or 0, .*; got 1: move"),
        (lambda: QTensor.encode(SQUARE, E4M3FN), r"a spec is an octavo.TensorSpec; got Format\(.*: write TensorSpec"),
        (lambda: QTensor.encode(SQUARE, replace(SPEC, rounding=Rounding.STOCHASTIC)), "none was given; pass seed=0"),
        (lambda: QTensor.encode(SQUARE, SPEC, seed=-1), "seed is an integer from 0 to 18446744073709551615; got -1"),
        (lambda: QTensor.encode(SQUARE, SPEC, offset=2**63 - 4), "offset is an integer from 0 to 9223372036854775803;"),
        (lambda: QTensor.encode(SQUARE, SPEC, scale=2.0), "where scaling is delayed; got 2.0 under e4m3fn current"),
        (
            lambda: QTensor.encode(SQUARE, TensorSpec(E4M3FN, Delayed()), scale=1e-50),
            "positive and finite .*; got 1e-50",
        ),
        (
            lambda: QTensor.encode(SQUARE, TensorSpec(E4M3FN, Block(shape=(1, 4), padding=False))),
            r"blocks of \(1, 4\) do not divide .*padding=True",
        ),
    ],
)
def test_an_error_says_what_was_wanted_what_came_and_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@in_libraries(
    "scaling", [Unscaled(), Current(), Block(shape=(1, 4), scale=BlockScale.RCEIL), TwoLevel()], [Current(), TwoLevel()]
)
def test_nan_is_an_error_in_a_format_without_it_and_kept_elsewhere(scaling: Any, library: str) -> None:
    x = np.array([[1.0, math.nan, 2.0]], np.float32)
    with pytest.raises(ValueError, match="float4_e2m1fn has no NaN, but the input holds one; replace it first"):
        QTensor.encode(to_library(x, library), TensorSpec(E2M1FN, scaling))
    values = to_numpy(QTensor.encode(to_library(x, library), TensorSpec(E4M3FN, scaling)).decode())
    assert np.isnan(values[0, 1])


def test_delayed_scaling_starts_at_one() -> None:
    q = QTensor.encode(np.array([3.3], np.float32), TensorSpec(E4M3FN, Delayed()))
    assert (q.decode().tolist(), q.scales.tolist()) == ([3.25], [[1.0]])


VALID = QTensor.encode(made((6, 20)), TensorSpec(E2M1FN, TwoLevel()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"codes": VALID.codes[:, :9]},
            r"codes of this shape, .*: uint8 \[6, 10\]; got uint8 \[6, 9\]: let QTensor.encode",
        ),
        ({"codes": VALID.codes.astype(np.int32)}, r"uint8 \[6, 10\]; got int32 \[6, 10\]"),
        ({"scales": VALID.scales.T}, r"scales of .*: uint8 \[6, 2\]; got uint8 \[2, 6\]"),
        ({"scales": VALID.scales.astype(np.float32)}, r"scales of .*: uint8 \[6, 2\]; got float32 \[6, 2\]"),
        ({"amax": None}, "holds an amax where scales are two-level, and only there; got None"),
        ({"amax": np.zeros(1, np.float32)}, r"amax of .*: float32 \[\]; got float32 \[1\]"),
        ({"amax": 3.0}, r"amax of .*: float32 \[\]; got float \[\]"),
        ({"amax": torch.tensor(3.0)}, "of one library; got numpy, numpy, torch and"),
        ({"shape": (20, 6)}, r"codes of .*: uint8 \[20, 3\]; got"),
        ({"axis": 2}, "the contracted axis is -1"),
        ({"spec": E2M1FN}, "a spec is an octavo.TensorSpec"),
        (
            {"spec": TensorSpec(E2M1FN, Block(shape=(1, 16), scale=BlockScale.RCEIL))},
            "an amax where .*; got [0-9.]+ under",
        ),
        ({"dtype": np.dtype(np.int8)}, "decodes to float32, .*; got int8"),
        ({"dtype": torch.float32}, "of one library; got numpy, numpy, numpy and torch.float32: convert it"),
        ({"scales": torch.from_numpy(VALID.scales)}, "of one library; got numpy, torch, numpy and"),
    ],
)
def test_a_broken_invariant_is_an_error(changes: dict[str, Any], message: str) -> None:
    check(VALID)
    with pytest.raises(ValueError, match=message) as error:
        replace(VALID, **changes)
    assert "\n" not in str(error.value)


def test_the_package_lends_its_names() -> None:
    assert octavo.QTensor is QTensor
