"""What Linear computes: each GEMM against operands cast by ml_dtypes and multiplied in float64."""

from __future__ import annotations

import copy
import math

import ml_dtypes
import numpy as np
import pytest
import torch

import octavo.torch as ot
from octavo import TensorSpec
from octavo.formats import E4M3FN, E5M2
from octavo.recipes import Recipe, current_scaling, delayed_scaling
from octavo.rounding import Overflow
from octavo.scaling import Current

RECIPES = {"delayed": delayed_scaling(), "current": current_scaling(), "pow2": current_scaling(use_power_2_scales=True)}


def current_scale(x: np.ndarray, maximum: float, power_of_two: bool) -> np.float32:
    amax = np.float32(np.abs(x).max(initial=0))
    scale = np.float32(maximum) / amax if amax > 0 else np.float32(1)
    return np.float32(2.0 ** np.floor(np.log2(float(scale)))) if power_of_two else scale


def cast(x: torch.Tensor, dtype: type, maximum: float, scale: np.float32) -> np.ndarray:
    """The values of x's codes over the scale, in float64, by ml_dtypes."""
    scaled = np.clip(x.detach().float().numpy() * scale, -maximum, maximum)
    return scaled.astype(dtype).astype(np.float64) / np.float64(scale)


def close(actual: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    """Equal up to float32 sums, and to one rounding where the result is narrower."""
    unit = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 2.0**-20}[dtype]
    bound = unit * np.abs(expected).max(initial=1e-30)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=unit, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 17), (17,), (2, 3, 17), (1, 2, 2, 3, 17), (1, 17), (64, 17)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_three_gemms(name: str, bias: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = ot.Linear(17, 9, bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    grad = torch.randn(*shape[:-1], 9, dtype=dtype)
    with ot.autocast(recipe=RECIPES[name]):
        y = layer(x)
    y.backward(grad)

    def scale(t: torch.Tensor, maximum: float) -> np.float32:
        t32 = t.detach().float().numpy()
        return np.float32(1) if name == "delayed" else current_scale(t32, maximum, name == "pow2")

    e4m3, e5m2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
    xq = cast(x, e4m3, 448, scale(x, 448)).reshape(-1, 17)
    wq = cast(layer.weight, e4m3, 448, scale(layer.weight, 448))
    gq = cast(grad, e5m2, 57344, scale(grad, 57344)).reshape(-1, 9)
    expected = xq @ wq.T + (layer.bias.detach().double().numpy() if bias else 0)
    close(y, expected.reshape(*shape[:-1], 9), dtype)
    close(x.grad, (gq @ wq).reshape(shape), dtype)
    close(layer.weight.grad, gq.T @ xq, dtype)
    if bias:
        close(layer.bias.grad, grad.double().reshape(-1, 9).numpy().sum(0), dtype)


def test_each_cell_of_the_table_is_honoured() -> None:
    """A recipe that casts every tensor differently in its two GEMMs, and two of three results."""
    e4m3 = TensorSpec(E4M3FN, Current())
    e5m2 = TensorSpec(E5M2, Current(power_of_two=True), overflow=Overflow.NONE)
    from octavo.recipes import Gemm

    recipe = Recipe(
        output=Gemm(left=e4m3, right=None, result=e5m2),
        grad_input=Gemm(left=e4m3, right=e5m2, result=None),
        grad_weight=Gemm(left=None, right=e5m2, result=e4m3),
    )
    layer = ot.Linear(8, 6, bias=False)
    x = torch.randn(5, 8, requires_grad=True)
    grad = torch.randn(5, 6)
    with ot.autocast(recipe=recipe):
        y = layer(x)
    y.backward(grad)

    def as_e4m3(t: torch.Tensor | np.ndarray) -> np.ndarray:
        t = torch.as_tensor(t)
        return cast(t, ml_dtypes.float8_e4m3fn, 448, current_scale(t.detach().float().numpy(), 448, False))

    def as_e5m2(t: torch.Tensor | np.ndarray) -> np.ndarray:
        t = torch.as_tensor(t)
        return cast(t, ml_dtypes.float8_e5m2, 57344, current_scale(t.detach().float().numpy(), 57344, True))

    w = layer.weight.detach().double().numpy()
    close(y, as_e5m2(as_e4m3(x) @ w.T), torch.float32)
    close(x.grad, as_e4m3(grad) @ as_e5m2(layer.weight), torch.float32)
    close(layer.weight.grad, as_e4m3(grad.double().numpy().T @ as_e5m2(x)), torch.float32)


def test_without_autocast_it_is_torch() -> None:
    layer, x = ot.Linear(6, 4), torch.randn(3, 6)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert layer(x).equal(plain)
    with ot.autocast(enabled=False):
        assert layer(x).equal(plain)
    with ot.autocast(), ot.autocast(enabled=False):
        assert layer(x).equal(plain)
    with ot.fp8_autocast(enabled=True, fp8_recipe=current_scaling()):
        assert not layer(x).equal(plain)


def test_a_layers_own_recipe_holds_outside_autocast_and_yields_to_one() -> None:
    layer, x = ot.Linear(6, 4, recipe=current_scaling()), torch.randn(3, 6)
    own = layer(x)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert not own.equal(plain)
    with ot.autocast():
        assert layer(x).equal(own)
    with ot.autocast(enabled=False):
        assert layer(x).equal(plain)
    with ot.autocast(recipe=delayed_scaling()):
        assert not layer(x).equal(own)


def test_torch_autocast_decides_the_output_dtype() -> None:
    layer, x = ot.Linear(16, 4), torch.randn(3, 16, requires_grad=True)
    with ot.autocast(recipe=current_scaling()), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    with ot.autocast(recipe=current_scaling()):
        assert layer(x).bfloat16().equal(y)  # cast from float32 either way, rounded once


def test_float64_is_cast_from_float64() -> None:
    layer = ot.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.fill_(1)
    recipe = Recipe.from_tensors(input=TensorSpec(E4M3FN), weight=TensorSpec(E4M3FN))
    with ot.autocast(recipe=recipe):
        assert layer(torch.tensor([[17 + 2.0**-40]], dtype=torch.float64)).item() == 18


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)], ids=str)
def test_empty_batches(name: str, shape: tuple[int, ...]) -> None:
    layer, x = ot.Linear(6, 4), torch.zeros(shape, requires_grad=True)
    with ot.autocast(recipe=RECIPES[name]):
        y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    y.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
    assert layer.scale_forward[0] == 1


@pytest.mark.parametrize("name", list(RECIPES))
def test_non_contiguous_inputs_and_gradients(name: str) -> None:
    layer, twin = ot.Linear(6, 4), ot.Linear(6, 4)
    twin.load_state_dict(layer.state_dict())
    base = torch.randn(6, 10)
    for module, x in ((layer, base.t()), (twin, base.t().contiguous())):
        with ot.autocast(recipe=RECIPES[name]):
            y = module(x)
        y.sum().backward()  # an expanded gradient
    assert layer.weight.grad is not None
    assert layer.weight.grad.equal(twin.weight.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", list(RECIPES))
def test_nan_and_inf_show_in_the_result_and_leave_scales_finite(name: str, bad: float) -> None:
    layer, x = ot.Linear(6, 4), torch.randn(3, 6)
    x[1, 2] = bad
    with ot.autocast(recipe=RECIPES[name]):
        y = layer(x)
    y.sum().backward()
    if math.isnan(bad):
        assert y[1].isnan().all()
        assert y[0].isfinite().all()
    else:
        assert y.isfinite().all()  # saturated
    assert layer.scale_forward.isfinite().all()
    if name == "delayed":
        assert not layer.amax_history_forward[-1, 0].isfinite()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 6, dtype=torch.int64), "takes float32, bfloat16, float16, float64; got torch.int64"),
        (torch.zeros(3, 6).to(torch.float8_e5m2), "got torch.float8_e5m2: convert it first"),
        (torch.zeros(3, 5), r"takes \[..., 6\]; got \[3, 5\]"),
        (torch.zeros(()), r"takes \[..., 6\]; got \[\]"),
    ],
)
def test_bad_inputs(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message), ot.autocast():
        ot.Linear(6, 4)(x)


def test_a_recipe_is_not_its_name() -> None:
    for call in (
        ot.autocast,
        lambda recipe: ot.Linear(2, 2, recipe=recipe),
        lambda recipe: ot.convert(ot.Linear(2, 2), recipe),
    ):
        with pytest.raises(ValueError, match=r"recipe is a Recipe .*; got str"):
            call(recipe="delayed")


def test_gradients_of_gradients_are_refused() -> None:
    layer, x = ot.Linear(4, 4, recipe=current_scaling()), torch.ones(1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_uncast_float64_is_multiplied_in_float64() -> None:
    layer = ot.Linear(3, 2, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    with ot.autocast(recipe=Recipe()):
        torch.testing.assert_close(
            layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-15, atol=0
        )


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer = ot.Linear(6, 4)
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    with ot.autocast(recipe=current_scaling()):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert x.grad is not None


def test_copies_are_independent() -> None:
    recipe = delayed_scaling(amax_history_len=4)
    layer = ot.Linear(6, 4, recipe=recipe)
    twin = copy.deepcopy(layer)
    layer(torch.ones(1, 6)).sum().backward()
    assert twin.scale_forward.tolist() == [1, 1, 1]
    with ot.autocast(recipe=recipe):
        twin(torch.full((1, 6), 2.0))
    assert twin.scale_forward[0] == 224
    assert layer.scale_forward[0] == 448


def test_state_stays_float32_when_the_model_is_converted() -> None:
    layer = ot.Linear(6, 4, recipe=delayed_scaling(amax_history_len=2))
    layer(torch.full((1, 6), 3.0))
    before = layer.scale_forward.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.scale_forward.equal(before)
    assert layer.amax_history_forward.dtype == torch.float32


def test_lazily_negated_inputs() -> None:
    layer, x = ot.Linear(3, 2, recipe=current_scaling()), torch.randn(4, 3)
    negated = torch.complex(torch.zeros(4, 3), x).conj().imag
    assert negated.is_neg()
    assert layer(negated).equal(layer(-x))
