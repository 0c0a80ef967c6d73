"""The GPU's casts of operand matrices, each beside `octavo.reference`: scales, codes, amax and what they decode to."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from beside_reference import BFLOAT16, DEVICE, INTERPRETED, MARKS, assert_same, on_device

from octavo import reference
from octavo.formats import E2M1FN, E2M3FN, E4M3FN, E5M2, E8M0FNU
from octavo.kernels import cuda
from octavo.recipes import NAMED
from octavo.rounding import Rounding
from octavo.scaling import Block, BlockScale, Current, Delayed, Row, Scaling, TwoLevel, Unscaled
from octavo.table import TensorSpec

pytestmark = MARKS
SPECS = {str(spec): spec for recipe in NAMED.values() for *_, spec in recipe().cells() if spec is not None}
"""Every spec of every named recipe."""
SHAPES = (
    [(7, 301), (130, 36), (1, 1), (0, 5), (3, 0)] if INTERPRETED else [(37, 301), (1030, 2100), (1, 1), (0, 5), (3, 0)]
)


def matrix(shape: tuple[int, int], seed: int = 0) -> npt.NDArray[np.float32]:
    """Normal numbers with a magnitude to each row and each few columns, some rows of zeros and of subnormals."""
    generator = np.random.default_rng(seed)
    rows, columns = 2.0 ** generator.integers(-20, 20, (shape[0], 1)), 2.0 ** generator.integers(-3, 3, (1, shape[1]))
    x = (generator.standard_normal(shape) * rows * columns).astype(np.float32)
    x[2:3] = 0
    x[5:6, :70] = 0
    x[6:7] *= np.float32(1e-44) / np.abs(x[6:7]).max(initial=1e-30)
    return x


def check(x: npt.NDArray[Any], spec: TensorSpec, tensor: torch.Tensor | None = None, **arguments: Any) -> None:
    """Cast `x` both ways, or `tensor`, which holds the same, and compare everything."""
    ours = cuda.encode_matrix(on_device(x) if tensor is None else tensor, spec, **arguments)
    theirs = reference.encode_matrix(x, spec, **arguments)
    assert_same(ours.scales, theirs.scales, f"scales of {spec}")
    assert_same(ours.codes, theirs.codes, f"codes of {spec}")
    assert_same(ours.amax, theirs.amax, f"amax of {spec}")
    assert_same(cuda.decode_matrix(ours, spec), reference.decode_matrix(theirs, spec), f"values of {spec}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=str)
def test_every_spec_of_every_recipe(spec: TensorSpec, shape: tuple[int, int]) -> None:
    check(matrix(shape), spec, scale=1.7, seed=5)


@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("columns", [64, 66])
@pytest.mark.parametrize(
    "scaling", [Block(shape=(1, 32)), Block(shape=(1, 6)), Block(shape=(3, 2)), Row(), TwoLevel()], ids=str
)
def test_random_bits_go_by_the_place_in_the_matrix(scaling: Scaling, columns: int, offset: int) -> None:
    check(matrix((5, columns)), TensorSpec(E4M3FN, scaling, Rounding.STOCHASTIC), seed=2**63, offset=offset)


SCALINGS = [
    *(Block(shape=(1, 32), scale=scale, skip_nan=skip) for scale in BlockScale for skip in (False, True)),
    Block(shape=(1, 32), scale=BlockScale.FLOAT32, epsilon=1e-3),
    Block(shape=(16, 16), scale=BlockScale.CEIL),
    Row(epsilon=1e-3),
    Row(power_of_two=True),
    TwoLevel(),
    Current(),
    Unscaled(),
]


@pytest.mark.parametrize("format", [E4M3FN, E5M2, E2M1FN], ids=lambda format: format.name)
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_blocks_of_every_magnitude(scaling: Scaling, format: Any) -> None:
    """Amaxes from the smallest subnormal to the largest float32, at powers of two and beside them."""
    exponents = [*range(-149, -118), *range(-64, -56), *range(116, 128)]
    x = np.zeros((3, 32 * 17), np.float32)
    for number, (row, block) in enumerate(np.ndindex(3, 17)):
        top = np.ldexp(np.float32(1), exponents[number])
        near = (top, np.nextafter(top, np.float32(0)), np.nextafter(top, np.float32(np.inf)), top * np.float32(1.75))
        x[row, 32 * block + 3] = near[number % 4]
        x[row, 32 * block + 4] = -top / 3
    for rows in (x, x[:1]):
        check(rows, TensorSpec(format, scaling))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_blocks_with_nan_and_infinity(scaling: Scaling) -> None:
    x = matrix((18, 100))
    x[0, 3] = np.nan
    x[7, 40], x[7, 41] = np.inf, -np.inf
    x[9, 99], x[9, 98] = np.nan, np.inf
    x[12] = np.nan
    for part in (x, x[:1], x[7:8], x[1:7], np.full((2, 40), np.nan, np.float32)):
        check(part, TensorSpec(E4M3FN, scaling))


@pytest.mark.parametrize(
    "scaling", [Block(), Block(shape=(128, 128)), Row(), TwoLevel(), Current(), Delayed()], ids=str
)
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16)], ids=str)
def test_narrow_matrices(dtype: np.dtype, scaling: Scaling) -> None:
    with np.errstate(over="ignore"):
        check(matrix((20, 140)).astype(dtype), TensorSpec(E4M3FN, scaling), scale=0.3)


@pytest.mark.parametrize(
    ("scaling", "shape"),
    [
        (Row(), (1, 16_400)),
        (Block(shape=(256, 256)), (260, 70)),
        (Block(shape=(130, 200)), (131, 90)),
        (Block(shape=(3, 20)), (10, 70)),
        (Block(shape=(1, 1)), (3, 5)),
        (Block(shape=(7, 1), scale=BlockScale.FLOOR), (16, 5)),
    ],
    ids=str,
)
def test_blocks_of_every_size(scaling: Scaling, shape: tuple[int, int]) -> None:
    check(matrix(shape), TensorSpec(E4M3FN, scaling))
    check(matrix(shape), TensorSpec(E2M3FN, scaling, Rounding.STOCHASTIC), seed=4)


@pytest.mark.parametrize("scaling", [Block(), Block(shape=(16, 16)), Row(), TwoLevel(), Current()], ids=str)
def test_strided_matrices(scaling: Scaling) -> None:
    x = matrix((40, 60))
    tensor = on_device(x)
    check(x.T, TensorSpec(E4M3FN, scaling), tensor.t())
    check(x[::3, 1:-4], TensorSpec(E4M3FN, scaling), tensor[::3, 1:-4])


@pytest.mark.parametrize("shape", [(5, 16), (5, 33), (1, 1), (300, 40), (0, 16), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_hadamard(dtype: np.dtype, shape: tuple[int, int]) -> None:
    x = matrix(shape)
    if x.size > 100:
        x[1, 3], x[2, 5], x[3, 7], x[4, 0] = np.nan, np.inf, 3e38, 1e-45
    assert_same(cuda.hadamard(on_device(x.astype(dtype))), reference.hadamard(x.astype(dtype)))


def test_quantize_matrix_is_both() -> None:
    x, spec = matrix((9, 70)), TensorSpec(E4M3FN, Block())
    assert_same(
        cuda.quantize_matrix(on_device(x), spec), reference.decode_matrix(reference.encode_matrix(x, spec), spec)
    )


def test_a_delayed_scale_may_be_a_tensor() -> None:
    x, spec = matrix((9, 70)), TensorSpec(E4M3FN, Delayed())
    ours = cuda.encode_matrix(on_device(x), spec, scale=torch.tensor(3.7, device=DEVICE))
    assert_same(ours.codes, reference.encode_matrix(x, spec, scale=3.7).codes)


@pytest.mark.parametrize(
    "scaling", [Block(shape=(1, 32), scale=BlockScale.RCEIL), TwoLevel(), Row(), Current()], ids=str
)
def test_nan_is_refused_by_the_formats_without_one(scaling: Scaling) -> None:
    x = on_device(matrix((9, 70)))
    x[3, 4] = torch.nan
    with pytest.raises(ValueError, match="float4_e2m1fn has no NaN, but the input holds one"):
        cuda.encode_matrix(x, TensorSpec(E2M1FN, scaling))


def test_infinity_in_a_block_of_mx_makes_nan_and_is_refused_too() -> None:
    x = np.ones((1, 64), np.float32)
    x[0, 3] = np.inf
    spec = TensorSpec(E2M1FN, Block(shape=(1, 32), scale=BlockScale.RCEIL))
    for cast in (lambda: cuda.encode_matrix(on_device(x), spec), lambda: reference.encode_matrix(x, spec)):
        with pytest.raises(ValueError, match="float4_e2m1fn has no NaN"):
            cast()


def test_what_cannot_be_cast_says_so() -> None:
    x = torch.ones(3, 5, device=DEVICE)
    with pytest.raises(ValueError, match="do not divide"):
        cuda.encode_matrix(x, TensorSpec(E4M3FN, Block(padding=False)))
    with pytest.raises(ValueError, match="an operand matrix is two-dimensional"):
        cuda.encode_matrix(x.double(), TensorSpec(E4M3FN))
    with pytest.raises(ValueError, match="an operand matrix is two-dimensional"):
        cuda.hadamard(x[0])
    with pytest.raises(ValueError, match="holds scales, not matrices"):
        cuda.encode_matrix(x, TensorSpec(E8M0FNU))
