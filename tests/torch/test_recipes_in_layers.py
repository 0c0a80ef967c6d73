"""Every named recipe in a layer: its three GEMMs against the reference casts and float64 sums, and what is held for backward."""

import copy

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from octavo import recipes, reference
from octavo.formats import E4M3FN, E5M2, TF32
from octavo.recipes import NAMED, Accumulator, Recipe, TensorSpec, on_hopper
from octavo.rounding import Overflow, Rounding
from octavo.scaling import Block, Current, Row
from octavo.torch import Linear, autocast, convert
from octavo.torch import table as tables
from octavo.torch.operands import Cast

every_recipe = pytest.mark.parametrize("recipe", [make() for make in NAMED.values()], ids=list(NAMED))
SHAPES = [(37, 75, 53), (128, 256, 130), (1, 3, 2), (0, 5, 4)]
NUMBER = {"output": 0, "grad_input": 3, "grad_weight": 6}


def values(x: npt.NDArray[np.float32], spec: TensorSpec | None, number: int, seed: int) -> npt.NDArray[np.float64]:
    """An operand matrix (contracted axis last) as a GEMM takes it, in float64."""
    if spec is None:
        return x.astype(np.float64)
    cast = reference.encode_matrix(np.ascontiguousarray(x), spec, seed=seed, offset=number << 56)
    return reference.decode_matrix(cast, spec).astype(np.float64)


def close(
    found: torch.Tensor | None, a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], result: TensorSpec | None
) -> None:
    """Whether found is a @ b.T but for float32 sums, the rounding of scales, and the cast of the result."""
    assert found is not None
    bound = np.abs(a) @ np.abs(b.T) * (a.shape[1] + 8) * 2.0**-24
    want = a @ b.T
    if result is not None:
        bound = bound + np.abs(want) * 2 * result.format.eps + result.format.smallest_subnormal
    assert (np.abs(found.detach().double().numpy() - want) <= bound + 1e-37).all()


@every_recipe
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_three_gemms_are_the_recipe_s(recipe: Recipe, shape: tuple[int, int, int]) -> None:
    t, i, o = shape
    torch.manual_seed(t)
    layer = convert(nn.Sequential(nn.Linear(i, o, bias=False)), recipe)
    x, g = torch.randn(t, i, requires_grad=True), torch.randn(t, o) * 0.01
    y = layer(x)
    y.backward(g)
    weight = layer[0].weight
    seed = tables.seed_of(layer[0].draws, tables.table_of(recipe.cast_key))
    xn, wn, gn = x.detach().numpy(), weight.detach().numpy(), g.numpy()
    for row, found, left, right in (
        ("output", y, xn, wn),
        ("grad_input", x.grad, gn, wn.T),
        ("grad_weight", weight.grad, gn.T, xn.T),
    ):
        gemm = getattr(recipe, row)
        # A tensor whose cells are equal is cast once, with the draws of its first cell, and in its own layout.
        shared = (
            row == "grad_weight"
            and recipe.grad_input.left == gemm.left
            and gemm.left is not None
            and gemm.left.cast_once
        )
        turned = values(gn, gemm.left, NUMBER["grad_input"], seed).T if shared else None
        a = values(left, gemm.left, NUMBER[row], seed) if turned is None else turned
        close(found, a, values(right, gemm.right, NUMBER[row] + 1, seed), gemm.result)


@every_recipe
def test_the_same_step_gives_the_same_bits_however_it_is_run(recipe: Recipe) -> None:
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 24)), recipe)
    x = torch.randn(56, 48)

    def run(how: nn.Module, own: nn.Module) -> list[torch.Tensor]:
        y = how(x)
        y.square().mean().backward()
        return [y.detach(), *(parameter.grad for parameter in own.parameters() if parameter.grad is not None)]

    torch._dynamo.reset()  # recipes are constants to the compiler, which would give up on so many in one process
    eager, twin = copy.deepcopy(model), copy.deepcopy(model)
    once, again = run(eager, eager), run(twin, twin)
    compiled = copy.deepcopy(model)
    traced = run(torch.compile(compiled, backend="aot_eager", fullgraph=True), compiled)
    for one, other, third in zip(once, again, traced, strict=True):
        assert one.equal(other)
        assert one.equal(third)


def test_stochastic_gradients_differ_from_step_to_step_and_repeat_from_a_checkpoint() -> None:
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(64, 64)), recipes.hybrid())
    x = torch.randn(32, 64)

    def gradient(of: nn.Module) -> torch.Tensor:
        of.zero_grad()
        of(x).mul(1e-4).sum().backward()
        grad = of[0].weight.grad  # type: ignore[index]
        assert isinstance(grad, torch.Tensor)
        return grad.clone()

    first = gradient(model)
    state = copy.deepcopy(model.state_dict())
    second = gradient(model)
    assert not first.equal(second)
    resumed = convert(nn.Sequential(nn.Linear(64, 64)), recipes.hybrid())
    resumed.load_state_dict(state)
    assert gradient(resumed).equal(second)
    model.eval()
    before = model[0].draws.clone()
    model(x)
    assert model[0].draws.equal(before)


def test_layers_of_one_shape_draw_for_themselves() -> None:
    model = convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), recipes.mxfp4())
    assert not model[0].draws.equal(model[1].draws)


@pytest.mark.parametrize(
    ("recipe", "size", "most"),
    [
        (recipes.mxfp8(), (512, 256), 1 + 4 / 32 + 0.01),
        (recipes.block_scaling(), (512, 256), 1 + 4 / 128 + 0.01),
        (recipes.current_scaling(), (4096, 256), 1.001),
        (recipes.delayed_scaling(), (4096, 256), 1.001),
        (recipes.rowwise(), (512, 256), 1.05),
        (recipes.nvfp4(), (512, 256), 1 + 4 / 16 + 0.01),
    ],
    ids=lambda value: value.name if isinstance(value, Recipe) else "",
)
def test_activations_are_held_in_codes(recipe: Recipe, size: tuple[int, int], most: float) -> None:
    layer = convert(nn.Sequential(nn.Linear(size[1], 16)), recipe)[0]
    assert isinstance(layer, Linear)
    saved: list[torch.Tensor] = []
    x = torch.randn(*size)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert next(t for t in saved if t.numel() == x.numel()).dtype is torch.uint8
    held, full = layer.activation_bytes
    assert full == 4 * x.numel()
    assert x.numel() <= held <= most * x.numel()


def test_operands_packed_in_codes_multiply_as_those_that_were_not(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for least in (1, 1 << 30):
        monkeypatch.setattr(tables, "PACK", least)
        torch.manual_seed(0)
        model = convert(nn.Sequential(nn.Linear(70, 30)), recipes.current_scaling())
        x = torch.randn(50, 70)
        model(x).square().sum().backward()
        gradients.append(model[0].weight.grad)
    assert gradients[0].equal(gradients[1])


@pytest.mark.parametrize("accumulator", [Accumulator.HOPPER_FAST, Accumulator.HOPPER_SPLIT, Accumulator.BFLOAT16_OUT])
def test_accumulators_return_what_the_tensor_core_would(accumulator: Accumulator) -> None:
    torch.manual_seed(0)
    spec = TensorSpec(E4M3FN, Current())
    exact = Recipe.from_tensors(input=spec, weight=spec, grad_output=TensorSpec(E5M2, Current()))
    gemm = recipes.Gemm(left=spec, right=spec, accumulator=accumulator)
    coarse = Recipe(output=gemm, grad_input=exact.grad_input, grad_weight=exact.grad_weight)
    x, layer = torch.rand(16, 4096), nn.Sequential(nn.Linear(4096, 8))
    nn.init.uniform_(layer[0].weight)
    want = convert(copy.deepcopy(layer), exact)(x)
    found = convert(copy.deepcopy(layer), coarse)(x)
    error = ((found - want).abs() / want).max().item()
    low, high = {
        Accumulator.HOPPER_FAST: (1e-3, 0.2),
        Accumulator.HOPPER_SPLIT: (1e-6, 2e-3),
        Accumulator.BFLOAT16_OUT: (1e-5, 2.0**-8),
    }[accumulator]
    assert low < error < high


def test_hopper_recipes_name_their_sums() -> None:
    recipe = on_hopper(recipes.current_scaling())
    assert recipe.output.accumulator is Accumulator.HOPPER_FAST
    assert recipe.grad_input.accumulator is recipe.grad_weight.accumulator is Accumulator.HOPPER_SPLIT
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(40, 30)), recipe)
    model(torch.randn(20, 40)).sum().backward()
    assert model[0].weight.grad is not None


def test_blocks_of_float32_scales_enter_each_partial_sum() -> None:
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(300, 20, bias=False)), recipes.deepseek())
    x = torch.randn(10, 300) * torch.logspace(-6, 6, 300)
    y = model(x)
    row, square = recipes.deepseek().output.left, recipes.deepseek().output.right
    assert row is not None
    assert square is not None
    a, b = reference.encode_matrix(x.numpy(), row), reference.encode_matrix(model[0].weight.detach().numpy(), square)
    want = np.zeros((10, 20), np.float32)
    for k in range(3):
        part = slice(128 * k, 128 * (k + 1))
        p = reference.decode(a.codes[:, part], E4M3FN).astype(np.float64) @ reference.decode(b.codes[:, part], E4M3FN).T
        scaled = p.astype(np.float32) * a.scales[:, k : k + 1]
        want = (scaled.astype(np.float64) * b.scales[0, k] + want).astype(np.float32)
    np.testing.assert_allclose(y.detach().numpy(), want, rtol=3e-6)


def test_a_layer_names_what_it_cannot_cast() -> None:
    layer = convert(nn.Sequential(nn.Linear(8, 8).double()), recipes.mxfp8())
    with pytest.raises(ValueError, match="float32, bfloat16 and float16"):
        layer(torch.randn(4, 8, dtype=torch.float64))
    strict = TensorSpec(E4M3FN, Block(shape=(1, 32), padding=False))
    odd = convert(nn.Sequential(nn.Linear(40, 8)), Recipe.from_tensors(input=strict, weight=strict))
    with pytest.raises(ValueError, match="do not divide"):
        odd(torch.randn(4, 40))
    fp4 = convert(nn.Sequential(nn.Linear(32, 8)), recipes.mxfp4())
    with pytest.raises(ValueError, match="has no NaN"):
        fp4(torch.full((2, 32), float("nan")))


def test_row_scales_leave_each_row_its_own() -> None:
    spec = TensorSpec(E4M3FN, Row(), Rounding.NEAREST_EVEN)
    layer = convert(nn.Sequential(nn.Linear(64, 8, bias=False)), Recipe.from_tensors(input=spec, weight=spec))
    x = torch.randn(4, 64)
    alone, together = layer(x[:1]), layer(x * torch.tensor([[1.0], [1e8], [1e-8], [1e4]]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-6, atol=1e-7)
    with autocast(enabled=False):
        torch.testing.assert_close(alone, layer(x[:1]), rtol=0.2, atol=0.2)


@every_recipe
def test_micro_batches_that_share_a_weight_are_those_that_do_not(recipe: Recipe) -> None:
    torch.manual_seed(0)
    layer, x = Linear(40, 24, recipe=recipe), torch.randn(2, 8, 40)
    layer.eval()
    with autocast(recipe=recipe):
        apart = [layer(part) for part in x]
        shared = [layer(part, is_first_microbatch=first) for part, first in zip(x, (True, False), strict=True)]
    for one, other in zip(apart, shared, strict=True):
        assert one.equal(other)


def tf32_of(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float32 to nearest even at 10 bits of mantissa, in float64's arithmetic."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    ulp = np.maximum(exponent, -125) - 11  # float32's subnormals keep its last places
    with np.errstate(over="ignore"):
        return np.ldexp(np.rint(np.ldexp(fraction, exponent - ulp)), ulp).astype(np.float32)


@pytest.mark.parametrize("special", [[], [np.inf, -np.inf], [np.nan, -np.nan, np.inf]], ids=["finite", "inf", "nan"])
def test_an_operand_in_tf32_has_ten_bits_of_mantissa(special: list[float]) -> None:
    bits = np.random.default_rng(3).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    edges = np.array([0, 1 << 31, 0x3F801000, 0x3F803000, 0x00001000, 0x7F7FFFFF, 0xFF7FF000], np.uint32)
    x = np.concatenate([bits, edges]).view(np.float32)
    x = np.concatenate([np.where(np.isfinite(x), x, np.float32(0)), np.array(special, np.float32)])
    if special and special[0] != special[0]:  # all bits set: a carry would leave -0
        x[-3:-1].view(np.uint32)[:] = 0x7FFFFFFF, 0xFFFFFFFF
    cast = Cast(TensorSpec(TF32, overflow=Overflow.NONE), upright=False, number=0)
    ours, due = cast(torch.from_numpy(x.copy())[None], 1.0).values.numpy()[0], tf32_of(x)
    nan = np.isnan(x)
    assert np.array_equal(np.isnan(ours), nan)
    assert np.array_equal(ours[~nan].view(np.uint32), due[~nan].view(np.uint32))
