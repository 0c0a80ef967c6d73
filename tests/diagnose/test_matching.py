"""Which kernel a GEMM matches, what it costs by hand, and agreement with the code that runs on a device."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from octavo.diagnose import roofline
from octavo.diagnose.chips import CHIPS, Arithmetic
from octavo.diagnose.gemms import Kind, Shape, TracedGemm, Which
from octavo.diagnose.kernels import Runs, kernel_for, scales_of
from octavo.diagnose.matching import MatchedGemm, better_in_bf16, match
from octavo.formats import E2M1FN, E3M4FN, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ
from octavo.recipes import (
    NAMED,
    FormatPair,
    Recipe,
    block_scaling,
    current_scaling,
    deepseek,
    delayed_scaling,
    direct,
    hybrid,
    mxfp4,
    mxfp6,
    mxfp8,
    nvfp4,
    on_hopper,
    rowwise,
    rowwise_high_precision_grad_weight,
)
from octavo.scaling import Block, BlockScale, Current, Delayed, Row, TwoLevel, Unscaled
from octavo.table import Accumulator, Gemm, TensorSpec
from octavo.torch import device
from octavo.torch.device_operands import Matrix

EVERY_RECIPE = [pytest.param(make(), id=name) for name, make in NAMED.items()]
FNUZ = Recipe.from_tensors(
    "fnuz",
    input=TensorSpec(E4M3FNUZ, Current()),
    weight=TensorSpec(E4M3FNUZ, Current()),
    grad_output=TensorSpec(E5M2FNUZ, Current()),
)


def layer(tokens: int, features: int, outputs: int, *, kind: Kind = Kind.LINEAR, batch: int = 1) -> TracedGemm:
    return TracedGemm(
        layer="fc",
        module="fc",
        kind=kind,
        batch=batch,
        tokens=tokens,
        features=features,
        outputs=outputs,
        left_grad=True,
        right_grad=True,
    )


def rows(
    recipe: Recipe | None, target: str, *gemms: TracedGemm, high: Arithmetic = Arithmetic.BF16
) -> tuple[MatchedGemm, ...]:
    return match(gemms or (layer(256, 512, 1024),), recipe, CHIPS[target], high=high)


TENSORWISE, ROWWISE = "cuBLASLt FP8 tensorwise", "CUTLASS FP8 rowwise"
EMULATED, ON_CPU = "emulated: cast + FP32 GEMM", "emulated: cast + BF16 GEMM"


@pytest.mark.parametrize(
    ("recipe", "target", "kernels", "runs"),
    [
        (delayed_scaling(), "sm80", [EMULATED] * 3, ["no"] * 3),
        (delayed_scaling(), "cpu", [ON_CPU] * 3, ["no"] * 3),
        (delayed_scaling(), "sm89", [TENSORWISE] * 3, ["yes"] * 3),
        (current_scaling(), "sm90", [TENSORWISE] * 3, ["yes"] * 3),
        (hybrid(), "sm100", [TENSORWISE] * 3, ["yes"] * 3),
        (delayed_scaling(), "gfx942", [EMULATED] * 3, ["no"] * 3),
        (FNUZ, "gfx942", ["hipBLASLt FP8 tensorwise"] * 3, ["could"] * 3),
        (FNUZ, "sm90", [EMULATED] * 3, ["no"] * 3),
        (direct(), "sm90", [EMULATED] * 3, ["no"] * 3),
        (rowwise(), "sm90", [ROWWISE] * 3, ["could"] * 3),
        (rowwise_high_precision_grad_weight(), "sm90", [ROWWISE, ROWWISE, "BF16"], ["could", "could", "-"]),
        (block_scaling(), "sm90", ["cuBLASLt FP8 blockwise"] * 3, ["could"] * 3),
        (deepseek(), "sm89", [EMULATED] * 3, ["no"] * 3),
        (deepseek(), "sm100", [EMULATED] * 3, ["no"] * 3),
        (mxfp8(), "sm100", ["cuBLASLt MXFP8"] * 3, ["could"] * 3),
        (mxfp8(), "sm90", [EMULATED] * 3, ["no"] * 3),
        (mxfp8(fp8_format=FormatPair.HYBRID), "sm100", ["cuBLASLt MXFP8"] * 3, ["could"] * 3),
        (mxfp6(), "sm100", ["CUTLASS MXFP6"] * 3, ["could"] * 3),
        (mxfp4(), "sm100", ["CUTLASS MXFP4"] * 3, ["could"] * 3),
        (nvfp4(), "sm100", ["cuBLASLt NVFP4"] * 3, ["could"] * 3),
        (NAMED["bf16"](), "sm90", ["BF16"] * 3, ["-"] * 3),
        (NAMED["tf32"](), "sm80", ["TF32"] * 3, ["-"] * 3),
        (NAMED["tf32"](), "cpu", [EMULATED] * 3, ["-"] * 3),
        (None, "sm90", ["BF16"] * 3, ["-"] * 3),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_kernel_of_each_gemm(recipe: Recipe | None, target: str, kernels: list[str], runs: list[str]) -> None:
    found = rows(recipe, target)
    assert [row.which for row in found] == list(Which)
    assert [row.kernel for row in found] == kernels
    assert [row.runs.value for row in found] == runs


@pytest.mark.parametrize(
    ("recipe", "target", "reason"),
    [
        (delayed_scaling(), "cpu", "cpu has no units for 8 bits"),
        (delayed_scaling(), "gfx942", "gfx942 multiplies FNUZ formats (float8_e4m3fnuz), not OCP's float8_e4m3fn x float8_e4m3fn"),
        (direct(), "sm90", "sm90 does not multiply E5M2 by E5M2"),
        (mxfp8(), "sm90", "sm90 takes no scales as of e4m3fn 1x32 rceil x e4m3fn 1x32 rceil, only one a tensor, one a row, blocks of 128"),
        (nvfp4(), "sm90", "sm90 has no kernel for float4_e2m1fn x float4_e2m1fn"),
        (rowwise(), "sm90", "Octavo emulates operands with such scales (one a row)"),
        (on_hopper(delayed_scaling()), "sm100", "hopper-fast sums are Hopper's alone; give the GEMM Accumulator.FLOAT32"),
        (on_hopper(rowwise()), "sm90", "Octavo refuses hopper-fast sums of these operands on a GPU"),
        (on_hopper(delayed_scaling()), "sm90", ""),
        (Recipe(output=Gemm(left=TensorSpec(E4M3FN))), "sm90", "the recipe leaves its right operand in high precision"),
        (Recipe(), "sm90", "the recipe leaves both operands in high precision"),
    ],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_the_reason_is_in_words(recipe: Recipe, target: str, reason: str) -> None:
    assert rows(recipe, target)[0].reason == reason


def operand(spec: TensorSpec) -> Matrix:
    """What the device's code would hold of a 16x16 operand."""
    codes, one = torch.zeros(16, 16, dtype=torch.uint8), torch.ones(1)
    match spec.scaling:
        case Unscaled() | Current() | Delayed():
            return Matrix(codes, spec.format, one)
        case Row():
            return Matrix(codes, spec.format, rows=torch.ones(16))
        case Block(scale=BlockScale.FLOAT32):
            return Matrix(codes, spec.format, blocks=torch.ones(1, 1))
        case Block():
            return Matrix(codes.bfloat16())
        case TwoLevel():
            return Matrix(codes.bfloat16(), factor=one)


@pytest.mark.parametrize("recipe", EVERY_RECIPE)
@pytest.mark.parametrize("target", ["sm89", "sm90", "sm100"])
def test_yes_is_what_the_device_sends_to_its_cores(recipe: Recipe, target: str) -> None:
    for row in rows(recipe, target):
        gemm: Gemm = getattr(recipe, row.which.value)
        native = False
        if gemm.left is not None and gemm.right is not None and gemm.left.format.bits <= 8:
            native = device._for_cores(operand(gemm.left), operand(gemm.right))
        assert (row.runs is Runs.YES) == native


@pytest.mark.parametrize("recipe", EVERY_RECIPE)
@pytest.mark.parametrize("target", CHIPS)
def test_every_recipe_works_on_every_chip(recipe: Recipe, target: str) -> None:
    kinds = [layer(33, 65, 17, kind=kind, batch=1 if kind.flat else 4) for kind in Kind]
    for row in rows(recipe, target, *kinds):
        assert row.kernel.startswith("emulated") == (row.kernel not in known(target))
        assert (row.runs in (Runs.YES, Runs.COULD)) == (row.kernel in {kernel.name for kernel in CHIPS[target].kernels})
        assert bool(row.reason) == (row.runs is not Runs.YES)
        assert all(math.isfinite(cost.seconds) and cost.seconds > 0 for cost in (row.bf16, row.recipe, row.octavo))
        assert row.octavo.seconds >= row.recipe.seconds or row.runs is Runs.COULD
        assert row.octavo == row.recipe or row.runs in (Runs.COULD, Runs.HIGH) or target == "sm100"
        assert row.bf16.flops == 2 * row.batch * math.prod(row.shape)
        assert row.padding == (0, 0, 0) or row.runs in (Runs.YES, Runs.COULD)


def known(target: str) -> set[str]:
    return {kernel.name for kernel in CHIPS[target].kernels} | {arithmetic.value for arithmetic in CHIPS[target].peaks}


@pytest.mark.parametrize("kind", [Kind.BATCHED, Kind.CONVOLUTION, Kind.ATTENTION])
def test_only_plain_products_reach_the_cores_in_octavo(kind: Kind) -> None:
    found = rows(delayed_scaling(), "sm90", layer(256, 512, 1024, kind=kind, batch=8))
    assert {row.runs for row in found} == {Runs.COULD}
    assert {row.kernel for row in found} == {TENSORWISE}
    assert kind.value in found[0].reason
    (conv, *_) = rows(delayed_scaling(), "cpu", layer(256, 512, 1024, kind=kind))
    assert conv.kernel == EMULATED  # the CPU's bfloat16 units multiply linear layers alone


def test_padding_is_of_the_contracted_axis_and_the_columns() -> None:
    found = {row.which: row.padding for row in rows(delayed_scaling(), "sm90", layer(33, 784, 10))}
    assert found == {Which.OUTPUT: (0, 0, 6), Which.GRAD_INPUT: (0, 6, 0), Which.GRAD_WEIGHT: (0, 15, 0)}
    found = {row.which: row.padding for row in rows(mxfp8(), "sm100", layer(33, 784, 10))}
    assert found == {Which.OUTPUT: (0, 16, 6), Which.GRAD_INPUT: (0, 22, 0), Which.GRAD_WEIGHT: (0, 31, 0)}
    assert {row.padding for row in rows(delayed_scaling(), "sm80", layer(33, 784, 10))} == {Shape(0, 0, 0)}


def test_a_large_layer_on_hopper_by_hand() -> None:
    n = 4096
    output, grad_input, grad_weight = rows(delayed_scaling(), "sm90", layer(n, n, n))
    flops, elements = 2 * n**3, n * n
    assert output.bf16.seconds == pytest.approx(flops / 989.4e12)
    assert output.bf16.intensity == pytest.approx(flops / (3 * 2 * elements))
    cast = 3 * elements / 3.35e12  # two bytes read, one written
    product = flops / 1978.9e12
    assert output.recipe.seconds == pytest.approx(2 * cast + product, rel=1e-6)
    # grad_output is cast, the weight's codes are transposed; then both are.
    turn = 2 * elements / 3.35e12
    assert grad_input.recipe.seconds == pytest.approx(cast + turn + product, rel=1e-6)
    assert grad_weight.recipe.seconds == pytest.approx(2 * turn + product, rel=1e-6)
    assert output.recipe.bytes == pytest.approx(2 * 3 * elements + 2 * elements + 2 * elements, rel=1e-6)
    assert output.ratio == pytest.approx(output.bf16.seconds / output.recipe.seconds)
    assert 1.3 < output.ratio < 2
    assert better_in_bf16((output, grad_input, grad_weight)) == ()


def test_a_cast_by_its_own_amax_reads_twice() -> None:
    n = 4096
    delayed, current = (rows(recipe, "sm90", layer(n, n, n))[0] for recipe in (delayed_scaling(), current_scaling()))
    assert current.recipe.bytes - delayed.recipe.bytes == 2 * 2 * n * n
    assert current.recipe.seconds - delayed.recipe.seconds == pytest.approx(2 * 2 * n * n / 3.35e12)


def test_codes_that_differ_are_cast_again() -> None:
    n = 4096
    output, grad_input, grad_weight = rows(mxfp8(), "sm100", layer(n, n, n))
    held = n * n + n * n / 32  # a byte an element, and one for 32
    expected = 2 * (2 * n * n + held) + 2 * held + 2 * n * n
    assert {row.recipe.bytes for row in (output, grad_input, grad_weight)} == {expected}


def test_four_bits_are_half_a_byte() -> None:
    n = 4096
    (output, *_) = rows(mxfp4(), "sm100", layer(n, n, n))
    held = n * n / 2 + n * n / 32
    assert output.recipe.bytes == 2 * (2 * n * n + held) + 2 * held + 2 * n * n
    assert output.recipe.seconds == pytest.approx(2 * (2 * n * n + held) / 8e12 + 2 * n**3 / 9000e12)


@pytest.mark.parametrize(
    ("spec", "bytes"),
    [
        (TensorSpec(E4M3FN, Current()), 40 * 200 + 4),
        (TensorSpec(E5M2, Row()), 40 * 200 + 4 * 40),
        (TensorSpec(E4M3FN, Block(shape=(1, 128))), 40 * 200 + 4 * 40 * 2),
        (TensorSpec(E4M3FN, Block(shape=(128, 128))), 40 * 200 + 4 * 2),
        (TensorSpec(E4M3FN, Block(shape=(1, 32), scale=BlockScale.RCEIL)), 40 * 200 + 40 * 7),
        (TensorSpec(E2M1FN, TwoLevel(shape=(16, 16))), 40 * 200 / 2 + 40 * 13 + 4),
    ],
    ids=str,
)
def test_bytes_of_codes_and_scales(spec: TensorSpec, bytes: float) -> None:
    assert roofline.held_bytes(spec, 3, 40, 200) == 3 * bytes


def test_blackwell_needs_no_transposed_copy() -> None:
    n = 4096
    *_, grad_weight = rows(delayed_scaling(), "sm100", layer(n, n, n))
    assert grad_weight.recipe.seconds == pytest.approx(2 * n**3 / 4500e12)
    turned = 2 * 2 * n * n / 8e12  # by Octavo, all the same
    assert grad_weight.octavo.seconds == pytest.approx(turned + 2 * n**3 / 4500e12)


def test_emulation_on_a_gpu_by_hand() -> None:
    n = 4096
    output, grad_input, _ = rows(delayed_scaling(), "sm80", layer(n, n, n))
    memory = 2.039e12
    one = (2 + 1) * n * n / memory, (1 + 4) * n * n / memory  # cast, decoded
    product = 2 * n**3 / 19.5e12
    assert output.recipe.seconds == pytest.approx(2 * sum(one) + product, rel=1e-6)
    assert grad_input.recipe.seconds == pytest.approx(sum(one) + one[1] + product, rel=1e-6)
    assert output.octavo == output.recipe


def test_emulation_on_the_cpu_by_hand() -> None:
    n = 1024
    output, _, grad_weight = rows(delayed_scaling(), "cpu", layer(n, n, n))
    product = 2 * n**3 / 0.2e12
    assert output.recipe.seconds == pytest.approx(2 * 4 * n * n / 0.012e12 + product)
    assert grad_weight.recipe.seconds == pytest.approx(product)


def test_tiny_layers_pay_the_floor_of_each_kernel() -> None:
    found = rows(current_scaling(), "sm90", layer(8, 16, 16))
    assert [row.bf16.seconds for row in found] == [pytest.approx(3e-6)] * 3
    # Two amaxes, two casts and the product; one of each, a copy and the product; two copies and the product.
    assert [row.recipe.seconds for row in found] == [pytest.approx(x) for x in (15e-6, 12e-6, 9e-6)]
    assert better_in_bf16(found) == ("fc",)


def test_a_result_that_is_cast_costs_a_sweep() -> None:
    n = 4096
    spec = TensorSpec(E4M3FN, Delayed())
    bare = Recipe.from_tensors(input=spec, weight=spec, grad_output=spec)
    stored = Recipe.from_tensors(input=spec, weight=spec, grad_output=spec, output=spec)
    one, other = (rows(recipe, "sm90", layer(n, n, n))[0].recipe for recipe in (bare, stored))
    assert other.seconds - one.seconds == pytest.approx(4 * n * n / 3.35e12)


@pytest.mark.parametrize(
    ("high", "rate", "width"), [(Arithmetic.FP32, 66.9, 4), (Arithmetic.BF16, 989.4, 2), (Arithmetic.FP16, 989.4, 2)]
)
def test_precisions_without_a_recipe(high: Arithmetic, rate: float, width: int) -> None:
    n = 4096
    found = rows(None, "sm90", layer(n, n, n), high=high)
    assert {row.kernel for row in found} == {high.value}
    assert {row.reason for row in found} == {f"everything is in {high.value}"}
    assert found[0].recipe.seconds == pytest.approx(2 * n**3 / (rate * 1e12))
    assert found[0].recipe.bytes == 3 * width * n * n
    assert better_in_bf16(found) == ()


def test_a_precision_that_the_chip_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="high precision on cpu is one of FP32, FP16, BF16; got TF32"):
        rows(None, "cpu", high=Arithmetic.TF32)


def test_spared_layers_stay_in_bf16_and_say_why() -> None:
    big, small = layer(4096, 4096, 4096), replace(layer(8, 8, 8), layer="last")
    found = match((big, small), delayed_scaling(), CHIPS["sm90"], spared=lambda one: "exempt" * (one.layer == "last"))
    last = [row for row in found if row.layer == "last"]
    assert {(row.kernel, row.runs, row.reason) for row in last} == {("BF16", Runs.HIGH, "exempt")}
    assert all(row.recipe == row.bf16 == row.octavo for row in last)
    assert better_in_bf16(found) == ()


def test_the_sum_of_the_three_decides() -> None:
    found = rows(delayed_scaling(), "sm90", layer(2048, 2048, 2048))
    slow = tuple(
        replace(row, recipe=replace(row.recipe, seconds=1.0)) if row.which is Which.OUTPUT else row for row in found
    )
    assert better_in_bf16(found) == ()
    assert better_in_bf16(slow) == ("fc",)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (Block(shape=(128, 128)), Block(shape=(128, 128)), None),
        (Block(shape=(1, 64)), Block(shape=(1, 64)), None),
        (Block(shape=(1, 32), scale=BlockScale.FLOAT32), Block(shape=(1, 32), scale=BlockScale.RCEIL), None),
        (Row(), Delayed(), "one a row"),
        (TwoLevel(shape=(1, 16)), TwoLevel(shape=(16, 16)), "NVFP4, 1x16"),
        (Unscaled(), Current(), "one a tensor"),
        (Row(), Block(shape=(1, 128)), None),
    ],
    ids=str,
)
def test_pairs_of_scales(left: object, right: object, expected: str | None) -> None:
    found = scales_of(left, right)  # type: ignore[arg-type]
    assert (None if found is None else found.value) == expected


@pytest.mark.parametrize(
    ("left", "right", "target", "kernel"),
    [(E4M3FN, E5M2, "sm89", True), (E5M2, E5M2, "sm89", False), (E5M2FNUZ, E5M2FNUZ, "gfx942", True), (E3M4FN, E4M3FN, "sm90", False),
     (E4M3FN, E2M1FN, "sm100", False)],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_pairs_of_formats(left: object, right: object, target: str, kernel: bool) -> None:
    row = Gemm(left=TensorSpec(left, Current()), right=TensorSpec(right, Current()))  # type: ignore[arg-type]
    assert (kernel_for(row, Kind.LINEAR, CHIPS[target], Arithmetic.BF16).kernel is not None) == kernel


def test_bfloat16_out_is_no_obstacle() -> None:
    recipe = replace(delayed_scaling(), output=replace(delayed_scaling().output, accumulator=Accumulator.BFLOAT16_OUT))
    assert rows(recipe, "sm89")[0].runs is Runs.YES
