"""Post-training quantisation: codes, outputs, folding, calibration, files and the report, each against an oracle of its own."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import octavo.torch as ot
from octavo import checkpoint, reference
from octavo.formats import E3M4FN, E4M3FN, E5M2
from octavo.recipes import NAMED, delayed_scaling, direct, hybrid, mxfp8, nvfp4, on_hopper, rowwise
from octavo.rounding import Overflow, Rounding
from octavo.scaling import Block, Current, Delayed, Row, Unscaled
from octavo.table import Gemm, Recipe, TensorSpec, Transform
from octavo.torch.accuracy import compare_accuracy
from octavo.torch.calibration import Calibration
from octavo.torch.folding import fold_batch_norms
from octavo.torch.quantization import load_quantized, ptq_recipe, quantize_model, save_quantized
from octavo.torch.quantized import QuantizedConv, QuantizedLayer, QuantizedLinear

E4M3 = ptq_recipe("e4m3")


def of(left: TensorSpec | None = None, right: TensorSpec | None = None, result: TensorSpec | None = None) -> Recipe:
    return Recipe(output=Gemm(left=left, right=right, result=result))


def lively(model: nn.Module) -> nn.Module:
    """The model, whose batch norms have statistics and weights of their own."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return model


class Residual(nn.Module):
    """Two convolutions with norms, a norm after the sum, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.norm4, self.norm5 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head, self.norm6 = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = x + self.norm2(self.conv2(x))
        shared = self.conv3(x)
        x = self.norm3(shared) + shared
        x = self.norm5(self.twice(torch.relu(self.norm4(self.twice(x)))))
        out: Tensor = self.norm6(self.head(x.mean((2, 3))))
        return out


# Codes of weights.


def by_rows(weight: Tensor, layer: Any) -> np.ndarray[Any, Any]:
    """[output channels, all else], written out element by element."""
    w, groups = weight.detach().numpy(), getattr(layer, "groups", 1)
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return np.stack([row.reshape(-1) for row in w])
    into, out = w.shape[0] // groups, w.shape[1]
    return np.stack([w[g * into : (g + 1) * into, o].reshape(-1) for g in range(groups) for o in range(out)])


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(12, 7), (5, 12)),
    (nn.Linear(12, 7, bias=False), (2, 3, 12)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect", dilation=(1, 2)), (2, 4, 7, 6)),
    (nn.Conv2d(6, 6, 3, groups=6, bias=False), (6, 5, 5)),
    (nn.Conv3d(2, 4, 2), (1, 2, 4, 3, 3)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, padding=1), (2, 4, 5, 4)),
    (nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 2, 2)),
]
every_layer = pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: str(x).replace(" ", ""))


@every_layer
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_weights_are_the_codes_of_ml_dtypes(
    layer: nn.Module, shape: tuple[int, ...], per_channel: bool, name: str
) -> None:
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]
    new = quantize_model(layer, ptq_recipe(name, per_channel=per_channel), [torch.randn(shape)])
    rows = by_rows(layer.weight, layer)
    amax = np.abs(rows).max(axis=1, keepdims=True) if per_channel else np.abs(rows).max().reshape(1, 1)
    scale = np.float32(ml_dtypes.finfo(dtype).max) / amax
    np.testing.assert_array_equal(new.weight_codes.numpy(), (rows * scale).astype(dtype).view(np.uint8))
    np.testing.assert_array_equal(new.weight_scales.numpy(), 1 / scale)
    assert new.weight is None


def test_four_bit_weights_are_packed_and_wide_ones_rounded() -> None:
    layer, x = nn.Linear(16, 4), torch.randn(2, 16)
    packed = quantize_model(layer, nvfp4(), [x])
    assert packed.weight_codes.shape == (4, 8)
    assert packed.weight_codes.dtype is torch.uint8
    wide = quantize_model(layer, NAMED["bf16"](), [x])
    assert wide.weight.equal(layer.weight.bfloat16())
    assert quantize_model(layer, NAMED["fp16"](), [x]).weight.equal(layer.weight.half())
    tf32 = quantize_model(layer, NAMED["tf32"](), [x]).weight
    assert tf32.dtype is torch.float32
    assert not bool((tf32.view(torch.int32) & 0x1FFF).any())
    assert quantize_model(layer, of(), [x]).weight.equal(layer.weight)


# Outputs.


def cast_by_reference(x: np.ndarray[Any, Any], spec: TensorSpec | None, scale: float = 1.0) -> np.ndarray[Any, Any]:
    """A matrix, cast and decoded."""
    if spec is None:
        return x
    if isinstance(spec.scaling, Current):
        spec = replace(spec, scaling=Delayed())
    return reference.decode_matrix(reference.encode_matrix(x, spec, scale=scale), spec).astype(np.float64)


def twin(layer: Any, recipe: Recipe, x: Tensor) -> Tensor:
    """The quantised layer's output in float64, from casts by hand."""
    row, groups, axis = recipe.output, getattr(layer, "groups", 1), -1 if isinstance(layer, nn.Linear) else 1
    scale = float(np.float32(row.left.format.max) / np.float32(x.abs().max())) if row.left is not None else 1.0
    batched = x if isinstance(layer, nn.Linear) or x.dim() == layer.weight.dim() else x[None]
    last = np.moveaxis(batched.numpy(), axis, -1)
    cast = cast_by_reference(last.reshape(-1, last.shape[-1] // groups), row.left, scale).reshape(last.shape)
    values = torch.from_numpy(np.moveaxis(cast, -1, axis).copy()).double()
    weight = np.empty(layer.weight.shape)
    rows = by_rows(layer.weight, layer)
    spec, weight_scale = row.right, 1.0
    if spec is not None and isinstance(spec.scaling, Current):
        weight_scale = float(np.float32(spec.format.max) / np.abs(rows).max())
    rows = cast_by_reference(rows, spec, weight_scale)
    out = rows.shape[0] // groups
    for number, values_of_row in enumerate(rows):
        if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            into = weight.shape[0] // groups
            group = number // out
            target = weight[group * into : (group + 1) * into, number % out]
        else:
            target = weight[number]
        target[...] = values_of_row.reshape(target.shape)
    double = copy.deepcopy(layer).double()
    double.weight.data = torch.from_numpy(weight)
    result: Tensor = double(values).detach()
    return result if batched.dim() == x.dim() else result[0]


RECIPES = {
    "e4m3": E4M3,
    "hybrid": ptq_recipe("hybrid"),
    "rowwise": rowwise(),
    "mxfp8": mxfp8(),
    "nvfp4": nvfp4(),
    "float32 blocks": of(TensorSpec(E4M3FN, Block(shape=(3, 2))), TensorSpec(E4M3FN, Block(shape=(2, 3)))),
    "weight alone": of(right=TensorSpec(E3M4FN, Row())),
    "input alone": of(left=TensorSpec(E5M2, Unscaled())),
}


@every_layer
@pytest.mark.parametrize("name", RECIPES)
def test_outputs_are_those_of_casts_by_hand(layer: nn.Module, shape: tuple[int, ...], name: str) -> None:
    x = torch.randn(shape) * 3
    new = quantize_model(layer, RECIPES[name], [x])
    torch.testing.assert_close(new(x).double(), twin(layer, RECIPES[name], x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_every_named_recipe_runs(name: str) -> None:
    model, x = lively(Residual()), torch.randn(4, 3, 6, 6)
    new = quantize_model(model, NAMED[name](), [x])
    expected = model.eval()(x)
    assert new(x).dtype is torch.float32
    assert (new(x) - expected).norm() < 0.35 * expected.norm()


def test_results_are_cast_by_a_fixed_scale_or_by_rows() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    y = layer(x).detach()
    whole = quantize_model(layer, of(result=TensorSpec(E4M3FN, Current())), [x, x[:1]])
    scale = np.float32(448) / np.float32(y.abs().max())
    assert whole.output_scale.item() == scale
    expected = reference.quantize(y.numpy(), E4M3FN, scale=float(scale))
    np.testing.assert_allclose(whole(x).numpy(), expected, rtol=1e-6)
    rows = quantize_model(layer, of(result=TensorSpec(E4M3FN, Row())), [x])
    matrix = cast_by_reference(y.permute(0, 2, 3, 1).reshape(-1, 4).numpy(), TensorSpec(E4M3FN, Row()))
    np.testing.assert_allclose(rows(x).permute(0, 2, 3, 1).reshape(-1, 4).numpy(), matrix, rtol=1e-6)


def test_a_transform_is_undone_and_its_scale_fixed_after_it() -> None:
    layer, x = nn.Linear(16, 4), torch.randn(3, 16)
    for scaling in (Current(), Delayed(), Row()):
        spec = TensorSpec(E4M3FN, scaling, transform=Transform.HADAMARD)
        new = quantize_model(layer, of(spec, spec), [x])
        turned = reference.hadamard(x.numpy())
        if not isinstance(scaling, Row):
            assert new.input_scale.item() == np.float32(448) / np.abs(turned).max()
        assert (new(x) - layer(x)).norm() < 0.08 * layer(x).norm()
    grouped, x = nn.Conv1d(32, 4, 1, groups=2), torch.randn(2, 32, 5)
    spec = TensorSpec(E4M3FN, Current(), transform=Transform.HADAMARD)
    new = quantize_model(grouped, of(spec, spec), [x])
    turned = reference.hadamard(x.permute(0, 2, 1).reshape(-1, 16).numpy())
    assert new.input_scale.item() == np.float32(448) / np.abs(turned).max()
    assert (new(x) - grouped(x)).norm() < 0.08 * grouped(x).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(8, 4).to(dtype), torch.randn(3, 8, dtype=dtype)
    new = quantize_model(layer, E4M3, [x])
    assert new(x).dtype is dtype
    wide = quantize_model(copy.deepcopy(layer).float(), E4M3, [x.float()])
    assert new(x).equal(wide(x.float()).to(dtype)) or dtype is torch.float64
    torch.testing.assert_close(new(x).double(), layer(x).double(), rtol=0.2, atol=0.1)


def test_scales_stay_float32_whatever_the_model_is_converted_to() -> None:
    x = torch.randn(3, 8)
    new = quantize_model(nn.Linear(8, 4), E4M3, [x])
    y = new(x)
    assert new.half()(x).equal(y)
    assert new.weight_scales.dtype is torch.float32
    assert new(torch.empty(0, 8)).shape == (0, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert new(x).equal(y)


def test_a_transposed_convolution_takes_an_output_size() -> None:
    layer, x = nn.ConvTranspose2d(3, 4, 3, stride=2), torch.randn(2, 3, 5, 5)
    new = quantize_model(layer, of(), [x])
    torch.testing.assert_close(new(x, output_size=[12, 11]), layer(x, output_size=[12, 11]).detach())
    torch.testing.assert_close(new(x[0]), layer(x[0]).detach())


# The model.


def test_the_given_model_stays_as_it_is() -> None:
    model, x = lively(Residual()).train(), torch.randn(4, 3, 6, 6)
    model.head.eval()
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    new = quantize_model(model, E4M3, [x])
    assert [type(module) for module in model.modules()] == classes
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.head.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in new.modules())
    assert not any(parameter.requires_grad for parameter in new.parameters())
    assert type(new) is Residual
    assert isinstance(new.conv1, QuantizedConv)
    assert isinstance(new.head, QuantizedLinear)


@pytest.mark.parametrize(
    ("exempt", "spared"),
    [(("conv1", "head"), {"conv1", "head"}), (("conv?",), {"conv1", "conv2", "conv3"}), ("*", None)],
)
def test_exempt_layers_and_their_norms_are_left_alone(exempt: tuple[str, ...], spared: set[str] | None) -> None:
    model = lively(Residual())
    new = quantize_model(model, E4M3, [torch.randn(2, 3, 5, 5)], exempt=exempt)
    names = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    left = {name for name, module in new.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert left == (names if spared is None else spared)
    assert isinstance(new.norm1, nn.BatchNorm2d) == ("conv1" in left)
    if "conv1" in left:
        assert new.conv1.weight.equal(model.conv1.weight)


def test_the_model_itself_ties_and_octavos_own_layers() -> None:
    x = torch.randn(3, 6)
    layer = nn.Linear(6, 6)
    assert isinstance(quantize_model(layer, E4M3, [x]), QuantizedLinear)
    tied = quantize_model(nn.Sequential(layer, nn.ReLU(), layer), E4M3, [x])
    assert tied[0] is tied[2]
    peak = max(x.abs().max(), torch.relu(layer(x)).max())
    assert tied[0].input_scale.item() == np.float32(448) / np.float32(peak.item())
    assert quantize_model(nn.Sequential(layer, layer), E4M3, [x], exempt=["1"])[0].weight.equal(layer.weight)
    ours = ot.convert(nn.Sequential(copy.deepcopy(layer)), delayed_scaling())
    assert quantize_model(ours, E4M3, [x])(x).equal(quantize_model(layer, E4M3, [x])(x))


def test_a_model_is_quantised_in_two_steps_by_two_recipes() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(3, 6)
    half = quantize_model(model, E4M3, [x], exempt=["2"])
    both = quantize_model(half, ptq_recipe("e5m2"), [x])
    assert [both[i].row.left.format for i in (0, 2)] == [E4M3FN, E5M2]


def test_a_transformer_runs_its_quantised_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), torch.randn(2, 5, 8)
    new = quantize_model(model, E4M3, [x])
    ran: list[str] = []
    for name, module in new.named_modules():
        if isinstance(module, QuantizedLayer):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model.use_nested_tensor = False
    with torch.no_grad():
        y = new(x, src_key_padding_mask=mask)
        expected = model.eval()(x, src_key_padding_mask=mask)
    assert ran == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    torch.testing.assert_close(y[0], expected[0], rtol=0, atol=0.2)


def test_hooks_and_copies() -> None:
    calls: list[int] = []
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    model[0].register_forward_hook(lambda *_: calls.append(1))
    new = quantize_model(model, E4M3, [x])
    calls.clear()
    y = new(x)
    assert calls == [1]
    assert copy.deepcopy(new)(x).equal(y)
    assert "input=e4m3fn current, weight=e4m3fn row" in repr(new)


# Folding.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "norm", "places", "groups"),
    [
        (nn.Linear, nn.BatchNorm1d, 0, 1),
        (nn.Conv1d, nn.BatchNorm1d, 1, 2),
        (nn.Conv2d, nn.BatchNorm2d, 2, 1),
        (nn.Conv3d, nn.BatchNorm3d, 3, 4),
        (nn.ConvTranspose1d, nn.BatchNorm1d, 1, 1),
        (nn.ConvTranspose2d, nn.BatchNorm2d, 2, 2),
        (nn.ConvTranspose3d, nn.BatchNorm3d, 3, 4),
    ],
)
def test_folding_equals_the_unfolded(bias: bool, affine: bool, kind: Any, norm: Any, places: int, groups: int) -> None:
    layer = kind(4, 8, bias=bias) if not places else kind(4, 8, 2, groups=groups, bias=bias)
    model = lively(nn.Sequential(layer, norm(8, affine=affine, eps=1e-3), nn.ReLU())).train()
    x = torch.randn(3, 4, *(4,) * places)
    folded = fold_batch_norms(model, x)
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_folding_a_residual_network() -> None:
    model, x = lively(Residual()).eval(), torch.randn(4, 3, 6, 6)
    folded = fold_batch_norms(model, x)
    names = {name for name, _ in model.named_children() if name.startswith("norm")}
    gone = {name for name in names if isinstance(getattr(folded, name), nn.Identity)}
    assert gone == {"norm1", "norm2", "norm6"}
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def hooked() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (3, 4, 4)),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)), (4, 4)),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)), (3, 4)),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), (3, 4)),
        (hooked(), (3, 4)),
    ],
)
def test_what_cannot_be_folded_is_not(model: nn.Sequential, shape: tuple[int, ...]) -> None:
    lively(model).eval()
    x = torch.randn(shape)
    folded = fold_batch_norms(model, x)
    assert [type(module) for module in folded] == [type(module) for module in model]
    assert folded(x).equal(model(x))


class Switched(nn.Module):
    """A linear layer and its norm, with arguments that it branches on."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float, double: bool = False) -> Tensor:
        y: Tensor = self.norm(self.head(input=x)) * scale
        if mask is not None:
            y = y * mask
        return y * 2 if double else y


def test_plain_arguments_and_those_left_out_are_no_obstacle() -> None:
    model, x = lively(Switched()).eval(), torch.randn(3, 4)
    for batch in ({"x": x, "scale": 3.0}, {"x": x, "scale": 2.0, "mask": torch.ones(5), "double": True}):
        folded = fold_batch_norms(model, batch)
        assert type(folded.norm) is nn.Identity
        torch.testing.assert_close(folded(**batch), model(**batch), rtol=1e-5, atol=1e-5)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y if y.sum() > 0 else -y


def test_a_model_that_cannot_be_traced_is_quantised_unfolded() -> None:
    model, x = lively(Untraceable()), torch.randn(2, 3, 4, 4)
    with pytest.warns(
        UserWarning, match=r"Untraceable cannot be traced by torch.fx \(.*\), so its batch norms stay"
    ) as seen:
        new = quantize_model(model, E4M3, [x])
    assert "\n" not in str(seen[0].message)
    assert seen[0].filename == __file__
    assert isinstance(new.norm, nn.BatchNorm2d)
    assert new(x).equal(quantize_model(model, E4M3, [x], fold=False)(x))


# Calibration.


@pytest.mark.parametrize(
    ("scaling", "divisor", "mask"),
    [(Current(), 1, -1), (Delayed(margin=2), 4, -1), (Current(power_of_two=True), 1, 0x7F800000)],
)
def test_the_largest_magnitude_of_all_batches(scaling: Any, divisor: int, mask: int) -> None:
    layer = nn.Linear(6, 4)
    batches = [torch.randn(4, 6), torch.full((1, 6), -9.0), torch.randn(4, 6)]
    spec = TensorSpec(E4M3FN, scaling)
    new = quantize_model(layer, of(spec, spec), ((x, "label") for x in batches))
    expected = np.array([448 / divisor / np.float32(9)], np.float32).view(np.int32) & mask
    assert new.input_scale.item() == expected.view(np.float32)[0]
    weight = np.array([448 / divisor / layer.weight.abs().max().item()], np.float32).view(np.int32) & mask
    assert new.weight_scales.item() == 1 / weight.view(np.float32)[0]
    assert quantize_model(layer, E4M3, [{"input": torch.zeros(2, 6)}]).input_scale.item() == 1


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99, 100.0])
def test_percentiles_are_numpys(percentile: float) -> None:
    batches = [torch.randn(200, 16) * scale for scale in (1, 0.01, 300)]
    new = quantize_model(nn.Linear(16, 2), E4M3, batches, calibration=Calibration.PERCENTILE, percentile=percentile)
    magnitudes = np.abs(np.concatenate([x.numpy().reshape(-1) for x in batches]))
    exact = np.percentile(magnitudes, percentile, method="lower")
    clip = 448 / new.input_scale.item()
    assert exact * (1 - 1e-6) <= clip <= exact * (1 + 1 / 128 + 1e-6)
    assert (magnitudes <= clip * (1 + 1e-6)).mean() >= percentile / 100 - 1 / magnitudes.size


def test_a_percentile_of_zeros_falls_back_to_the_largest() -> None:
    x = torch.zeros(100, 6)
    x[0, 0] = 7
    new = quantize_model(nn.Linear(6, 2), E4M3, [x], calibration=Calibration.PERCENTILE, percentile=90)
    assert new.input_scale.item() == 64


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_the_least_squared_error(spread: float) -> None:
    batches = [torch.randn(500, 8), torch.randn(500, 8).exp() * spread]
    new = quantize_model(
        nn.Linear(8, 2),
        of(TensorSpec(E3M4FN, Current())),
        batches,
        calibration=Calibration.MEAN_SQUARED_ERROR,
    )
    x = np.concatenate([batch.numpy().reshape(-1) for batch in batches])

    def error(clip: float) -> float:
        values = E3M4FN.values[E3M4FN.values >= 0]
        values = np.sort(values[np.isfinite(values)]).astype(np.float64) * (clip / 30)
        magnitudes = np.abs(x).astype(np.float64)
        nearest = np.clip(np.searchsorted((values[1:] + values[:-1]) / 2, magnitudes), 0, values.size - 1)
        return float(((values[nearest] - magnitudes) ** 2).sum())

    candidates = np.abs(x).max() * 2.0 ** (-np.arange(96) / 16)
    clip = 30 / new.input_scale.item()
    assert np.abs(candidates / clip - 1).min() < 1e-6
    assert error(clip) <= 1.01 * min(error(candidate) for candidate in candidates)
    assert error(clip) < error(candidates[0])


# Files.


@pytest.mark.parametrize("name", ["e4m3", "hybrid", "nvfp4", "mxfp8", "direct", "delayed_scaling", "bf16"])
def test_a_file_gives_the_same_outputs_bit_for_bit(name: str, tmp_path: Path) -> None:
    recipe = ptq_recipe(name) if name in ("e4m3", "hybrid") else NAMED[name]()
    model, x = lively(Residual()), torch.randn(4, 3, 6, 6)
    new = quantize_model(model, recipe, [x], exempt=["conv3"])
    save_quantized(tmp_path / "model.safetensors", new)
    fresh = Residual()
    before = copy.deepcopy(fresh.state_dict())
    loaded = load_quantized(tmp_path / "model.safetensors", fresh)
    assert loaded(x).equal(new(x))
    assert {name: type(module) for name, module in loaded.named_modules()} == {
        name: type(module) for name, module in new.named_modules()
    }
    assert all(value.equal(before[name]) for name, value in fresh.state_dict().items())
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert {"head.bias", "conv3.weight", "norm3.running_var"} <= set(file.keys())


def test_a_file_of_ties_and_of_a_layer_alone(tmp_path: Path) -> None:
    layer, x = nn.Linear(6, 6), torch.randn(3, 6)
    for model, fresh in (
        (nn.Sequential(layer, nn.ReLU(), layer), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))),
        (layer, nn.Linear(6, 6)),
    ):
        new = quantize_model(model, E4M3, [x])
        save_quantized(tmp_path / "model", new)
        if isinstance(fresh, nn.Sequential):
            fresh[2] = fresh[0]
        assert load_quantized(tmp_path / "model", fresh)(x).equal(new(x))


def test_a_file_of_another_model_lists_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "model"
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)))
    save_quantized(path, quantize_model(model, E4M3, [torch.randn(2, 3, 2, 2)]))
    others = [
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)),
            r"of another model than Sequential: 3.bias \(float32 \[3\] in the file, float32 \[5\] in the model\), 3.weight_codes",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
            r"Sequential: 1 \(a batch norm in the file, ReLU in the model\); build",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1)),
            r"Sequential: 1 \(a batch norm in the file, none in the model\), 3.bias \(",
        ),
        (nn.Sequential(nn.ReLU()), r"0.bias \(float32 \[4\] in the file, none in the model\).* and \d more; build"),
    ]
    for other, message in others:
        with pytest.raises(checkpoint.CheckpointError, match=message) as caught:
            load_quantized(path, other)
        assert "\n" not in str(caught.value)
    checkpoint.save(path, {"x": torch.zeros(1)}, header={}, framework="torch")
    with pytest.raises(ValueError, match="holds no quantised model; give a file that save_quantized wrote"):
        load_quantized(path, model)
    checkpoint.save(path, {}, header={"kind": "quantized model", "layers": {"0": {}}}, framework="torch")
    with pytest.raises(ValueError, match="at odds with its own header"):
        load_quantized(path, model)
    with pytest.raises(ValueError, match="no quantised layer to save"):
        save_quantized(path, model)


# The report.


def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the digits")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that reads digits, and those that it has not seen."""
    torch.manual_seed(0)
    images, labels = digits()
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    seen = torch.arange(len(labels)) % 3 > 0
    for _ in range(8):
        for rows in seen.nonzero()[:, 0][torch.randperm(int(seen.sum()))].split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval(), images[~seen], labels[~seen]


@pytest.mark.parametrize("name", ["e4m3", "e3m4", "hybrid"])
@pytest.mark.parametrize("calibration", list(Calibration))
def test_a_trained_network_keeps_its_accuracy(trained: Any, name: str, calibration: Calibration) -> None:
    model, images, labels = trained
    new = quantize_model(model, ptq_recipe(name), images[:200].split(50), calibration=calibration)
    report = compare_accuracy(model, new, zip(images.split(200), labels.split(200), strict=True))
    assert report.before.accuracy > 0.95
    assert abs(report.after.accuracy - report.before.accuracy) <= 0.01
    assert min(report.sqnr.values()) > 20
    assert list(report.sqnr) == ["0", "4", "8"]


def test_the_report_is_numpys(trained: Any) -> None:
    model, images, labels = trained
    new = quantize_model(model, ptq_recipe("e5m2"), [images[:50]]).train()
    report = compare_accuracy(model, new, [(images[:100], labels[:100]), [images[100:150], labels[100:150]]])
    assert new.training
    new.eval()
    with torch.no_grad():
        for score, network in ((report.before, model), (report.after, new)):
            logits, truth = network(images[:150]).double().numpy(), labels[:150].numpy()
            chosen = logits[np.arange(150), truth]
            losses = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - chosen
            assert score.loss == pytest.approx(losses.mean(), rel=1e-6)
            assert score.accuracy == (logits.argmax(1) == truth).mean()
        one, other = model[:2](images[:150]).double().numpy(), new[0](images[:150]).double().numpy()
    assert report.sqnr["0"] == pytest.approx(10 * math.log10((one**2).sum() / ((one - other) ** 2).sum()), rel=1e-6)
    assert report.samples == 150
    parameters = 72 + 16 + 1152 + 16 + 32 + 2560 + 10
    assert report.before.weight_bytes == 4 * (parameters + 2 * 24) + 2 * 8
    assert report.after.weight_bytes == 72 + 1152 + 2560 + 4 * (2 * (8 + 16 + 10) + 3)
    text = report.describe().splitlines()
    assert text[0] == "150 samples"
    assert text[1].split() == ["before", "after", "change"]
    assert [line.split()[0] for line in text[2:5]] == ["loss", "accuracy", "weight"]
    assert len({len(line) for line in text[1:5]}) == 1
    assert text[7] == f"0      {report.sqnr['0']:.1f} dB"


def test_a_report_of_equal_and_of_unreached_layers() -> None:
    model, x = nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(6, 3)}), torch.randn(4, 6)
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    new = quantize_model(model, of(), [x])
    new.forward = lambda x: new["used"](x)  # type: ignore[method-assign]
    report = compare_accuracy(model, new, [(x, torch.zeros(4, dtype=torch.int64))])
    assert report.sqnr["used"] == math.inf
    assert math.isnan(report.sqnr["idle"])
    alone = compare_accuracy(model, model, [(x, torch.zeros(4, dtype=torch.int64))])
    assert not alone.sqnr
    assert alone.describe().count("\n") == 4


# Refusals.

STOCHASTIC = TensorSpec(E4M3FN, Current(), Rounding.STOCHASTIC)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


def with_weight(value: float) -> nn.Module:
    model = Branch()
    nn.init.constant_(model.used.weight, value)
    return model


X = torch.ones(2, 6)


@pytest.mark.parametrize(
    ("model", "recipe", "batches", "options", "message"),
    [
        (Branch(), E4M3, [], {}, "calibration needs at least one batch; got none"),
        (Branch(), E4M3, [X * math.nan], {}, "used.input holds nan during calibration"),
        (Branch(), E4M3, [X, X * math.inf], {}, "used.input holds inf during calibration"),
        (Branch(), E4M3, [X], {}, "no batch reached idle.input, so it has no scale"),
        (Branch(), E4M3, [X.long()], {}, "used.input takes float32, bfloat16, float16, float64; got torch.int64"),
        (Branch(), E4M3, [X + 0j], {}, "used.input takes .*; got torch.complex64"),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), E4M3, [X.int()], {}, "0.input takes .*; got torch.int32"),
        (with_weight(math.inf), E4M3, [X], {}, "used.weight holds NaN or Inf"),
        (with_weight(3e38), of(result=TensorSpec(E4M3FN, Current())), [X], {}, "used.output holds inf"),
        (Branch(), E4M3, [X], {"exempt": ["use"]}, "exempt 'use' fits no linear layer and no .*; did you mean 'used'"),
        (nn.ReLU(), E4M3, [X], {}, "ReLU has no linear layer and no convolution"),
        (Branch(), None, [X], {}, "quantisation needs a recipe; got None"),
        (Branch(), "e4m3", [X], {}, "recipe is a Recipe such as"),
        (Branch(), of(STOCHASTIC), [X], {}, "gives one answer, and input is rounded stochastically"),
        (Branch(), on_hopper(hybrid()), [X], {}, "the accumulator of output is hopper-fast"),
        (Branch(), E4M3, [X], {"calibration": "max"}, "calibration is a member of Calibration; got 'max'"),
        (Branch(), E4M3, [X], {"percentile": 0}, "a percentile is above 0 and at most 100; got 0"),
        (
            Branch(),
            of(TensorSpec(E4M3FN, Current(), overflow=Overflow.NONE)),
            [X],
            {"calibration": Calibration.PERCENTILE},
            "percentile calibration clips, and the recipe turns what is clipped of input into Inf or NaN",
        ),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
            E4M3,
            [X],
            {},
            "0 computes its weight .* make it a plain parameter first",
        ),
        (nn.Linear(6, 4).double(), NAMED["tf32"](), [X.double()], {}, "tf32 takes float32"),
    ],
)
def test_quantize_model_refuses(model: Any, recipe: Any, batches: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        quantize_model(model, recipe, batches, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (nn.Linear(6, 4), X.long(), "QuantizedLinear takes .*; got torch.int64"),
        (nn.Linear(6, 4), X + 1j, "QuantizedLinear takes .*; got torch.complex64"),
        (nn.Linear(6, 4), torch.ones(2, 5), r"takes \[..., 6\]; got \[2, 5\]"),
        (
            nn.Conv2d(4, 4, 1, groups=2),
            torch.ones(2, 2, 3, 3),
            r"takes \[samples, 4, places, places\], or one sample; got",
        ),
        (nn.Conv1d(4, 4, 1), torch.ones(4), r"got \[4\]: reshape it"),
    ],
)
def test_a_quantised_layer_refuses(layer: Any, x: Tensor, message: str) -> None:
    fitting = torch.ones(2, 6) if isinstance(layer, nn.Linear) else torch.ones(2, 4, *(3,) * len(layer.stride))
    new = quantize_model(layer, rowwise(), [fitting])
    with pytest.raises(ValueError, match=message):
        new(x)


def test_ptq_recipes() -> None:
    expected = {
        "e4m3": (E4M3FN, E4M3FN),
        "e3m4": (E3M4FN, E3M4FN),
        "e5m2": (E5M2, E5M2),
        "hybrid": (E4M3FN, E3M4FN),
    }
    for name, (input, weight) in expected.items():
        row = ptq_recipe(name).output
        assert row == Gemm(left=TensorSpec(input, Current()), right=TensorSpec(weight, Row()))
        assert ptq_recipe(name, per_channel=False).output.right == TensorSpec(weight, Current())
    with pytest.raises(ValueError, match=r"one of e4m3, e3m4, e5m2, hybrid; got 'e4m4'; did you mean 'e\dm\d'"):
        ptq_recipe("e4m4")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one label; got none"),
        ([X], r"a batch is \(inputs, labels\); got Tensor"),
        ([(X, torch.zeros(2))], "labels are int64 classes; got torch.float32"),
        ([(X[0], torch.zeros(1).long())], r"returns logits \[samples, classes, ...\]; got \[4\]"),
    ],
)
def test_compare_accuracy_refuses(batches: Any, message: str) -> None:
    model = Branch().train()
    with pytest.raises(ValueError, match=message):
        compare_accuracy(model, quantize_model(model, direct(), [X]), batches)
    assert model.training


def test_compare_accuracy_takes_models_of_one_structure() -> None:
    with pytest.raises(ValueError, match="the model before has no module 'used'"):
        compare_accuracy(nn.Linear(6, 4), quantize_model(Branch(), direct(), [X]), [])
