"""The XLA backend against the reference, bit for bit, eager and inside a jit."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from octavo import reference
from octavo.formats import (
    E2M1FN,
    E2M3FN,
    E3M2FN,
    E3M4FN,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E8M0FNU,
    FORMATS,
    WIDE_FORMATS,
    Format,
)
from octavo.kernels import xla, xla_floats, xla_matrices
from octavo.recipes import NAMED, TensorSpec, Transform
from octavo.rounding import Overflow, Rounding, random_bits
from octavo.scaling import Block, BlockScale, Current, Delayed, Row, TwoLevel, Unscaled

F32 = np.float32
SEED, OFFSET = 0x123456789ABCDEF0, (1 << 40) + 5
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WORDS = {4: np.uint32, 2: np.uint16, 8: np.uint64, 1: np.uint8}


def by_name(format: Format) -> str:
    return format.name


def same(ours: Any, expected: npt.NDArray[Any]) -> None:
    """Assert equal dtypes, shapes and bits, all NaN being one."""
    ours = np.asarray(ours)
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    word = WORDS[ours.dtype.itemsize]
    different = np.ascontiguousarray(ours).view(word) != np.ascontiguousarray(expected).view(word)
    if ours.dtype not in (np.uint8, np.uint32):
        different &= ~(np.isnan(ours) & np.isnan(expected))
    assert not different.any(), (ours[different][:5], expected[different][:5])


def float32_patterns(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Random patterns, an eighth of them subnormal or zero."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 1 << 32, count, np.uint32)
    bits[: count // 8] &= np.uint32(0x807FFFFF)
    return bits.view(np.float32)


@functools.cache
def inputs(format: Format) -> npt.NDArray[np.float32]:
    """What is special, the values of the format, their midpoints, the float32 beside each, sizes that it holds, and any pattern."""
    values = np.unique(format.values[np.isfinite(format.values)])
    values = np.concatenate([values, 2 * values[-2:], [2.0 * format.max]]) if format.max < 2.0**100 else values
    middle = (values[1:].astype(np.float64) / 2 + values[:-1].astype(np.float64) / 2).astype(np.float32)
    exact = np.concatenate([values, middle]).astype(np.float32)
    special = F32(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-149), 2.0**-126, 2.0**-127, 3.0e38, -3.4028235e38]
    )
    beside = np.concatenate([exact, np.nextafter(exact, F32(np.inf)), np.nextafter(exact, F32(-np.inf)), -exact])
    generator = np.random.default_rng(1)
    sizes = np.exp2(
        generator.uniform(max(format.emin, -126) - format.mantissa_bits - 2, min(format.emax, 126) + 1, 1 << 14)
    )
    sized = (sizes * generator.choice([-1.0, 1.0], len(sizes))).astype(np.float32)
    x = np.concatenate([special, beside, sized, float32_patterns(1 << 16)])
    return x if format.has_nan else np.where(np.isnan(x), F32(0), x)


def moded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a jit of its own, all but its arrays static."""
    return lambda x, format, **modes: jax.jit(lambda y: function(y, format, **modes))(x)


def settings() -> Iterator[tuple[Format, Rounding, Overflow]]:
    """All, but one policy where policies agree (FP6, FP4), of the wider formats, and where the same lines tell the policies apart."""
    telling = (E4M3FN, E5M2, E4M3FNUZ, E8M0FNU)
    for format, rounding in itertools.product((*FORMATS.values(), *WIDE_FORMATS.values()), Rounding):
        alike = rounding in (Rounding.NEAREST_AWAY, Rounding.STOCHASTIC) and format not in telling
        policies = [Overflow.NONE] if alike or not format.has_nan or format.bits > 8 else list(Overflow)
        yield from itertools.product([format], [rounding], policies)


@pytest.mark.parametrize(("format", "rounding", "overflow"), list(settings()))
def test_codes_are_those_of_the_reference(format: Format, rounding: Rounding, overflow: Overflow) -> None:
    x, modes = inputs(format), {"rounding": rounding, "overflow": overflow, "seed": SEED, "offset": OFFSET}
    codes = xla.encode(jnp.asarray(x), format, **modes)
    same(codes, reference.encode(x, format, **modes))
    same(xla.decode(codes, format), reference.decode(np.asarray(codes), format))


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("format", [E4M3FN, E5M2, E4M3FNUZ, E8M0FNU, E2M3FN], ids=by_name)
def test_all_half_precision_numbers_are_cast_as_the_reference_does(format: Format, dtype: np.dtype[Any]) -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        x = x if format.has_nan else x[~np.isnan(x)]
    for modes in ({"overflow": Overflow.NONE}, {"rounding": Rounding.STOCHASTIC, "seed": 3}):
        same(xla.encode(jnp.asarray(x), format, **modes), reference.encode(x, format, **modes))
    same(xla.quantize(jnp.asarray(x), format, scale=3.7), reference.quantize(x, format, scale=3.7))


@pytest.mark.parametrize("scale", [1.0, 3.7, 3.0e38, 1e-40, 2.0**-149])
@pytest.mark.parametrize("format", [E4M3FN, E5M2, E4M3FNUZ, E2M1FN, E8M0FNU], ids=by_name)
def test_quantize_multiplies_and_divides_as_ieee_does(format: Format, scale: float) -> None:
    x = inputs(format)
    with np.errstate(all="ignore"):
        x = x if format.has_nan else np.where(np.isnan(x * F32(scale)), F32(0), x)
        expected = reference.quantize(x, format, scale=scale)
    same(xla.quantize(jnp.asarray(x), format, scale=scale), expected)
    same(jax.jit(lambda y, s: xla.quantize(y, format, scale=s))(x, scale), expected)


@pytest.mark.parametrize("rounding", Rounding)
def test_casts_inside_a_jit_and_of_any_shape_are_the_same(rounding: Rounding) -> None:
    modes = {"rounding": rounding, "seed": 9, "offset": 3}
    for shape in [(), (3, 0, 2), (2, 3, 7)]:
        x = np.random.default_rng(4).normal(size=shape).astype(np.float32)
        same(moded(xla.encode)(x, E5M2, **modes), reference.encode(x, E5M2, **modes))
        same(moded(xla.quantize)(x, E5M2, scale=0.3, **modes), reference.quantize(x, E5M2, scale=0.3, **modes))


def test_float64_is_rounded_once_where_jax_has_it() -> None:
    generator = np.random.default_rng(5)
    with np.errstate(all="ignore"), jax.enable_x64(True):
        near = inputs(E4M3FN)[: 1 << 14].astype(np.float64)
        patterns = generator.integers(0, 1 << 64, 1 << 14, np.uint64).view(np.float64)
        x = np.concatenate([patterns, near, np.nextafter(near, np.inf), [5e-324]])
        for rounding in Rounding:
            modes = {"rounding": rounding, "overflow": Overflow.NONE, "seed": 8}
            for format in (E8M0FNU,) if rounding is Rounding.TOWARD_ZERO else (E4M3FN,):
                same(xla.encode(jnp.asarray(x), format, **modes), reference.encode(x, format, **modes))
        for scale in (1e300, 1e-310):
            same(xla.quantize(jnp.asarray(x), E4M3FN, scale=scale), reference.quantize(x, E4M3FN, scale=scale))
        matrix = x[: 64 * 100].reshape(64, 100)
        agree(matrix, TensorSpec(E4M3FN, Block(shape=(1, 32), scale=BlockScale.RCEIL)))
        agree(matrix, TensorSpec(E4M3FN, TwoLevel(), transform=Transform.HADAMARD))
        assert float(xla.amax(jnp.asarray([1e-46, -1e-45]))) == float(F32(1e-45))


def test_amax_sees_subnormals_and_nan() -> None:
    assert float(xla.amax(jnp.zeros((0, 3)))) == 0
    assert np.asarray(xla.amax(jnp.asarray(F32([1e-45, -4e-45])))) == F32(4e-45)
    assert np.asarray(xla.amax(jnp.asarray([-3, 2], jnp.bfloat16))) == 3
    assert np.isnan(xla.amax(jnp.asarray(F32([1, np.nan, np.inf]))))
    assert np.isposinf(xla.amax(jnp.asarray(F32([1, -np.inf]))))


@pytest.mark.parametrize(
    ("seed", "offset", "words"),
    [
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0, 2, [0xBC57AC4C, 0x9B00DBD8]),
    ],
)
def test_random_bits_have_the_known_answers(seed: int, offset: int, words: list[int]) -> None:
    assert np.asarray(xla.random_bits(seed, offset, len(words))).tolist() == words


@pytest.mark.parametrize("offset", [0, 1, 6, 7, (1 << 32) - 2, (1 << 34) - 9, (1 << 63) - 41])
@pytest.mark.parametrize("seed", [0, 1, (1 << 32) + 3, (1 << 64) - 1])
def test_random_bits_are_those_of_the_reference(seed: int, offset: int) -> None:
    for count in (0, 1, 40):
        same(xla.random_bits(seed, offset, count), random_bits(seed, offset, count))


def test_seeds_and_offsets_may_be_traced_as_words() -> None:
    words = [jnp.asarray([value & 0xFFFFFFFF, value >> 32], jnp.uint32) for value in (SEED, OFFSET)]
    same(jax.jit(lambda seed, offset: xla.random_bits(seed, offset, 40))(*words), random_bits(SEED, OFFSET, 40))


def matrix(rows: int, columns: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Numbers of many sizes, with stretches of zeros, of subnormals, of huge and of tiny numbers."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, columns)) * np.exp2(generator.integers(-12, 12, (rows, columns)))
    x[rows // 2 :, : columns // 4] = 0
    x[rows // 3 :, columns // 2 : columns // 2 + columns // 5] *= 2.0**-130
    x[: rows // 4, columns // 3 : columns // 3 + 3] *= 2.0**110
    return np.asarray(x, np.float32)


def cases() -> Iterator[npt.NDArray[Any]]:
    """Matrices of odd shapes; all tiny, all huge; with Inf; with NaN."""
    yield matrix(37, 75)
    tiny, huge = matrix(37, 75, 1), matrix(37, 75, 2)
    yield np.ldexp(np.clip(tiny, -8, 8), -140)
    yield np.ldexp(np.clip(tiny, -8, 8), -118)
    yield np.ldexp(np.clip(huge, -8, 8), 124)
    for odd in (np.inf, np.nan):
        x = matrix(37, 75, 3)
        x[3, 5] = x[20, 40] = odd
        yield x


def agree(x: npt.NDArray[Any], spec: TensorSpec, **arguments: Any) -> None:
    """Assert that ours are the reference's codes, scales, amax and values, or that both refuse NaN."""
    arguments |= {"seed": SEED} if spec.rounding is Rounding.STOCHASTIC else {}
    with np.errstate(all="ignore"):
        try:
            expected = reference.encode_matrix(x, spec, **arguments)
        except ValueError:
            with pytest.raises(ValueError, match="has no NaN"):
                xla_matrices.encode_matrix(jnp.asarray(x), spec, **arguments)
            return
        values = reference.decode_matrix(expected, spec)
    cast = xla_matrices.encode_matrix(jnp.asarray(x), spec, **arguments)
    same(cast.codes, expected.codes)
    same(cast.scales, expected.scales.astype(cast.scales.dtype))
    same(cast.amax, np.asarray(expected.amax, np.float32))
    same(xla_matrices.decode_matrix(cast, spec), values)


NAMED_SPECS = sorted(
    {spec for recipe in NAMED.values() for _, _, _, spec in recipe().cells() if spec is not None}, key=repr
)


@pytest.mark.parametrize("spec", NAMED_SPECS, ids=str)
def test_every_cell_of_the_named_recipes_is_cast_as_the_reference_does(spec: TensorSpec) -> None:
    arguments = {"scale": 2.7} if isinstance(spec.scaling, Delayed) else {}
    for x in cases():
        agree(x, spec, **arguments)


GRID = [
    TensorSpec(E4M3FN, Block(shape=(1, 32), scale=scale, skip_nan=skip_nan))
    for scale, skip_nan in [
        (BlockScale.FLOAT32, True),
        *itertools.product(BlockScale, (False,)),
        (BlockScale.RCEIL, True),
    ]
]
GRID += [
    TensorSpec(format, Block(shape=(3, 8), scale=scale)) for format in (E2M3FN, E3M2FN, E5M2) for scale in BlockScale
]
GRID += [
    TensorSpec(E5M2, TwoLevel(shape=(2, 5))),
    TensorSpec(E2M1FN, TwoLevel(), Rounding.STOCHASTIC, Overflow.NONE, Transform.HADAMARD),
    TensorSpec(
        E4M3FN, Block(shape=(2, 16), epsilon=1e-5, scale=BlockScale.FLOAT32), Rounding.NEAREST_AWAY, Overflow.NONE
    ),
    TensorSpec(E3M4FN, Row(power_of_two=True, epsilon=1e-42), Rounding.TOWARD_ZERO, Overflow.SATURATE_FINITE),
    TensorSpec(E4M3FNUZ, Current(power_of_two=True), Rounding.STOCHASTIC),
    TensorSpec(E5M2, Unscaled(), Rounding.STOCHASTIC, transform=Transform.HADAMARD),
]


@pytest.mark.parametrize("spec", GRID, ids=str)
def test_other_scalings_are_cast_as_the_reference_does(spec: TensorSpec) -> None:
    for x in cases():
        agree(x, spec)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 33), (17, 15)], ids=str)
@pytest.mark.parametrize("spec", [GRID[0], GRID[-6], GRID[-3], GRID[-1]], ids=str)
def test_any_shape_is_cast(spec: TensorSpec, shape: tuple[int, int]) -> None:
    agree(matrix(*shape), spec, offset=2)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("spec", [GRID[0], GRID[-6], GRID[-3], GRID[-1]], ids=str)
def test_half_precision_matrices_are_cast(spec: TensorSpec, dtype: np.dtype[Any]) -> None:
    with np.errstate(over="ignore"):
        agree(matrix(19, 50).astype(dtype), spec)


@pytest.mark.parametrize("name", ["delayed_scaling", "current_scaling", "mxfp4", "deepseek", "nvfp4"])
def test_quantized_matrices_are_decoded_codes_inside_a_jit(name: str) -> None:
    spec = NAMED[name]().grad_weight.left
    assert spec is not None
    arguments: dict[str, Any] = {"scale": 0.7, "seed": SEED, "offset": 6}
    quantized = jax.jit(lambda x: xla_matrices.quantize_matrix(x, spec, **arguments))
    for x in cases():
        with np.errstate(all="ignore"):
            try:
                expected = reference.decode_matrix(reference.encode_matrix(x, spec, **arguments), spec)
            except ValueError:
                continue  # a jit cannot refuse NaN
        same(quantized(x), expected)


@pytest.mark.parametrize("scale", [1e-40, 3e38])
def test_delayed_scales_of_any_size_are_kept(scale: float) -> None:
    agree(matrix(9, 30), TensorSpec(E4M3FN, Delayed()), scale=scale)


def test_the_hadamard_transform_keeps_what_xla_would_flush() -> None:
    x = float32_patterns(1 << 16, 6)
    tiny = np.ldexp(np.random.default_rng(7).normal(size=1 << 12), -139).astype(np.float32)
    cancelling = np.tile(F32([2.0**70, -(2.0**70), 2.0**-130, 2.0**-128, 2.0**-62, 2.0**-61, 0, 0]), 64)
    for y in (x, tiny, cancelling, np.ldexp(cancelling, -60)):
        same(xla_matrices.hadamard(jnp.asarray(y.reshape(8, -1))), reference.hadamard(y.reshape(8, -1)))


OPERANDS = F32([0, 1, 3, 1e-45, 1e-38, 1.1754944e-38, 1e38, 3.4028235e38, 2.0**-60, 1.7e19, 1e-19, np.inf, np.nan])
OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "multiply": (xla_floats.multiply, np.multiply),
    "divide": (xla_floats.divide, np.divide),
    "add": (xla_floats.add, np.add),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_arithmetic_is_that_of_ieee(name: str) -> None:
    ours, theirs = OPERATIONS[name]
    signed = np.concatenate([OPERANDS, -OPERANDS])
    any_bits = float32_patterns(1 << 15, 8)
    near = (
        np.ldexp(float32_patterns(1 << 15, 9).view(np.uint32) & 0x807FFFFF | 0x3F800000, 0).astype(np.uint32).view(F32)
    )
    small = (near * F32(2.0**-64)).astype(np.float32)
    pairs = [tuple(grid.ravel() for grid in np.meshgrid(signed, signed)), (any_bits, any_bits[::-1])]
    pairs += [(any_bits, near), (near, any_bits), (small, small[::-1]), (small, -(small.view(np.uint32) ^ 3).view(F32))]
    for a, b in pairs:
        with np.errstate(all="ignore"):
            expected = theirs(a, b)
        got = jax.jit(ours)(*(np.ascontiguousarray(side).view(np.uint32) for side in (a, b)))
        same(np.asarray(got).view(np.float32), expected)


@pytest.mark.parametrize("format", [E2M1FN, E3M2FN, E2M3FN], ids=by_name)
def test_nan_is_refused_where_there_is_none_and_is_the_largest_value_inside_a_jit(format: Format) -> None:
    x = jnp.asarray([1.0, -jnp.nan])
    for cast in (xla.encode, xla.quantize):
        with pytest.raises(ValueError, match=rf"{format.name} has no NaN"):
            cast(x, format)
    assert np.asarray(moded(xla.quantize)(x, format)).tolist() == [1.0, format.max]


def test_what_cannot_be_cast_is_refused() -> None:
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="a cast takes float32"):
        xla.encode(jnp.arange(3), E4M3FN)
    with pytest.raises(ValueError, match="arrays of JAX"):
        xla.encode(np.ones(3), E4M3FN)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="draws from a seed"):
        xla.encode(x, E4M3FN, rounding=Rounding.STOCHASTIC)
    with pytest.raises(ValueError, match="seed is an integer from 0"):
        xla.encode(x, E4M3FN, rounding=Rounding.STOCHASTIC, seed=-1)
    with pytest.raises(ValueError, match="scale is positive and finite"):
        xla.quantize(x, E4M3FN, scale=0.0)
    with pytest.raises(ValueError, match="codes of float8_e4m3fn are uint8"):
        xla.decode(x, E4M3FN)
    with pytest.raises(ValueError, match="has codes 0 to 15"):
        xla.decode(jnp.asarray([16], jnp.uint8), E2M1FN)
    with pytest.raises(ValueError, match="do not divide"):
        xla_matrices.encode_matrix(jnp.ones((3, 5)), TensorSpec(E4M3FN, Block(shape=(1, 4), padding=False)))
