"""The public casts on NumPy arrays and CPU tensors: equal to the definition, to ml_dtypes and to torch, bit for bit."""

import functools
import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gfloat
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import Format, Overflow, Rounding, reference
from octavo.formats import E2M1FN, E2M3FN, E3M2FN, E3M4FN, E4M3FN, E5M2, E8M0FNU, FORMATS
from octavo.kernels.loops import CHUNK
from octavo.rounding import random_bits

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
SEED = 0xFEED_0123_4567_89AB
IN_ML_DTYPES = [format for format in FORMATS.values() if hasattr(ml_dtypes, format.name)]
IN_TORCH = [
    ("float8_e4m3fn", Overflow.SATURATE),
    ("float8_e5m2", Overflow.NONE),
    ("float8_e4m3fnuz", Overflow.NONE),
    ("float8_e5m2fnuz", Overflow.NONE),
]


def by_name(value: Any) -> str:
    return value.name if isinstance(value, Format) else str(getattr(value, "value", value))


def to_torch(x: npt.NDArray[Any]) -> torch.Tensor:
    """The same numbers as a tensor; its own memory."""
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def to_numpy(x: torch.Tensor) -> npt.NDArray[Any]:
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view(BFLOAT16)
    return x.numpy()


def assert_same_floats(
    got: npt.NDArray[Any], expected: npt.NDArray[Any], inputs: npt.NDArray[Any], note: str = ""
) -> None:
    """The same dtype, shape and bits, NaNs being one; names the first inputs that are not."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), note
    unsigned = BITS[got.dtype.itemsize]
    both_nan = np.isnan(got) & np.isnan(expected)
    wrong = np.flatnonzero(~(both_nan | (got.view(unsigned) == expected.view(unsigned))))[:5]
    lines = [f"{inputs.reshape(-1)[i]!r} -> {got.reshape(-1)[i]!r}, not {expected.reshape(-1)[i]!r}" for i in wrong]
    assert not lines, "\n".join([note, *lines])


def assert_same_codes(
    got: npt.NDArray[Any], expected: npt.NDArray[Any], format: Format, inputs: npt.NDArray[Any], note: str
) -> None:
    """Equal codes, or both NaN."""
    if np.array_equal(got, expected):
        return
    assert_same_floats(format.values[got], format.values[expected], inputs, note)


def fresh(count: int, format: Format) -> Iterator[tuple[npt.NDArray[np.float32], str]]:
    """Blocks of random float32 bit patterns from a seed that no earlier run has seen, each with a note that names it."""
    seed = int.from_bytes(os.urandom(8), "little")
    generator = np.random.default_rng(seed)
    for block in range(count >> 22):
        x = generator.integers(0, 1 << 32, 1 << 22, np.uint32).view(np.float32)
        if not format.has_nan:
            x[np.isnan(x)] = 0
        yield x, f"numpy.random.default_rng({seed}), block {block} of 2**22 patterns"


@functools.cache
def inputs(format: Format, dtype: np.dtype) -> npt.NDArray[Any]:
    """Every value of the format, the midpoints, their neighbours in `dtype`, its extremes, and random bit patterns."""
    with np.errstate(all="ignore"):
        values = np.sort(
            np.nan_to_num(format.values.astype(np.float64), nan=0.0, posinf=format.max * 2, neginf=-format.max * 2)
        )
        points = np.concatenate([values, (values[:-1] + values[1:]) / 2, values * 3, values / 5]).astype(dtype)
        unsigned = BITS[dtype.itemsize]
        around = (points.view(unsigned)[:, None] + np.array([0, 1, -1]).astype(unsigned)).view(dtype).reshape(-1)
        info = ml_dtypes.finfo(dtype)
        edges = np.array([0, info.max, info.tiny, info.smallest_subnormal, math.inf, math.nan], dtype)
        top = int(np.iinfo(unsigned).max)
        noise = np.random.default_rng(6).integers(0, top, 3000, unsigned, endpoint=True).view(dtype)
        x = np.concatenate([around, edges, -edges, noise])
        return x if format.has_nan else x[~np.isnan(x)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overflow", list(Overflow), ids=by_name)
@pytest.mark.parametrize("rounding", list(Rounding), ids=by_name)
@pytest.mark.parametrize("format", FORMATS.values(), ids=by_name)
def test_casts_equal_the_definition(format: Format, rounding: Rounding, overflow: Overflow, dtype: np.dtype) -> None:
    x = inputs(format, dtype)
    modes: dict[str, Any] = {"rounding": rounding, "overflow": overflow, "seed": SEED, "offset": 5}
    with np.errstate(invalid="ignore"):
        codes = reference.encode(x, format, **modes)
    assert np.array_equal(octavo.encode(x, format, **modes), codes)
    assert np.array_equal(octavo.encode(to_torch(x), format, **modes).numpy(), codes)
    for scale in (1.0, 3.7, 2.0**-13):
        with np.errstate(all="ignore"):
            source = x if scale == 1.0 else x / dtype.type(scale)
        expected = reference.quantize(source, format, scale=scale, **modes)
        assert_same_floats(octavo.quantize(source, format, scale=scale, **modes), expected, source)
        assert_same_floats(to_numpy(octavo.quantize(to_torch(source), format, scale=scale, **modes)), expected, source)


@pytest.mark.parametrize("size", [1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
@pytest.mark.parametrize("rounding", list(Rounding), ids=by_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_is_cast_whole(dtype: np.dtype, rounding: Rounding, size: int) -> None:
    x = np.random.default_rng(size).normal(0, 100, size).astype(dtype)
    modes: dict[str, Any] = {"rounding": rounding, "seed": 2, "offset": 3}
    codes = octavo.encode(x, E4M3FN, **modes)
    assert np.array_equal(codes, reference.encode(x, E4M3FN, **modes))
    assert_same_floats(octavo.quantize(x, E4M3FN, **modes), E4M3FN.values[codes].astype(dtype), x)
    assert octavo.amax(x) == float(np.abs(x.astype(np.float64)).max())


@pytest.mark.parametrize("format", FORMATS.values(), ids=by_name)
def test_every_code_comes_back(format: Format) -> None:
    codes = np.arange(1 << format.bits, dtype=np.uint8)
    values = octavo.decode(codes, format)
    assert values.dtype == np.float32
    assert np.array_equal(octavo.decode(torch.from_numpy(codes), format).numpy(), values, equal_nan=True)
    numbers = ~np.isnan(values)
    for array in (values, values.astype(np.float64), values.astype(BFLOAT16)):
        again = octavo.encode(array[numbers], format, overflow=Overflow.NONE)
        assert np.array_equal(again, codes[numbers])
        assert np.array_equal(
            octavo.encode(to_torch(array[numbers]), format, overflow=Overflow.NONE).numpy(), codes[numbers]
        )
    if format.has_nan:
        assert np.isnan(octavo.decode(octavo.encode(values[~numbers], format), format)).all()


def by_ml_dtypes(x: npt.NDArray[Any], format: Format) -> npt.NDArray[np.uint8]:
    with np.errstate(all="ignore"):
        return x.astype(getattr(ml_dtypes, format.name)).view(np.uint8)


def by_torch(x: npt.NDArray[Any], format: Format) -> npt.NDArray[np.uint8]:
    return to_torch(x).to(getattr(torch, format.name)).view(torch.uint8).numpy()


def every_code_of_every_format(format: Format) -> npt.NDArray[np.float32]:
    """The values of all formats and the midpoints between them; no NaN for a format without."""
    values = np.concatenate([other.values for other in FORMATS.values()])
    finite = np.unique(values[np.isfinite(values)])
    midpoints = (finite[:-1].astype(np.float64) + finite[1:]) / 2
    x = np.concatenate([values, midpoints.astype(np.float32)])
    return x if format.has_nan else x[~np.isnan(x)]


@pytest.mark.parametrize("format", IN_ML_DTYPES, ids=by_name)
def test_every_code_of_every_format_is_cast_as_ml_dtypes_does(format: Format) -> None:
    with np.errstate(over="ignore"):
        sources = [every_code_of_every_format(format).astype(dtype) for dtype in (np.float32, BFLOAT16, np.float16)]
    for x in sources:
        codes = octavo.encode(x, format, overflow=Overflow.NONE)
        assert_same_codes(codes, by_ml_dtypes(x, format), format, x, str(x.dtype))


@pytest.mark.parametrize(("name", "overflow"), IN_TORCH)
def test_every_code_of_every_format_is_cast_as_torch_does(name: str, overflow: Overflow) -> None:
    format = FORMATS[name]
    with np.errstate(over="ignore"):
        sources = [every_code_of_every_format(format).astype(dtype) for dtype in (np.float32, BFLOAT16, np.float16)]
    for x in sources:
        codes = octavo.encode(to_torch(x), format, overflow=overflow).numpy()
        assert_same_codes(codes, by_torch(x, format), format, x, str(x.dtype))


@pytest.mark.parametrize("format", IN_ML_DTYPES, ids=by_name)
def test_fresh_random_float32_is_cast_as_ml_dtypes_does(format: Format) -> None:
    for x, note in fresh(1 << 24, format):
        codes = octavo.encode(x, format, overflow=Overflow.NONE)
        assert_same_codes(codes, by_ml_dtypes(x, format), format, x, note)


@pytest.mark.parametrize(("name", "overflow"), IN_TORCH)
def test_fresh_random_float32_is_cast_as_torch_does(name: str, overflow: Overflow) -> None:
    format = FORMATS[name]
    for x, note in fresh(1 << 24, format):
        codes = octavo.encode(torch.from_numpy(x), format, overflow=overflow).numpy()
        assert_same_codes(codes, by_torch(x, format), format, x, note)


def test_fresh_random_float32_is_cast_to_e3m4fn_as_gfloat_does() -> None:
    domain = gfloat.Domain.Finite
    there = gfloat.FormatInfo(
        "e3m4fn",
        8,
        5,
        bias=3,
        is_signed=True,
        domain=domain,
        has_nz=True,
        num_high_nans=1,
        has_subnormals=True,
        is_twos_complement=False,
    )
    for block, note in fresh(1 << 24, E3M4FN):
        codes = octavo.encode(block, E3M4FN, overflow=Overflow.NONE)
        for part in range(0, block.size, 1 << 19):
            x = block[part : part + (1 << 19)]
            with np.errstate(all="ignore"):
                expected = gfloat.round_ndarray(there, x).astype(np.float32)
            assert_same_floats(E3M4FN.values[codes[part : part + (1 << 19)]], expected, x, note)


def everything(x: Any) -> list[tuple[Any, Any]]:
    """Each cast of x, beside the dtype that it promises."""
    codes = octavo.encode(x, E4M3FN)
    uint8, float32 = (torch.uint8, torch.float32) if isinstance(x, torch.Tensor) else (np.uint8, np.float32)
    return [(codes, uint8), (octavo.decode(codes, E4M3FN), float32), (octavo.quantize(x, E4M3FN), x.dtype)]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2), (2, 2, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kind_shape_dtype_and_device_come_back(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(1).normal(0, 9, shape)).astype(dtype)
    expected = reference.encode(array, E4M3FN)
    for x in (array, to_torch(array)):
        before = x.copy() if isinstance(x, np.ndarray) else x.clone()
        for result, promised in everything(x):
            assert type(result) is type(x)
            assert (tuple(result.shape), result.dtype) == (shape, promised)
            assert str(getattr(result, "device", "cpu")) == "cpu"
        assert np.array_equal(np.asarray(octavo.encode(x, E4M3FN)), expected)
        assert bool((x == before).all())
    assert octavo.amax(array) == octavo.amax(to_torch(array)) == float(np.abs(array.astype(np.float64)).max(initial=0))


VIEWS: dict[str, Callable[[Any], Any]] = {
    "transposed": lambda x: x.T,
    "every third row": lambda x: x[::3],
    "every other column": lambda x: x[:, 1::2],
    "one column": lambda x: x[:, 4],
    "offset": lambda x: x[2:, 3:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype: np.dtype, view: Callable[[Any], Any]) -> None:
    array = np.random.default_rng(2).normal(0, 9, (12, 10)).astype(dtype)
    tensor = to_torch(array)
    packed = np.array(view(array), order="C")
    for x in (view(array), view(tensor)):
        assert np.array_equal(np.asarray(octavo.encode(x, E5M2)), reference.encode(packed, E5M2))
        result = octavo.quantize(x, E5M2, rounding=Rounding.STOCHASTIC, seed=1)
        expected = reference.quantize(packed, E5M2, rounding=Rounding.STOCHASTIC, seed=1)
        assert_same_floats(result if isinstance(result, np.ndarray) else to_numpy(result), expected, packed)
        assert octavo.amax(x) == float(np.abs(packed.astype(np.float64)).max())
    codes = octavo.encode(array, E5M2)
    assert np.array_equal(octavo.decode(view(codes), E5M2), E5M2.values[view(codes)])
    assert np.array_equal(octavo.decode(view(torch.from_numpy(codes)), E5M2).numpy(), E5M2.values[view(codes)])


def test_negative_strides_and_broadcasts_are_seen() -> None:
    x = np.arange(6, dtype=np.float32)
    assert np.array_equal(octavo.quantize(x[::-1], E4M3FN), x[::-1])
    assert np.array_equal(octavo.quantize(np.broadcast_to(x, (3, 6)), E4M3FN), np.broadcast_to(x, (3, 6)))
    assert torch.equal(octavo.quantize(torch.ones(1).expand(5), E4M3FN), torch.ones(5))


def test_a_lazy_negation_is_seen() -> None:
    negated = torch.complex(torch.ones(1), torch.ones(1)).conj().imag
    assert negated.is_neg()
    assert octavo.quantize(negated, E4M3FN).tolist() == [-1.0]


def test_read_only_arrays_and_numpy_scalars_are_cast() -> None:
    x = np.array([1.0, 17.0], np.float32)
    x.flags.writeable = False
    assert octavo.quantize(x, E4M3FN).tolist() == [1.0, 16.0]
    scalar = octavo.encode(np.float32(1.0), E4M3FN)
    assert (scalar.shape, int(scalar)) == ((), 0x38)


def test_results_lie_on_the_cpu_whatever_the_default_device() -> None:
    # In its own process: to write to memory that is not there would end this one.
    program = """
import torch, octavo
x = torch.tensor([1.0, 17.0])
torch.set_default_device("meta")
for result in (octavo.encode(x, octavo.formats.E4M3FN), octavo.quantize(x, octavo.formats.E4M3FN)):
    assert result.device.type == "cpu", result.device
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"


def test_a_tensor_with_requires_grad_is_cast_without_a_gradient() -> None:
    x = torch.tensor([1.0, 17.0], requires_grad=True)
    for result in (octavo.encode(x, E4M3FN), octavo.quantize(x, E4M3FN)):
        assert not result.requires_grad
    assert octavo.quantize(torch.nn.Parameter(x.detach()), E4M3FN).tolist() == [1.0, 16.0]
    assert octavo.amax(x) == 17.0
    assert x.grad is None


STOCHASTIC = {"rounding": Rounding.STOCHASTIC}
ONES = np.ones(3, np.float32)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (lambda: octavo.encode([1.0], E4M3FN), "octavo casts arrays of numpy and torch; got list"),
    "a list to quantize": (lambda: octavo.quantize([1.0], E4M3FN), "octavo casts arrays of numpy and torch; got list"),
    "a list to decode": (lambda: octavo.decode([1], E4M3FN), "octavo casts arrays of numpy and torch; got list"),
    "a float to amax": (lambda: octavo.amax(1.0), "octavo casts arrays of numpy and torch; got float"),
    "integers": (lambda: octavo.encode(np.arange(3), E4M3FN), "got int64: convert it to float32 first"),
    "integers to amax": (lambda: octavo.amax(np.arange(3)), "got int64: convert it to float32 first"),
    "integer tensor": (lambda: octavo.encode(torch.arange(3), E4M3FN), "got torch.int64: convert it to float32 first"),
    "booleans": (lambda: octavo.quantize(np.ones(3, bool), E4M3FN), "got bool: convert it to float32 first"),
    "complex": (lambda: octavo.encode(torch.ones(3, dtype=torch.complex64), E4M3FN), "got torch.complex64"),
    "big-endian": (lambda: octavo.encode(np.ones(3, ">f4"), E4M3FN), "got >f4: convert it to float32 first"),
    "uint8": (lambda: octavo.encode(np.ones(3, np.uint8), E4M3FN), "got uint8: convert it to float32 first"),
    "uint8 to quantize": (lambda: octavo.quantize(torch.ones(3, dtype=torch.uint8), E4M3FN), "got uint8"),
    "uint8 to amax": (lambda: octavo.amax(np.ones(3, np.uint8)), "got uint8: convert it to float32 first"),
    "another device": (
        lambda: octavo.encode(torch.ones(3, device="meta"), E4M3FN),
        "the tensor is on meta; move it first",
    ),
    "NaN in FP4": (lambda: octavo.encode(np.array([1, math.nan], np.float32), E2M1FN), "float4_e2m1fn has no NaN"),
    "NaN in FP6": (lambda: octavo.quantize(torch.tensor([math.nan]), E3M2FN), "float6_e3m2fn has no NaN"),
    "float64 NaN in FP6": (lambda: octavo.encode(np.array([math.nan]), E2M3FN), "float6_e2m3fn has no NaN"),
    "no seed": (lambda: octavo.encode(ONES, E4M3FN, **STOCHASTIC), "none was given; pass seed=0, say"),
    "no seed to quantize": (
        lambda: octavo.quantize(torch.ones(3), E4M3FN, **STOCHASTIC),
        "none was given; pass seed=0, say",
    ),
    "negative seed": (
        lambda: octavo.encode(ONES, E4M3FN, seed=-1, **STOCHASTIC),
        "seed is an integer from 0 to 18446744073709551615; got -1",
    ),
    "large seed": (
        lambda: octavo.encode(ONES, E4M3FN, seed=1 << 64, **STOCHASTIC),
        "got 18446744073709551616",
    ),
    "fractional seed": (
        lambda: octavo.encode(ONES, E4M3FN, seed=1.5, **STOCHASTIC),
        "seed is an integer from 0 to",
    ),
    "negative offset": (lambda: octavo.encode(ONES, E4M3FN, seed=1, offset=-1, **STOCHASTIC), "offset"),
    "large offset": (lambda: octavo.encode(ONES, E4M3FN, seed=1, offset=1 << 64, **STOCHASTIC), "offset"),
    "scale 0": (lambda: octavo.quantize(ONES, E4M3FN, scale=0), "a scale is positive and finite"),
    "negative scale": (lambda: octavo.quantize(ONES, E4M3FN, scale=-1), "a scale is positive and finite"),
    "infinite scale": (
        lambda: octavo.quantize(ONES, E4M3FN, scale=math.inf),
        "a scale is positive and finite",
    ),
    "NaN scale": (
        lambda: octavo.quantize(torch.ones(3), E4M3FN, scale=math.nan),
        "a scale is positive and finite",
    ),
    "scale that float32 cannot hold": (
        lambda: octavo.quantize(ONES, E4M3FN, scale=1e39),
        "a scale is positive and finite",
    ),
    "scale that is 0 in float32": (
        lambda: octavo.quantize(ONES, E4M3FN, scale=1e-46),
        "a scale is positive and finite",
    ),
    "code out of range": (
        lambda: octavo.decode(np.array([16], np.uint8), E2M1FN),
        "float4_e2m1fn has codes 0 to 15; got 16",
    ),
    "code out of range in torch": (
        lambda: octavo.decode(torch.tensor([64]).byte(), E2M3FN),
        "has codes 0 to 63; got 64",
    ),
    "codes of float32": (lambda: octavo.decode(ONES, E4M3FN), "codes are uint8; got float32"),
    "codes of int8": (
        lambda: octavo.decode(torch.ones(3, dtype=torch.int8), E4M3FN),
        "codes are uint8; got torch.int8",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_cast_is_an_error_of_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is asserted below, whole
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cast_goes_on_after_an_error() -> None:
    with pytest.raises(ValueError, match="has no NaN"):
        octavo.encode(np.array([math.nan], np.float32), E2M1FN)
    assert octavo.encode(np.array([6.0], np.float32), E2M1FN) == 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax_is_that_of_all_elements_and_nan_where_there_is_one(dtype: np.dtype) -> None:
    largest, smallest = float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).smallest_subnormal)
    for elements, expected in (
        ([], 0.0),
        ([0.0, -0.0], 0.0),
        ([1.0, -3.5, 2.0], 3.5),
        ([smallest, 0.0], smallest),
        ([-largest, 1.0], largest),
        ([1.0, -math.inf], math.inf),
        ([math.nan, 1.0], math.nan),
        ([1.0, -math.nan], math.nan),
        ([math.inf, math.nan, -math.inf], math.nan),
    ):
        x = np.array(elements, np.float64).astype(dtype)
        for found in (octavo.amax(x), octavo.amax(to_torch(x))):
            assert type(found) is float
            assert found == expected or (math.isnan(found) and math.isnan(expected)), elements


@pytest.mark.parametrize("place", [0, 4 * CHUNK - 1, 4 * CHUNK, 9 * CHUNK + 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax_finds_a_lone_nan_or_peak_anywhere(dtype: np.dtype, place: int) -> None:
    x = np.ones(9 * CHUNK + 7, dtype)
    for odd in (-7.0, math.nan):
        x[place] = odd
        assert octavo.amax(x) == 7.0 or (math.isnan(odd) and math.isnan(octavo.amax(x)))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("format", [E4M3FN, E8M0FNU], ids=by_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stochastic_results_do_not_depend_on_the_number_of_threads(dtype: np.dtype, format: Format) -> None:
    x = np.random.default_rng(3).lognormal(0, 1.5, 20 * CHUNK + 5).astype(dtype)
    expected = reference.encode(x, format, rounding=Rounding.STOCHASTIC, seed=SEED)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for source in (x, to_torch(x)):
            codes = octavo.encode(source, format, rounding=Rounding.STOCHASTIC, seed=SEED)
            assert np.array_equal(np.asarray(codes), expected), threads
        assert octavo.amax(x) == float(x.astype(np.float64).max())


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, CHUNK, 100_003])
def test_an_offset_shifts_the_draws(offset: int) -> None:
    x = np.random.default_rng(4).normal(0, 30, 100_100).astype(np.float32)
    whole = octavo.encode(x, E4M3FN, rounding=Rounding.STOCHASTIC, seed=9)
    tail = octavo.encode(x[offset:], E4M3FN, rounding=Rounding.STOCHASTIC, seed=9, offset=offset)
    assert np.array_equal(tail, whole[offset:])


@pytest.mark.parametrize("offset", [(1 << 34) - 3, (1 << 40) + 1, 1 << 62])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_offsets_draw_the_bits_of_their_positions(dtype: type, offset: int) -> None:
    x = np.random.default_rng(5).normal(0, 30, 1000).astype(dtype)
    modes: dict[str, Any] = {"rounding": Rounding.STOCHASTIC, "seed": 9, "offset": offset}
    assert np.array_equal(octavo.encode(x, E4M3FN, **modes), reference.encode(x, E4M3FN, **modes))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_very_fraction_that_carries_goes_up(dtype: type) -> None:
    bits = random_bits(21, 0, 1 << 16)
    chosen = (bits % 256 == 0) & (bits > 0)  # so that float32 holds the fraction
    for short, step in ((0.0, True), (2.0**-24, False)):
        fraction = np.where(chosen, 1 - bits / 2.0**32 - short, 0.0)
        x = (fraction * E4M3FN.smallest_subnormal).astype(dtype)
        codes = octavo.encode(x, E4M3FN, rounding=Rounding.STOCHASTIC, seed=21)
        assert np.array_equal(codes, chosen & step)


def test_elements_draw_in_row_major_order() -> None:
    x = np.random.default_rng(6).normal(0, 30, (40, 50)).astype(np.float32)
    modes: dict[str, Any] = {"rounding": Rounding.STOCHASTIC, "seed": 9}
    for source in (x.T, torch.from_numpy(x).T):
        codes = np.asarray(octavo.encode(source, E4M3FN, **modes))
        assert np.array_equal(codes.reshape(-1), octavo.encode(x.T.reshape(-1), E4M3FN, **modes))


@given(
    patterns=st.lists(st.integers(0, (1 << 32) - 1), max_size=40),
    format=st.sampled_from(list(FORMATS.values())),
    rounding=st.sampled_from(Rounding),
    overflow=st.sampled_from(Overflow),
    seed=st.integers(0, (1 << 64) - 1),
    offset=st.integers(0, 1 << 40),
)
def test_any_float32_is_cast_as_defined(
    patterns: list[int], format: Format, rounding: Rounding, overflow: Overflow, seed: int, offset: int
) -> None:
    x = np.array(patterns, np.uint32).view(np.float32)
    if not format.has_nan:
        x = x[~np.isnan(x)]
    modes: dict[str, Any] = {"rounding": rounding, "overflow": overflow, "seed": seed, "offset": offset}
    with np.errstate(invalid="ignore"):
        expected = reference.encode(x, format, **modes)
    assert np.array_equal(octavo.encode(x, format, **modes), expected)


@given(
    pattern=st.integers(0, (1 << 32) - 1),
    scale=st.floats(2.0**-149, 2.0**127, width=32),
    format=st.sampled_from(list(FORMATS.values())),
    dtype=st.sampled_from(DTYPES),
)
def test_any_scale_is_applied_as_defined(pattern: int, scale: float, format: Format, dtype: np.dtype) -> None:
    with np.errstate(all="ignore"):
        x = np.array([pattern], np.uint32).view(np.float32).astype(dtype)
        scaled_is_nan = np.isnan(x.astype(np.float64) * scale).any()
    if scaled_is_nan and not format.has_nan:
        return
    assert_same_floats(octavo.quantize(x, format, scale=scale), reference.quantize(x, format, scale=scale), x)


WITHOUT_TORCH = """
import hashlib, sys
import numpy as np
import octavo
from octavo.kernels import threads

x = np.random.default_rng(7).normal(0, 50, 1_000_003).astype(np.float32)
digest = hashlib.sha256()
for rounding in octavo.Rounding:
    digest.update(octavo.encode(x, octavo.formats.E4M3FN, rounding=rounding, seed=3))
    digest.update(octavo.quantize(x, octavo.formats.E5M2, rounding=rounding, seed=3))
assert "torch" not in sys.modules
print(threads.count(), octavo.amax(x) == np.abs(x).max(), digest.hexdigest())
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_numpy_arrays_are_cast_without_torch_on_any_number_of_threads(threads: int) -> None:
    x = np.random.default_rng(7).normal(0, 50, 1_000_003).astype(np.float32)
    digest = hashlib.sha256()
    for rounding in Rounding:
        digest.update(octavo.encode(x, E4M3FN, rounding=rounding, seed=3))
        digest.update(octavo.quantize(x, E5M2, rounding=rounding, seed=3))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(threads), "True", digest.hexdigest()]
