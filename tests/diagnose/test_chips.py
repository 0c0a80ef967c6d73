"""The chips' table: literal figures, and that its rows agree with themselves."""

from __future__ import annotations

import math

import pytest

from octavo.diagnose.chips import CHIPS, Arithmetic, Chip, Scales, get_chip
from octavo.formats import E2M1FN, E4M3FN, E4M3FNUZ, E5M2FNUZ

# Dense TFLOP/s of FP32, TF32, FP16, BF16, FP8, FP6, FP4, and TB/s, from the data sheets; 0 is what there is not.
LITERAL = {
    "cpu": (0.1, 0, 0.1, 0.2, 0, 0, 0, 0.012),
    "sm80": (19.5, 156, 312, 312, 0, 0, 0, 2.039),
    "sm89": (91.6, 183, 362.05, 362.05, 733, 0, 0, 0.864),
    "sm90": (66.9, 494.7, 989.4, 989.4, 1978.9, 0, 0, 3.35),
    "sm100": (80, 1100, 2250, 2250, 4500, 4500, 9000, 8),
    "gfx942": (163.4, 653.7, 1307.4, 1307.4, 2614.9, 0, 0, 5.3),
}
SCALES = {
    "cpu": set(),
    "sm80": set(),
    "sm89": {Scales.TENSOR, Scales.ROW},
    "sm90": {Scales.TENSOR, Scales.ROW, Scales.BLOCKS_128},
    "sm100": {Scales.TENSOR, Scales.ROW, Scales.MX, Scales.NVFP4},
    "gfx942": {Scales.TENSOR, Scales.ROW},
}
every_chip = pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)


def test_the_targets_are_those_of_the_command() -> None:
    assert list(CHIPS) == list(LITERAL) == ["cpu", "sm80", "sm89", "sm90", "sm100", "gfx942"]


@every_chip
def test_the_figures_are_those_of_the_data_sheets(chip: Chip) -> None:
    *rates, bandwidth = LITERAL[chip.name]
    assert {arithmetic: figure.value for arithmetic, figure in chip.peaks.items()} == {
        arithmetic: rate for arithmetic, rate in zip(Arithmetic, rates, strict=True) if rate
    }
    assert chip.bandwidth.value == bandwidth
    assert chip.floor.value == (5.0 if chip.name == "cpu" else 3.0)


@every_chip
def test_every_figure_has_a_source(chip: Chip) -> None:
    figures = [*chip.peaks.values(), chip.bandwidth, chip.floor]
    assert all(len(figure.source) > 20 and "http" not in figure.source for figure in figures)
    assert all(figure.value > 0 for figure in figures)
    assert all(kernel.source for kernel in chip.kernels)


@every_chip
def test_a_rate_doubles_as_the_format_halves(chip: Chip) -> None:
    rate = {arithmetic: figure.value for arithmetic, figure in chip.peaks.items()}
    assert rate[Arithmetic.BF16] >= rate[Arithmetic.FP32]
    if Arithmetic.FP8 in rate:
        assert math.isclose(rate[Arithmetic.FP8], 2 * rate[Arithmetic.BF16], rel_tol=0.02)
        assert math.isclose(rate[Arithmetic.BF16], 2 * rate[Arithmetic.TF32], rel_tol=0.03)
    if Arithmetic.FP4 in rate:
        assert rate[Arithmetic.FP4] == 2 * rate[Arithmetic.FP8]


@every_chip
def test_kernels_are_of_what_the_chip_multiplies(chip: Chip) -> None:
    assert {kernel.scales for kernel in chip.kernels} == SCALES[chip.name]
    for kernel in chip.kernels:
        assert kernel.arithmetic in chip.peaks
        assert {format.bits for format in kernel.formats} == {int(kernel.arithmetic.value[2:])}
        # 16 bytes of codes at least, and whole blocks of scales that are no float32.
        assert kernel.align_k * kernel.formats[0].bits % 128 == 0
        assert kernel.align_n == 16
    keys = [(kernel.formats, kernel.scales) for kernel in chip.kernels]
    assert len(keys) == len(set(keys))


def test_what_only_one_chip_has() -> None:
    mx = {chip.name for chip in CHIPS.values() for kernel in chip.kernels if kernel.scales is Scales.MX}
    assert mx == {"sm100"}
    assert {kernel.align_k % 32 for kernel in CHIPS["sm100"].kernels if kernel.scales is Scales.MX} == {0}
    assert {chip.name for chip in CHIPS.values() if chip.hopper_sums} == {"sm90"}
    assert {chip.name for chip in CHIPS.values() if chip.contracted_last} == {"sm89", "sm90"}
    assert all(kernel.formats == (E4M3FNUZ, E5M2FNUZ) for kernel in CHIPS["gfx942"].kernels)
    assert [kernel.name for kernel in CHIPS["sm100"].kernels if E2M1FN in kernel.formats] == [
        "CUTLASS MXFP4",
        "cuBLASLt NVFP4",
    ]


def test_octavo_calls_one_kernel() -> None:
    called = {(chip.name, kernel.name) for chip in CHIPS.values() for kernel in chip.kernels if kernel.in_octavo}
    assert called == {(name, "cuBLASLt FP8 tensorwise") for name in ("sm89", "sm90", "sm100")}
    assert all(E4M3FN in kernel.formats for kernel in CHIPS["sm90"].kernels)


def test_bytes_of_an_element() -> None:
    assert [arithmetic.bytes for arithmetic in list(Arithmetic)[:4]] == [4, 4, 2, 2]
    with pytest.raises(AssertionError):
        _ = Arithmetic.FP4.bytes


def test_an_unknown_target_is_refused_with_the_nearest() -> None:
    assert get_chip("sm90") is CHIPS["sm90"]
    with pytest.raises(ValueError, match=r"target is one of cpu, sm80, .*; got 'sm_90'; did you mean 'sm90'"):
        get_chip("sm_90")
