"""Rounded master weights, against the neighbours that NumPy and ml_dtypes find, exact fractions, and `octavo.reference`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from octavo import formats, reference
from octavo.formats import BFLOAT16, E4M3FN, E5M2, E5M2FNUZ, FLOAT16, FORMATS, TF32, Format, Specials
from octavo.kernels.master import round_in_place
from octavo.rounding import Overflow, Rounding, random_bits
from octavo.torch.masters import round_masters

DTYPES: dict[Format, Any] = {
    FLOAT16: np.float16,
    BFLOAT16: ml_dtypes.bfloat16,
    **{row: getattr(ml_dtypes, name) for name, row in FORMATS.items() if row.bits == 8 and hasattr(ml_dtypes, name)},
}
DTYPES.pop(formats.E8M0FNU)
HALF_OF_6 = Format(name="float16_e6m9", exponent_bits=6, mantissa_bits=9, bias=31, specials=Specials.IEEE)
every_format = pytest.mark.parametrize("format", DTYPES, ids=lambda format: format.name)

Floats = npt.NDArray[np.float32]


def rounded(x: Floats, format: Format, *, seed: int = 0, step: int = 0) -> Floats:
    """What becomes of `x` as the only parameter."""
    parameter = nn.Parameter(torch.from_numpy(x.copy()))
    round_masters([parameter], format, seed=seed, step=step)
    return parameter.detach().numpy()


def bits(x: Floats) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32)


def same(one: Floats, other: Floats) -> bool:
    """Equal bits, NaNs being one."""
    return bool(np.all((bits(one) == bits(other)) | (np.isnan(one) & np.isnan(other))))


def between(format: Format, count: int, seed: int = 0) -> Floats:
    """Random float32 of either sign, from far below the format's smallest value up to its largest."""
    generator = np.random.default_rng(seed)
    lowest, highest = np.log2(format.smallest_subnormal) - 4, np.log2(format.max)
    magnitude = 2.0 ** generator.uniform(max(lowest, -149), highest, count)
    return np.minimum(magnitude, format.max).astype(np.float32) * generator.choice(np.float32([-1, 1]), count)


def neighbours(x: Floats, dtype: Any) -> tuple[Floats, Floats]:
    """The values of the type on either side of each x, the lower magnitude first; x itself twice where the type holds it."""
    magnitude = np.abs(x)
    near = magnitude.astype(dtype)
    below, above = np.nextafter(near, dtype(0)), np.nextafter(near, ml_dtypes.finfo(dtype).max)
    value, below, above = (a.astype(np.float32) for a in (near, below, above))
    low = np.where(value > magnitude, below, value)
    high = np.where(value < magnitude, above, value)
    return np.copysign(low, x), np.copysign(high, x)


@every_format
def test_every_value_of_the_format_stays(format: Format) -> None:
    codes = np.arange(1 << format.bits).astype(f"u{format.bits // 8}")
    with np.errstate(invalid="ignore"):
        values = codes.view(DTYPES[format]).astype(np.float32)
    for step in range(3):
        assert same(rounded(values, format, step=step), values)
    assert np.isnan(values).any()
    assert np.isinf(values).sum() == (2 if format.has_inf else 0)
    assert bits(values)[format.sign_mask] == 1 << 31 or not format.has_negative_zero


@every_format
def test_other_values_become_one_of_their_neighbours(format: Format) -> None:
    x = between(format, 50_000)
    low, high = neighbours(x, DTYPES[format])
    assert np.all(np.abs(low) <= np.abs(x))
    assert np.all(np.abs(x) <= np.abs(high))
    got = rounded(x, format, seed=1)
    if not format.has_negative_zero:
        low = np.where(low == 0, np.float32(0), low)
    at_low, at_high = bits(got) == bits(low), bits(got) == bits(high)
    assert np.all(at_low | at_high)
    apart = low != high
    assert 0.3 < at_high[apart].mean() < 0.7


@pytest.mark.parametrize("format", [FLOAT16, BFLOAT16, E5M2], ids=lambda format: format.name)
@pytest.mark.parametrize("where", [1.0, 1.7, 3e-5, 3e-7], ids=str)
@pytest.mark.parametrize("fraction", [2.0**-9, 0.25, 0.5, 0.9], ids=str)
def test_the_mean_of_many_draws_is_the_value(format: Format, where: float, fraction: float) -> None:
    draws = 1 << 14
    low, high = (float(a[0]) for a in neighbours(np.float32([where * 1.0001]), DTYPES[format]))
    x = np.float32(low + fraction * (high - low))
    got = rounded(np.full(draws, x), format, seed=2).astype(np.float64)
    assert set(np.unique(got)) == {low, high}
    likely = (float(x) - low) / (high - low)
    sigma = (high - low) * np.sqrt(likely * (1 - likely) / draws)
    assert abs(got.mean() - float(x)) < 5 * sigma


@pytest.mark.parametrize("format", [FLOAT16, BFLOAT16, E5M2, HALF_OF_6], ids=lambda format: format.name)
def test_up_is_exactly_as_likely_as_the_fraction(format: Format) -> None:
    """Each draw, in exact fractions."""
    x, seed, step = between(format, 1000, seed=3), 5, 77
    got = rounded(x, format, seed=seed, step=step)
    draws = random_bits(seed << 32 | step, 1 << 62, x.size)
    for value, result, draw in zip(x, got, draws, strict=True):
        magnitude = Fraction(float(abs(value)))
        ulp = Fraction(2) ** (max(int(np.frexp(value)[1]) - 1, format.emin) - format.mantissa_bits)
        whole, rest = divmod(magnitude, ulp)
        up = int(rest / ulp * 2**32) + int(draw) >= 2**32
        assert Fraction(float(abs(result))) == (whole + up) * ulp
        assert np.signbit(result) == np.signbit(value)


@pytest.mark.parametrize("format", [*DTYPES, HALF_OF_6], ids=lambda format: format.name)
def test_any_float32_goes_as_the_reference_says(format: Format) -> None:
    pattern = np.random.default_rng(4).integers(0, 1 << 32, 60_000, dtype=np.uint32).view(np.float32)
    top = np.float32(format.max)
    edges = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, -1e-45, 1.1e-38, top, -top])
    x = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), between(format, 20_000, seed=5), pattern])
    modes: dict[str, Any] = {"rounding": Rounding.STOCHASTIC, "overflow": Overflow.SATURATE_FINITE}
    expected = reference.quantize(x, format, **modes, seed=0xFFFFFFFE_FFFFFFFF, offset=1 << 62)
    assert same(rounded(x, format, seed=0xFFFFFFFE, step=0xFFFFFFFF), expected)


@pytest.mark.parametrize("offset", [1, 2, 3, (1 << 34) - 5])
def test_draws_go_by_the_place_from_any_offset_on(offset: int) -> None:
    x = between(E4M3FN, 40_000, seed=7)
    modes: dict[str, Any] = {"rounding": Rounding.STOCHASTIC, "overflow": Overflow.SATURATE_FINITE}
    expected = reference.quantize(x, E4M3FN, **modes, seed=9, offset=offset)
    round_in_place(x.ctypes.data, x.size, E4M3FN, seed=9, offset=offset)
    assert same(x, expected)


@every_format
def test_finite_overflow_saturates(format: Format) -> None:
    top = np.float32(format.max)
    beyond = np.nextafter(top, np.float32(np.inf))
    x = np.repeat(np.float32([beyond, min(float(top) * 1.01, 3.402e38), 3.402e38]), 50)
    assert np.array_equal(rounded(x, format), np.full(x.size, top))
    assert np.array_equal(rounded(-x, format), np.full(x.size, -top))


def test_subnormals_are_right_though_the_processor_flushes_them() -> None:
    x = between(BFLOAT16, 20_000, seed=6)
    x = np.where(np.arange(x.size) % 2, x, (x.view(np.uint32) & np.uint32(0x807FFFFF)).view(np.float32))
    modes: dict[str, Any] = {"rounding": Rounding.STOCHASTIC, "overflow": Overflow.SATURATE_FINITE}
    expected = bits(reference.quantize(x, BFLOAT16, **modes, seed=0, offset=1 << 62))
    parameter = torch.from_numpy(x)
    flushes = torch.set_flush_denormal(True)
    try:
        round_masters([parameter], BFLOAT16, seed=0, step=0)
    finally:
        torch.set_flush_denormal(False)
    assert flushes or sys.platform != "linux"
    assert np.array_equal(bits(parameter.numpy()), expected)


@pytest.mark.parametrize("size", [0, 1, 3, 511, 513, 16385, 100_003])
def test_threads_change_no_bit(size: int) -> None:
    x = np.random.default_rng(7).standard_normal(size).astype(np.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(rounded(x, FLOAT16, seed=8))
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(bits(found[0]), bits(found[1]))


def test_each_parameter_and_step_and_seed_has_draws_of_its_own() -> None:
    x = torch.full((4096,), 1 + 2.0**-11)

    def run(seed: int, step: int, count: int = 3) -> list[torch.Tensor]:
        found = [x.clone() for _ in range(count)]
        round_masters(found, FLOAT16, seed=seed, step=step)
        return found

    for one, other in zip(run(3, 9), run(3, 9), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(run(3, 9)[1], run(3, 9, count=2)[1])
    streams = [*run(3, 9), *run(3, 10), *run(4, 9), *run(9, 3)]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            agree = (one == other).float().mean().item()
            assert abs(agree - 0.5) < 5 / 128  # sigma = sqrt(4096) / 2 / 4096


def test_draws_are_those_of_the_documented_position() -> None:
    x = np.random.default_rng(10).standard_normal(1000).astype(np.float32)
    parameters = [torch.zeros(5), torch.zeros(0), torch.from_numpy(x.copy())]
    round_masters(parameters, E5M2, seed=11, step=12)
    modes: dict[str, Any] = {"rounding": Rounding.STOCHASTIC, "seed": 11 << 32 | 12, "offset": (1 << 62) + (2 << 40)}
    assert np.array_equal(parameters[2].numpy(), reference.quantize(x, E5M2, **modes))


@pytest.mark.parametrize("view", ["transposed", "strided", "offset"])
def test_a_view_is_rounded_as_a_copy_of_it_is(view: str) -> None:
    base = torch.randn(40, 60)
    x = {"transposed": base.T, "strided": base[::2, ::3], "offset": base[3:, :]}[view]
    around = base.clone()
    copy = x.clone(memory_format=torch.contiguous_format)
    round_masters([copy], FLOAT16, seed=1, step=1)
    round_masters([x], FLOAT16, seed=1, step=1)
    assert torch.equal(x, copy)
    assert not torch.equal(base, around)
    if view == "strided":
        assert torch.equal(base[1::2], around[1::2])


def test_autograd_sees_that_a_parameter_changed() -> None:
    parameter = nn.Parameter(torch.randn(4))
    loss = parameter.square().sum()
    round_masters([parameter], FLOAT16, seed=0, step=0)
    assert parameter.is_leaf
    assert parameter.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_updates_too_small_for_float16_arrive_on_average() -> None:
    size, steps, update = 4096, 64, 2.0**-14
    parameter = nn.Parameter(torch.ones(size))
    nearest = torch.ones(size)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.full((size,), update)
    for step in range(steps):
        optimizer.step()
        round_masters([parameter], FLOAT16, seed=0, step=step)
        nearest = (nearest - update).half().float()
    assert torch.equal(nearest, torch.ones(size))
    assert torch.equal(parameter, parameter.half().float())
    # Just below 1 a last place is 2**-11: a binomial of p = 1/8 in each step.
    ulp = 2.0**-11
    sigma = ulp * (steps * 7 / 64 / size) ** 0.5
    assert abs(parameter.mean().item() - (1 - steps * update)) < 5 * sigma


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, dtype=torch.bfloat16), r"'bad' is bfloat16: keep it in float32 \(model.float\(\)\)"),
        (torch.ones(2, dtype=torch.float16), "'bad' is float16: keep it in float32"),
        (torch.ones(2, dtype=torch.float64), "'bad' is float64: keep it in float32"),
        (torch.ones(2, dtype=torch.complex64), "'bad' is complex64: leave it out"),
        (torch.ones(2, dtype=torch.int64), "'bad' is int64: leave it out"),
        (torch.ones(2, device="meta"), "'bad' is torch.strided on meta"),
        (torch.ones(2).to_sparse(), "'bad' is torch.sparse_coo on cpu"),
        (nn.UninitializedParameter(), "'bad' is a UninitializedParameter"),
        (3.0, "'bad' is a float"),
    ],
)
def test_parameters_of_another_kind_are_named_and_none_changes(tensor: Any, message: str) -> None:
    good = torch.randn(100)
    before = good.clone()
    with pytest.raises(ValueError, match=message):
        round_masters([("good", good), ("bad", tensor)], FLOAT16, seed=0, step=0)
    if isinstance(tensor, torch.Tensor):
        with pytest.raises(ValueError, match=message.replace("'bad'", "number 1")):
            round_masters([good, tensor], FLOAT16, seed=0, step=0)
    assert torch.equal(good, before)


def test_names_change_no_bit() -> None:
    one, other = nn.Linear(30, 20), nn.Linear(30, 20)
    other.load_state_dict(one.state_dict())
    round_masters(one.parameters(), BFLOAT16, seed=1, step=2)
    round_masters(other.named_parameters(), BFLOAT16, seed=1, step=2)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


def test_a_single_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="got a single tensor: put it into a list"):
        round_masters(torch.ones(3), FLOAT16, seed=0, step=0)


WIDE_RANGE = Format(name="wide", exponent_bits=8, mantissa_bits=3, bias=128, specials=Specials.UNSIGNED_ZERO)


@pytest.mark.parametrize(
    "format", [TF32, formats.E8M0FNU, formats.E2M1FN, formats.E3M2FN, WIDE_RANGE], ids=lambda format: format.name
)
def test_formats_that_no_master_can_have_are_refused(format: Format) -> None:
    with pytest.raises(ValueError, match=f"within float32's range; {format.name} is none"):
        round_masters([torch.ones(3)], format, seed=0, step=0)


@pytest.mark.parametrize(
    "wrong", [{"seed": -1, "step": 0}, {"seed": 1 << 32, "step": 0}, {"seed": 0, "step": 1 << 32}], ids=str
)
def test_counters_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"(seed|step) is an integer from 0 to 4294967295"):
        round_masters([torch.ones(3)], FLOAT16, **wrong)


INTERPRETED = """
import numpy as np, torch
from octavo.formats import BFLOAT16, E5M2, FLOAT16
from octavo.torch import masters
generator = np.random.default_rng(0)
values = generator.integers(0, 1 << 32, 700, dtype=np.uint32).view(np.float32)
values = np.concatenate([values, generator.standard_normal(300).astype(np.float32) * np.float32(1e-5)])
for format in (FLOAT16, BFLOAT16, E5M2):
    one, other = torch.from_numpy(values.copy()), torch.from_numpy(values.copy())
    masters._on_cpu(one, format, 3 << 32, masters.FIRST + masters.STRIDE)
    masters._on_cuda(other, format, 3 << 32, masters.FIRST + masters.STRIDE)
    assert torch.equal(one.isnan(), other.isnan()), format.name
    assert torch.equal(one.nan_to_num(7).view(torch.int32), other.nan_to_num(7).view(torch.int32)), format.name
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_gpu_kernels_interpreted_give_the_same_bits() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.stdout == "equal\n", done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("format", [FLOAT16, BFLOAT16, E5M2, E4M3FN, E5M2FNUZ], ids=lambda format: format.name)
def test_a_cuda_device_gives_the_same_bits(format: Format) -> None:
    here = [torch.randn(1000, 33), torch.randn(60).view(6, 10).T]
    there = [tensor.cuda() for tensor in here]
    for tensors in (here, there):
        round_masters(tensors, format, seed=1, step=2)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other.cpu())
