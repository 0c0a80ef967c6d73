"""The CPU's casts of matrices against the reference: every scaling, format and mode, bit for bit."""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

import octavo
from octavo import reference
from octavo.formats import E2M1FN, E4M3FN, FORMATS, Format
from octavo.kernels import matrices
from octavo.kernels.arrays import library_of
from octavo.kernels.unpack import unpack
from octavo.recipes import NAMED, TensorSpec
from octavo.rounding import Overflow, Rounding
from octavo.scaling import Block, BlockScale, Current, Row, TwoLevel

SIGNED = [format for format in FORMATS.values() if format.signed]
NAMED_SPECS = {spec for make in NAMED.values() for *_, spec in make().cells() if spec and spec.format.bits <= 8}
SHAPES = [(1, 1), (3, 5), (37, 75), (64, 128), (5, 300), (0, 7), (4, 0), (130, 33), (2, 9000)]
MODES = list(itertools.product(Rounding, Overflow))


def specs() -> Iterator[TensorSpec]:
    """Every named cell; every format under every scaling; every mode of some."""
    yield from NAMED_SPECS
    for format in SIGNED:
        for scale, shape in itertools.product(BlockScale, [(1, 32), (16, 16), (1, 7), (5, 3)]):
            yield TensorSpec(format, Block(shape=shape, scale=scale))
        yield TensorSpec(format, TwoLevel())
        yield TensorSpec(format, Current(power_of_two=True))
        for rounding, overflow in MODES:
            yield TensorSpec(format, Block(shape=(1, 32), scale=BlockScale.RCEIL), rounding, overflow)
            yield TensorSpec(format, Row(), rounding, overflow)


SPECS = sorted(set(specs()), key=str)
by_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def same(found: Any, x: npt.NDArray[Any], spec: TensorSpec, values: Any) -> None:
    """Whether codes, scales, amax and values are the reference's."""
    want = reference.encode_matrix(x, spec, seed=3, offset=5)
    np.testing.assert_array_equal(np.asarray(found.codes), want.codes)
    np.testing.assert_array_equal(np.asarray(found.scales), want.scales)
    assert np.asarray(found.scales).dtype == want.scales.dtype
    np.testing.assert_array_equal(found.amax, want.amax)
    decoded, values = reference.decode_matrix(want, spec), np.asarray(values)
    np.testing.assert_array_equal(values, decoded)
    np.testing.assert_array_equal(np.signbit(values)[~np.isnan(decoded)], np.signbit(decoded)[~np.isnan(decoded)])


@by_spec
def test_matrices_are_cast_as_the_reference_says(spec: TensorSpec) -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        for spread in (0, 120):
            x = (rng.standard_normal(shape) * np.exp2(rng.integers(-spread, spread + 1, shape))).astype(np.float32)
            same(
                matrices.encode_matrix(x, spec, seed=3, offset=5),
                x,
                spec,
                matrices.quantize_matrix(x, spec, seed=3, offset=5),
            )


@pytest.mark.parametrize("skip_nan", [False, True])
@pytest.mark.parametrize("scale", BlockScale)
def test_nan_inf_zero_and_subnormal_blocks(scale: BlockScale, skip_nan: bool) -> None:
    spec = TensorSpec(E4M3FN, Block(shape=(1, 4), scale=scale, skip_nan=skip_nan))
    rows = [
        [np.nan, 3, -1, 0],
        [np.inf, 1, -2, 1e-40],
        [-np.inf, np.nan, 1, 1],
        [0, -0.0, 0, 0],
        [1e-45, 1e-40, -1e-39, 0],
        [3.4e38, -3e38, 1, 0],
        [2.0**-126, 2.0**-127, -(2.0**-149), 1e-38],
        [np.nan, np.nan, np.nan, np.nan],
    ]
    x = np.array(rows, np.float32)
    same(matrices.encode_matrix(x, spec), x, spec, matrices.quantize_matrix(x, spec))


@pytest.mark.parametrize("spec", sorted(NAMED_SPECS, key=str), ids=str)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64], ids=["bf16", "fp16", "fp64"])
def test_other_dtypes_are_rounded_once(spec: TensorSpec, dtype: Any) -> None:
    x = np.random.default_rng(1).standard_normal((33, 70)).astype(dtype)
    same(
        matrices.encode_matrix(x, spec, seed=3, offset=5), x, spec, matrices.quantize_matrix(x, spec, seed=3, offset=5)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_the_definition_casts_may_be_a_tensor_of_any_kind(dtype: torch.dtype) -> None:
    spec = TensorSpec(E2M1FN, Block(shape=(1, 32), scale=BlockScale.RCEIL, skip_nan=True))
    x = torch.randn(3, 70).to(dtype)
    same(matrices.encode_matrix(x, spec), x.float().numpy(), spec, matrices.quantize_matrix(x, spec))


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], ids=hex)
def test_a_nan_of_any_bits_leaves_nan_where_its_scale_is_every_block_s(payload: int) -> None:
    x = np.ones((1, 32), np.float32)
    x.view(np.uint32)[0, 3] = payload
    into, scales, library = torch.empty(1, 32, dtype=torch.bfloat16), np.empty((1, 2), np.uint8), library_of(x)
    target = library_of(into).buffer(into)
    matrices.cast_blocks(
        library.buffer(x), target, scales.ctypes.data, (1, 32), TensorSpec(E4M3FN, TwoLevel()), decoded=2
    )
    assert into.isnan().all()


@pytest.mark.parametrize("spec", sorted(NAMED_SPECS, key=str), ids=str)
def test_threads_and_strides_change_no_bit(spec: TensorSpec) -> None:
    wide = torch.randn(700, 300)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        view = wide[::2, ::3]
        found = matrices.encode_matrix(view, spec, seed=3, offset=5)
        results.append((found.codes.clone(), found.scales.clone()))
        turned = matrices.encode_matrix(wide.t(), spec, seed=3, offset=5)
        same(turned, wide.t().numpy(), spec, matrices.quantize_matrix(wide.t(), spec, seed=3, offset=5))
    torch.set_num_threads(before)
    for codes, scales in results[1:]:
        assert codes.equal(results[0][0])
        assert scales.equal(results[0][1])


@pytest.mark.parametrize(
    "spec",
    [spec for spec in SPECS if isinstance(spec.scaling, (Block, Row)) and spec.rounding is Rounding.NEAREST_EVEN],
    ids=str,
)
def test_blocks_that_stand_on_end_are_those_of_the_transpose(spec: TensorSpec) -> None:
    x = np.random.default_rng(2).standard_normal((75, 90)).astype(np.float32)
    want = reference.encode_matrix(np.ascontiguousarray(x.T), spec)
    codes, scales = np.empty(x.shape, np.uint8), np.empty(want.scales.T.shape, want.scales.dtype)
    library = library_of(x)
    matrices.cast_blocks(library.buffer(x), library.buffer(codes), scales.ctypes.data, (75, 90), spec, upright=True)
    np.testing.assert_array_equal(codes, want.codes.T)
    np.testing.assert_array_equal(scales, want.scales.T)


@pytest.mark.parametrize("format", SIGNED, ids=lambda format: format.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_turn_back_into_operands(format: Format, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    for shape, block in [((64, 96), (1, 32)), ((33, 75), (16, 7)), ((300, 41), (300, 1)), ((90, 100), (90, 100))]:
        codes = rng.integers(0, 1 << format.bits, shape).astype(np.uint8)
        grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        back = np.exp2(rng.integers(-90, 90, grid)).astype(np.float32)
        found = torch.empty(shape, dtype=dtype)
        unpack(codes.ctypes.data, library_of(found).buffer(found), back, shape, block, format)
        spread = back.repeat(block[0], 0)[: shape[0]].repeat(block[1], 1)[:, : shape[1]]
        want = torch.from_numpy(reference.decode(codes, format) * spread).to(dtype)
        torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
        assert found.signbit()[~want.isnan()].equal(want.signbit()[~want.isnan()])


def test_what_cannot_be_cast_is_named() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        matrices.encode_matrix(np.ones((2, 33), np.float32), TensorSpec(E4M3FN, Block(shape=(1, 32), padding=False)))
    with pytest.raises(ValueError, match="has no NaN"):
        matrices.encode_matrix(np.full((1, 16), np.nan, np.float32), TensorSpec(E2M1FN, TwoLevel()))
    with pytest.raises(ValueError, match="draws from a seed"):
        matrices.encode_matrix(np.ones((1, 16), np.float32), TensorSpec(E4M3FN, Row(), Rounding.STOCHASTIC))
    with pytest.raises(ValueError, match="codes have at most 8 bits"):
        octavo.encode(np.ones(3, np.float32), octavo.formats.BFLOAT16)


def test_arrays_above_two_gigabytes_are_cast_to_their_end() -> None:
    size = (1 << 30) + 48  # elements of bfloat16, so bytes above 2**31
    x = torch.zeros(size, dtype=torch.bfloat16)
    x[-48:] = torch.linspace(-500, 500, 48, dtype=torch.bfloat16)
    codes = octavo.encode(x, E4M3FN)
    assert codes[-48:].equal(octavo.encode(x[-48:].clone(), E4M3FN))
    assert not codes[:4096].any()
    del codes
    mx = TensorSpec(E4M3FN, Block(shape=(1, 16), scale=BlockScale.RCEIL))
    found = matrices.encode_matrix(x.reshape(-1, 16), mx)
    tail = matrices.encode_matrix(x[-48:].reshape(-1, 16).clone(), mx)
    assert found.codes[-3:].equal(tail.codes)
    assert found.scales[-3:].equal(tail.scales)
