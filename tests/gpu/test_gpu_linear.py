"""A linear layer's three GEMMs on the GPU beside the same on the CPU: results within float32 sums, amaxes and factors equal.

Under the interpreter the functions of `octavo.torch.device` take the CPU's tensors, and torch's `_scaled_mm` there stands in for
tensor cores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from beside_reference import DEVICE, INTERPRETED, MARKS
from torch import Tensor

from octavo.formats import E4M3FN, E5M2
from octavo.recipes import NAMED, Accumulator, FormatPair, Recipe, current_scaling, delayed_scaling, on_hopper
from octavo.rounding import Rounding
from octavo.scaling import Block, BlockScale, Current, Delayed
from octavo.table import Gemm, TensorSpec, Transform
from octavo.torch import device
from octavo.torch.device import Cores
from octavo.torch.device_operands import held_dtype
from octavo.torch.table import seed_of, table_of

pytestmark = MARKS
NATIVE = Cores.FP8 if INTERPRETED else device.tensor_cores(torch.device(DEVICE, 0))
every_cores = pytest.mark.parametrize("cores", sorted({Cores.NONE, NATIVE}, key=lambda cores: cores.value), ids=str)
SHAPES = [(19, 53, 23), (32, 64, 48), (1, 3, 2)] if INTERPRETED else [(519, 1053, 323), (512, 1024, 768), (1, 3, 2)]
NARROW = 2.0**-9 if NATIVE is Cores.HOPPER else 2.0**-18
"""Of the product of norms: how far the sums of FP8 tensor cores may be off."""


class Step(NamedTuple):
    """What the two operators return, on the CPU."""

    output: Tensor
    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    facts: Tensor
    amaxes: Tensor


class Case(NamedTuple):
    """The tensors of one step."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    g: Tensor
    scales: Tensor
    grad_scales: Tensor
    draws: Tensor

    def on(self, place: str) -> Case:
        return Case(*(None if x is None else x.to(place) for x in self))


def case(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, bias: bool = True) -> Case:
    t, i, o = shape
    torch.manual_seed(t)
    x, w, g = torch.randn(t, i), torch.randn(o, i) / 8, torch.randn(t, o) * 0.01
    scales, grad_scales = torch.tensor([375.0, 301.0, 1.7]), torch.tensor([1234.5, 3.0])  # inputs saturate
    return Case(
        x.to(dtype),
        w.to(dtype),
        torch.randn(o).to(dtype) if bias else None,
        g.to(dtype),
        scales,
        grad_scales,
        torch.tensor([7, 3]),
    )


def by_operators(recipe: Recipe, tensors: Case, needs: tuple[bool, bool, bool] = (True, True, True)) -> Step:
    """`octavo::linear` and `octavo::linear_backward` where the tensors are."""
    x, w, bias, g, scales, grad_scales, draws = tensors
    table, key = table_of(recipe.cast_key), recipe.cast_key
    history = scales.new_zeros(0, 2)
    with torch.no_grad():
        y, x_held, w_held, facts = torch.ops.octavo.linear.default(
            x, w, bias, None, None, scales, grad_scales, history, draws, key, x.dtype, False
        )
        held = x_held if table.cast[0] else x, w_held if table.cast[1] else w
        *grads, amaxes = torch.ops.octavo.linear_backward.default(
            g, *held, facts, grad_scales, draws, key, list(needs), False
        )
    return Step(*(found.cpu() for found in (y, *grads, facts, amaxes)))


def by_cores(recipe: Recipe, tensors: Case, cores: Cores, needs: tuple[bool, bool, bool] = (True, True, True)) -> Step:
    """The same by `octavo.torch.device`, where the GPU is."""
    x, w, bias, g, scales, grad_scales, draws = tensors.on(DEVICE)
    table = table_of(recipe.cast_key)
    seed = seed_of(draws, table)
    y, x_held, w_held, facts = device.forward(table, x, w, bias, None, None, scales, x.dtype, seed, cores)
    for held, tensor, cast in ((x_held, x, table.output.left), (w_held, w, table.output.right)):
        simple = cast is not None and cast.simple
        assert held.shape == (tensor.shape if simple else (0,))
        assert not simple or held.dtype is held_dtype(cast, "cuda")
    held = x_held if table.cast[0] else x, w_held if table.cast[1] else w
    *grads, amaxes = device.backward(table, g, *held, facts, grad_scales, needs, seed, cores)
    return Step(*(found.cpu() for found in (y, *grads, facts, amaxes)))


def close(found: Tensor, want: Tensor, left: Tensor, right: Tensor, relative: float, unit: float) -> None:
    """Equal but for the order of sums: by the norms of what is multiplied, which bound those of what a transform makes of it too."""
    assert (found.dtype, found.shape) == (want.dtype, want.shape)
    assert found.is_contiguous()
    norms = left.double().norm(dim=1)[:, None] * right.double().norm(dim=1)
    bound = unit * norms + relative * want.double().abs() + 1e-37
    wrong = (found.double() - want.double()).abs() > bound
    assert not wrong.any(), f"{found[wrong][:5]}, not {want[wrong][:5]}"


def check(recipe: Recipe, tensors: Case, cores: Cores, needs: tuple[bool, bool, bool] = (True, True, True)) -> Step:
    """One step both ways, compared."""
    found, want = by_cores(recipe, tensors, cores, needs), by_operators(recipe, tensors, needs)
    x, w, _, g, *_ = tensors
    unit = 2.0**-18 if cores is Cores.NONE else NARROW
    relative = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[x.dtype]
    results = [row.result for row in (recipe.output, recipe.grad_input, recipe.grad_weight)]
    steps = [relative if spec is None else relative + spec.format.eps for spec in results]  # two sums beside a tie
    close(found.output, want.output, x, w, steps[0], unit)
    if needs[0]:
        close(found.grad_input, want.grad_input, g, w.t(), steps[1], unit)
    if needs[1]:
        close(found.grad_weight, want.grad_weight, g.t(), x.t(), steps[2], unit)
    for one, other, need in zip(found[1:4], want[1:4], needs, strict=True):
        assert one.shape == other.shape
        assert need or not one.numel()
    torch.testing.assert_close(found.grad_bias, want.grad_bias)
    assert found.facts[:4].equal(want.facts[:4])
    assert found.amaxes[:1].equal(want.amaxes[:1])
    torch.testing.assert_close(found.facts, want.facts, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.amaxes, want.amaxes, rtol=1e-3, atol=0)
    return found


@every_cores
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(NAMED))
def test_every_recipe(name: str, shape: tuple[int, int, int], cores: Cores) -> None:
    check(NAMED[name](), case(shape), cores)


@every_cores
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["delayed_scaling", "hybrid", "mxfp8", "deepseek", "nvfp4"])
def test_narrow_layers(name: str, dtype: torch.dtype, bias: bool, cores: Cores) -> None:
    check(NAMED[name](), case(SHAPES[0], dtype, bias), cores)


@every_cores
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("name", ["delayed_scaling", "current_scaling", "rowwise", "deepseek", "mxfp8", "nvfp4"])
def test_empty_layers(name: str, shape: tuple[int, int, int], cores: Cores) -> None:
    check(NAMED[name](), case(shape), cores)


@every_cores
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (False, False, True)], ids=str)
@pytest.mark.parametrize("name", ["delayed_scaling", "hybrid", "mxfp8", "nvfp4"])
def test_what_is_not_wanted_is_not_computed(name: str, needs: tuple[bool, bool, bool], cores: Cores) -> None:
    check(NAMED[name](), case(SHAPES[0]), cores, needs)


E5M2_PAIR = TensorSpec(E5M2, Current(power_of_two=True))
SQUARES = TensorSpec(E4M3FN, Block(shape=(16, 16), scale=BlockScale.RCEIL), Rounding.STOCHASTIC)
FLOATS = TensorSpec(E5M2, Block(shape=(1, 20), scale=BlockScale.FLOAT32))
DELAYED = TensorSpec(E4M3FN, Delayed())
TURNED = TensorSpec(E4M3FN, Current(), Rounding.STOCHASTIC, transform=Transform.HADAMARD)
OTHERS = {
    "e4m3 throughout": current_scaling(fp8_format=FormatPair.E4M3),
    "e5m2 beside e5m2": Recipe.from_tensors(input=E5M2_PAIR, weight=E5M2_PAIR, grad_output=E5M2_PAIR),
    "square blocks": Recipe.from_tensors(input=SQUARES, weight=SQUARES, grad_output=SQUARES),
    "blocks on the right": Recipe(
        output=Gemm(right=FLOATS), grad_input=Gemm(left=FLOATS), grad_weight=Gemm(right=FLOATS)
    ),
    "transformed": Recipe(output=Gemm(left=TURNED, right=TURNED), grad_weight=Gemm(left=TURNED, right=TURNED)),
    "a cast result": Recipe(
        output=Gemm(left=FLOATS, result=FLOATS), grad_input=Gemm(result=TensorSpec(E4M3FN, Current()))
    ),
    "delayed results": Recipe.from_tensors(output=DELAYED, grad_input=DELAYED),
    "bfloat16 out": Recipe(
        output=Gemm(left=E5M2_PAIR, right=TensorSpec(E4M3FN, Current()), accumulator=Accumulator.BFLOAT16_OUT)
    ),
}


@pytest.mark.skipif(NATIVE is Cores.NONE, reason="needs FP8 tensor cores")
@pytest.mark.parametrize(
    ("recipe", "products"),
    [
        (delayed_scaling(), 3),
        (NAMED["hybrid"](), 3),
        (OTHERS["e5m2 beside e5m2"], 0),
        (OTHERS["bfloat16 out"], 1),
        (NAMED["mxfp8"](), 0),
        (NAMED["rowwise"](), 0),
    ],
    ids=lambda value: value.name if isinstance(value, Recipe) else str(value),
)
def test_which_products_the_tensor_cores_run(recipe: Recipe, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch._scaled_mm, []

    def counted(a: Tensor, b: Tensor, **settings: Any) -> Tensor:
        calls.append((a.dtype, b.dtype))
        assert not settings["use_fast_accum"]
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert not a.shape[1] % 16
        assert not b.shape[1] % 16
        return real(a, b, **settings)

    monkeypatch.setattr(torch, "_scaled_mm", counted)
    by_cores(recipe, case(SHAPES[0]), NATIVE)
    assert len(calls) == products
    assert (torch.float8_e5m2, torch.float8_e5m2) not in calls


@every_cores
@pytest.mark.parametrize("name", list(OTHERS))
def test_tables_of_ones_own(name: str, cores: Cores) -> None:
    relative = name == "bfloat16 out"
    tensors = case(SHAPES[0], torch.bfloat16 if relative else torch.float32)
    check(OTHERS[name], tensors, cores)


@every_cores
def test_nan_and_infinity_pass_and_strided_tensors_are_read(cores: Cores) -> None:
    tensors = case(SHAPES[0])
    tensors.x[1, 2], tensors.g[3, 4] = torch.nan, torch.inf
    turned = tensors._replace(x=tensors.x.t().contiguous().t(), w=tensors.w.t().contiguous().t())
    for recipe in (delayed_scaling(), NAMED["hybrid"]()):
        found, want = by_cores(recipe, turned, cores), by_operators(recipe, tensors)
        for one, other in zip(found[:3], want[:3], strict=True):
            assert one.isnan().equal(other.isnan())
            assert one.isinf().equal(other.isinf())
        assert found.facts[2].isnan()


@every_cores
@pytest.mark.parametrize("name", ["delayed_scaling", "block_scaling"])
def test_a_kept_weight_is_used_again(name: str, cores: Cores) -> None:
    recipe, tensors = Recipe.from_tensors(weight=NAMED[name]().output.right), case(SHAPES[0])
    x, w, bias, _, scales, *_ = tensors.on(DEVICE)
    table = table_of(recipe.cast_key)
    y, _, held, facts = device.forward(table, x, w, bias, None, None, scales, x.dtype, 0, cores)
    again = device.forward(table, x, w * 0, bias, held, facts[1:2], scales, x.dtype, 0, cores)
    assert again[0].equal(y)
    assert again[2].equal(held)
    assert again[2].data_ptr() != held.data_ptr()
    assert again[3][1] == facts[1]


def test_sums_of_hopper_are_hopper_s_alone() -> None:
    for cores in (Cores.NONE, Cores.FP8):
        with pytest.raises(ValueError, match="hopper-fast sums of these operands are emulated on the CPU only"):
            by_cores(on_hopper(delayed_scaling()), case(SHAPES[0]), cores)
    with pytest.raises(ValueError, match="hopper-split sums"):
        by_cores(on_hopper(NAMED["mxfp8"](), split_output=True), case(SHAPES[0]), Cores.HOPPER)


if not INTERPRETED:

    @pytest.mark.parametrize("name", list(NAMED))
    def test_the_operators_are_registered_for_the_device(name: str) -> None:
        recipe, tensors = NAMED[name](), case(SHAPES[0])
        on_device: Any = by_operators(recipe, tensors.on(DEVICE))
        for one, other in zip(on_device, by_cores(recipe, tensors, NATIVE), strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("name", ["delayed_scaling", "current_scaling", "mxfp8"])
    def test_layers_train_as_on_the_cpu(name: str) -> None:
        from octavo.torch import Linear, autocast

        recipe, layers = NAMED[name](), []
        for place in ("cpu", DEVICE):
            torch.manual_seed(0)
            layer = Linear(64, 48).to(place)
            for _ in range(3):
                with autocast(recipe=recipe):
                    y = layer(torch.randn(32, 64).to(place))
                y.square().mean().backward()
            layers.append(layer.cpu())
        for key, value in layers[0].state_dict().items():
            torch.testing.assert_close(layers[1].state_dict()[key], value, rtol=2e-2, atol=0)
        torch.testing.assert_close(layers[1].weight.grad, layers[0].weight.grad, rtol=2e-2, atol=1e-3)

    def test_the_hot_path_does_not_wait() -> None:
        tensors = case((256, 256, 256), torch.bfloat16).on(DEVICE)
        recipe = delayed_scaling()
        table = table_of(recipe.cast_key)
        x, w, bias, g, scales, grad_scales, _ = tensors
        for mode in ("default", "error"):  # the first compiles the kernels
            torch.cuda.set_sync_debug_mode(mode)
            try:
                _, *held, facts = device.forward(table, x, w, bias, None, None, scales, x.dtype, 0, NATIVE)
                device.backward(table, g, *held, facts, grad_scales, (True, True, True), 0, NATIVE)
            finally:
                torch.cuda.set_sync_debug_mode("default")
