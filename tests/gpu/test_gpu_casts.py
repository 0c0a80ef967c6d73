"""The GPU's casts of tensors that one scale serves, each beside `octavo.reference`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from beside_reference import BFLOAT16, COUNT, DEVICE, MARKS, assert_same, inputs, on_device

from octavo import reference
from octavo.formats import E2M1FN, E4M3FN, E4M3FNUZ, E5M2, E8M0FNU, FORMATS, WIDE_FORMATS, Format
from octavo.kernels import cuda
from octavo.rounding import Overflow, Rounding, random_bits

pytestmark = MARKS
EVERY = [*FORMATS.values(), *WIDE_FORMATS.values()]
SIGNED = [format for format in FORMATS.values() if format.signed]
DTYPES = [np.dtype(np.float32), BFLOAT16, np.dtype(np.float16), np.dtype(np.float64)]
NAN, INF = math.nan, math.inf


def by_name(format: Format) -> str:
    return format.name


def narrowed(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype)


@pytest.mark.parametrize("overflow", list(Overflow))
@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("format", EVERY, ids=by_name)
def test_encode(format: Format, rounding: Rounding, overflow: Overflow) -> None:
    x = inputs(format)
    modes: dict[str, Any] = {"rounding": rounding, "overflow": overflow, "seed": 3, "offset": 8}
    assert_same(cuda.encode(on_device(x), format, **modes), reference.encode(x, format, **modes), format.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [E4M3FN, E4M3FNUZ, E2M1FN, E8M0FNU], ids=by_name)
def test_encode_of_every_dtype(format: Format, dtype: np.dtype) -> None:
    x = narrowed(inputs(format), dtype)
    for rounding in (Rounding.NEAREST_EVEN, Rounding.STOCHASTIC):
        modes: dict[str, Any] = {"rounding": rounding, "overflow": Overflow.NONE, "seed": 1}
        assert_same(cuda.encode(on_device(x), format, **modes), reference.encode(x, format, **modes))


def test_float64_is_rounded_once() -> None:
    x = np.array([17 + 2.0**-40, 17 - 2.0**-40, 17.0, 5e-324, -5e-324, 1.7e308])
    assert_same(cuda.encode(on_device(x), E4M3FN), reference.encode(x, E4M3FN))


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 2**34 - 6, 2**62 + 1])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**64 - 1])
def test_random_bits_are_those_of_the_position(seed: int, offset: int) -> None:
    x = np.random.default_rng(0).standard_normal(2100).astype(np.float32)
    modes: dict[str, Any] = {"rounding": Rounding.STOCHASTIC, "seed": seed, "offset": offset}
    assert_same(cuda.encode(on_device(x), E5M2, **modes), reference.encode(x, E5M2, **modes))
    draws = cuda.random_bits(seed, offset, 2100, DEVICE)
    assert_same(draws, random_bits(seed, offset, 2100).astype(np.int64))


@pytest.mark.parametrize("format", EVERY, ids=by_name)
def test_decode(format: Format) -> None:
    codes = np.arange(1 << format.bits, dtype=np.uint8 if format.bits <= 8 else np.uint32).reshape(2, -1)
    assert_same(cuda.decode(on_device(codes), format), reference.decode(codes, format), format.name)


def test_decode_refuses_what_is_no_code() -> None:
    with pytest.raises(ValueError, match="float4_e2m1fn has codes 0 to 15; got 16"):
        cuda.decode(torch.tensor([3, 16], dtype=torch.uint8, device=DEVICE), E2M1FN)
    with pytest.raises(ValueError, match=r"codes of float4_e2m1fn are uint8; got torch\.int32"):
        cuda.decode(torch.zeros(2, dtype=torch.int32, device=DEVICE), E2M1FN)


@pytest.mark.parametrize("scale", [1.0, 3.7, 2.0**-20, 1e-40, 3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [E4M3FN, E5M2, E4M3FNUZ, E8M0FNU], ids=by_name)
def test_quantize(format: Format, dtype: np.dtype, scale: float) -> None:
    x = narrowed(inputs(format), dtype)
    for overflow in (Overflow.SATURATE, Overflow.NONE):
        expected = reference.quantize(x, format, scale=scale, overflow=overflow)
        assert_same(cuda.quantize(on_device(x), format, scale=scale, overflow=overflow), expected)


def test_quantize_draws_by_position_and_offset() -> None:
    x = np.random.default_rng(0).standard_normal((3, 701)).astype(np.float32)
    modes: dict[str, Any] = {"scale": 5.0, "rounding": Rounding.STOCHASTIC, "seed": 9, "offset": 6}
    assert_same(cuda.quantize(on_device(x), E2M1FN, **modes), reference.quantize(x, E2M1FN, **modes))


@pytest.mark.parametrize("scale", [0.0, -1.0, INF, NAN, 1e-50, 1e39])
def test_a_scale_is_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="a scale is positive and finite"):
        cuda.quantize(torch.ones(2, device=DEVICE), E4M3FN, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax(dtype: np.dtype) -> None:
    wide = dtype if dtype == np.float64 else np.dtype(np.float32)
    x = np.random.default_rng(0).standard_normal(20_000 if COUNT > 5000 else 3000).astype(dtype)
    for place, value in ((0, -9.0), (x.size - 1, 10.0), (7, -INF), (1500, NAN), (3, INF)):
        x[place] = value
        assert_same(cuda.amax(on_device(x)), np.abs(x).max().astype(wide), str(value))
    assert_same(cuda.amax(on_device(x[:0])), wide.type(0))
    tiny = np.array([0, -1e-45 if dtype == np.float32 else -1e-7], dtype)
    assert_same(cuda.amax(on_device(tiny)), np.abs(tiny).max().astype(wide))


@pytest.mark.parametrize("shape", [(1, 1), (65, 130), (3, 64), (64, 3), (0, 3), (3, 0)])
@pytest.mark.parametrize("rounding", [Rounding.NEAREST_EVEN, Rounding.STOCHASTIC])
def test_encode_transposed(shape: tuple[int, int], rounding: Rounding) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(BFLOAT16)
    modes: dict[str, Any] = {"rounding": rounding, "seed": 2, "offset": 5}
    codes, turned, amax = cuda.encode_transposed(on_device(x), E5M2, scale=1.3, **modes)
    expected = reference.encode(x.astype(np.float32) * np.float32(1.3), E5M2, **modes)
    assert_same(codes, expected)
    assert_same(turned, expected.T)
    assert_same(amax, np.abs(x.astype(np.float32)).max(initial=0))


def test_encode_transposed_says_what_it_takes() -> None:
    with pytest.raises(
        ValueError, match=r"takes a float32, bfloat16 or float16 matrix .* got torch.float32 of shape \(4,\)"
    ):
        cuda.encode_transposed(torch.ones(4, device=DEVICE), E5M2)


def test_any_strides_and_shapes() -> None:
    x = np.random.default_rng(0).standard_normal((6, 10, 14)).astype(np.float32)
    tensor = on_device(x)
    views = [
        (tensor.permute(2, 0, 1), x.transpose(2, 0, 1)),
        (tensor[::2, 1:, ::3], x[::2, 1:, ::3]),
        (tensor[0, 0, 0], x[0, 0, 0]),
        (tensor[:0], x[:0]),
        (tensor[:1].expand(4, 10, 14), np.broadcast_to(x[:1], (4, 10, 14))),
        (torch.view_as_complex(tensor[..., :2].contiguous()).conj().imag, -x[..., 1]),
        (tensor.clone().requires_grad_(), x),
    ]
    for view, array in views:
        assert_same(cuda.encode(view, E4M3FN), reference.encode(np.asarray(array), E4M3FN))
        assert_same(cuda.quantize(view, E4M3FN, scale=2.5), reference.quantize(np.asarray(array), E4M3FN, scale=2.5))


@pytest.mark.parametrize("format", [format for format in SIGNED if not format.has_nan], ids=by_name)
def test_nan_is_refused_by_the_formats_without_one(format: Format) -> None:
    x = torch.tensor([1.0, INF, NAN], device=DEVICE)
    for cast in (cuda.encode, cuda.quantize):
        assert cast(x[:2], format).shape == (2,)
        with pytest.raises(ValueError, match=f"{format.name} has no NaN, but the input holds one"):
            cast(x, format)
        with pytest.raises(ValueError, match=f"{format.name} has no NaN"):
            cast(x.double(), format)
    with pytest.raises(ValueError, match=f"{format.name} has no NaN"):
        cuda.encode_transposed(x[None], format)


def test_stochastic_rounding_asks_for_a_seed_in_range() -> None:
    x = torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match="stochastic rounding draws from a seed"):
        cuda.encode(x, E4M3FN, rounding=Rounding.STOCHASTIC)
    with pytest.raises(ValueError, match="seed is an integer from 0 to 18446744073709551615; got -1"):
        cuda.encode(x, E4M3FN, rounding=Rounding.STOCHASTIC, seed=-1)
    with pytest.raises(ValueError, match="offset is an integer"):
        cuda.encode(x, E4M3FN, rounding=Rounding.STOCHASTIC, seed=0, offset=2**63 - 4)


def test_what_is_no_float_is_refused() -> None:
    for cast in (lambda x: cuda.encode(x, E4M3FN), cuda.amax):
        with pytest.raises(ValueError, match=r"takes float32, float64, float16 or bfloat16; got torch\.int64"):
            cast(torch.ones(4, dtype=torch.int64, device=DEVICE))
