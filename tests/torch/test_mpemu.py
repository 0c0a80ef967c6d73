"""The FP8 Emulation Toolkit's surface: its known defects are absent, each by an oracle of its own, and each method does its work."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from octavo.diagnose.records import Memory
from octavo.mpemu import mpt_emu
from octavo.torch.quantized import QuantizedConv, QuantizedLinear

ALGORITHMS = ("direct", "hybrid")
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
both = pytest.mark.parametrize("algo", ALGORITHMS)


class Net(nn.Module):
    """A convolution with a batch norm, and two linear layers: [batch, 1, 8, 8] -> [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(72, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        out: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return out


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def line(weight: Any) -> nn.Linear:
    """A linear layer of that weight [out, in], without bias."""
    rows = torch.as_tensor(weight, dtype=torch.float32)
    layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
    layer.weight = nn.Parameter(rows)
    return layer


def small_integers(*shape: int) -> Tensor:
    """-1, 0 and 1, of which short sums are exact in any format."""
    return torch.randint(-1, 2, shape).float()


def step(model: nn.Module, emulator: mpt_emu.MPTEmulator, optimizer: torch.optim.Optimizer, x: Tensor) -> bool:
    """One training step on made-up labels."""
    optimizer.zero_grad()
    labels = torch.arange(len(x)) % 10
    emulator.scale_loss(F.cross_entropy(model(x), labels)).backward()
    return emulator.optimizer_step(optimizer)


def bits(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone().view(torch.int32) for parameter in model.parameters()]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def cast(x: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """x as ml_dtypes rounds it, float64."""
    array = x.detach().numpy() if isinstance(x, Tensor) else np.asarray(x, np.float32)
    return array.astype(dtype).astype(np.float64)


def scale_of(x: Tensor, largest: float) -> float:
    """What takes the amax of x to `largest`, in float32."""
    return float(np.float32(largest) / np.abs(x.detach().numpy()).max())


def in_format(x: Tensor, dtype: Any) -> bool:
    return bool((cast(x, dtype) == x.detach().numpy()).all())


# What the two methods compute, in float64 and ml_dtypes.


def test_direct_casts_weight_input_and_output_to_e5m2_unscaled() -> None:
    layer, x = line(torch.randn(6, 5)), torch.randn(4, 5)
    product = cast(x, E5M2) @ cast(layer.weight, E5M2).T
    layer, _ = mpt_emu.initialize(layer, None, training_algo="direct")
    np.testing.assert_array_equal(layer(x).detach(), cast(product.astype(np.float32), E5M2))


def test_hybrid_casts_weight_input_and_output_to_e4m3_by_their_own_amax() -> None:
    layer, x = line(torch.randn(6, 5)), torch.randn(4, 5)
    # amaxes of 448 times a power of two make scales that divide exactly.
    x.view(-1)[0], layer.weight.data[0, 0] = 3.5, -7.0
    product = (cast(x * 128, E4M3) / 128) @ (cast(layer.weight * 64, E4M3) / 64).T
    scale = np.float32(448) / np.float32(np.abs(product).max())
    expected = cast(product.astype(np.float32) * scale, E4M3) / np.float64(scale)
    layer, _ = mpt_emu.initialize(layer, None, training_algo="hybrid")
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-6)


@both
def test_gradients_are_e5m2(algo: str) -> None:
    layer, x = nn.Linear(7, 5), torch.randn(6, 7, requires_grad=True)
    mpt_emu.initialize(layer, sgd(layer), training_algo=algo)
    layer(x).square().mean().backward()
    assert layer.weight.grad is not None
    assert x.grad is not None
    assert in_format(layer.weight.grad, E5M2)
    assert in_format(x.grad, E5M2)


# Defects of the toolkit.


@both
def test_the_first_layer_need_not_be_exempt(algo: str) -> None:
    """There, backward crashed: its input needs no gradient."""
    layer, x = line(small_integers(3, 5)), small_integers(4, 5)
    model, _ = mpt_emu.initialize(layer, sgd(layer), training_algo=algo)
    model(x).sum().backward()
    assert layer.weight.grad is not None
    np.testing.assert_array_equal(layer.weight.grad, np.ones((3, 4)) @ x.double().numpy())


@both
def test_evaluation_leaves_the_float32_weights_alone(algo: str) -> None:
    """There, a forward pass in eval mode or without gradients wrote quantised weights over them."""
    torch.manual_seed(1)
    one = Net()
    other = copy.deepcopy(one)
    x = torch.randn(6, 1, 8, 8)
    runs = []
    for model, looks in ((one, True), (other, False)):
        optimizer = sgd(model)
        _, emulator = mpt_emu.initialize(model, optimizer, training_algo=algo)
        for _ in range(2):
            before = bits(model)
            if looks:
                with torch.no_grad():
                    model.eval()(x)
                    model.train()
                    model.fc2(torch.relu(model.fc1(torch.randn(3, 72))))
                assert same_bits(before, bits(model))
            step(model, emulator, optimizer, x)
        runs.append(bits(model))
    assert same_bits(*runs)


class Twice(nn.Module):
    """One linear layer that runs twice."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.layer(x))
        return out


@both
def test_a_module_called_twice_keeps_its_master(algo: str) -> None:
    """There, the second call took the quantised weight for the master."""
    signs, x = torch.randint(0, 2, (4, 4)) * 2.0 - 1, small_integers(1, 4)
    weight = signs + 2.0**-13
    model = Twice(line(weight))
    optimizer = sgd(model, lr=2.0**-6)
    _, emulator = mpt_emu.initialize(model, optimizer, training_algo=algo)
    model(x).sum().backward()
    assert model.layer.weight.equal(weight)
    found = model.layer.weight.grad
    assert found is not None
    ones, once = np.ones((1, 4)), x.double().numpy()
    exact = ones.T @ (once @ signs.double().numpy().T) + (ones @ signs.double().numpy()).T @ once  # of both uses
    # In E5M2 the weight is `signs` and small integers are exact; E4M3 has scales that are no powers of two.
    np.testing.assert_allclose(found, exact, rtol=0, atol=0 if algo == "direct" else 1.5)
    wanted = (weight - 2.0**-6 * found).double().numpy()
    emulator.optimizer_step(optimizer)
    after = model.layer.weight.detach().double().numpy()
    half = wanted.astype(np.float16)
    near = [np.nextafter(half, np.float16(side)).astype(np.float64) for side in (-np.inf, np.inf)]
    assert ((near[0] <= after) & (after <= near[1])).all()
    assert (np.abs(after - wanted) < near[1] - near[0]).all()


@pytest.mark.parametrize("dtype", ["e5m2", "e4m3", "e3m4", "hybrid"])
def test_gradients_are_there_under_per_channel_scaling(dtype: str) -> None:
    """There, they were lost."""
    layer, x = line(torch.randn(3, 5)), small_integers(4, 5).requires_grad_()
    weight = layer.weight.detach().double().numpy()
    model, _ = mpt_emu.quantize_model(layer, sgd(layer), dtype)
    model(x).sum().backward()
    assert layer.weight.grad is not None
    assert x.grad is not None
    np.testing.assert_array_equal(layer.weight.grad, np.ones((3, 4)) @ x.detach().double().numpy())
    np.testing.assert_allclose(x.grad, np.ones((4, 3)) @ weight, rtol=1e-6)


def test_weights_are_scaled_per_channel() -> None:
    rows = torch.tensor([[448.0, 3.3, -17.1], [7.0, 0.011, -0.9]])
    model, _ = mpt_emu.quantize_model(line(rows), dtype="e4m3")
    scales = np.array([[1.0], [64.0]])
    expected = cast(rows.numpy() * scales.astype(np.float32), E4M3) / scales
    np.testing.assert_array_equal(model(torch.eye(3) * 448).detach(), expected.T * 448)


@both
def test_the_mode_at_creation_does_not_matter(algo: str) -> None:
    """There, an emulator that was made in eval mode never cast gradients, nor one made in training mode the batch norm's way back."""
    runs = []
    for training in (True, False):
        torch.manual_seed(2)
        model, x = Net().train(training), torch.randn(6, 1, 8, 8)
        optimizer = sgd(model)
        _, emulator = mpt_emu.initialize(model, optimizer, training_algo=algo)
        model.train()
        step(model, emulator, optimizer, x)
        grad = model.fc1.weight.grad
        assert grad is not None
        assert in_format(grad, E5M2)
        model.eval()
        statistics = model.bn1.running_mean.clone()  # type: ignore[union-attr,operator]
        out = model(x)
        assert model.bn1.running_mean.equal(statistics)  # type: ignore[union-attr,operator,arg-type]
        runs.append([*bits(model), out.detach().view(torch.int32)])
    assert same_bits(*runs)


def gradients(value: float, passes: int, algo: str) -> list[Tensor]:
    """What the grad_output [256, 256] of one value becomes, in each of several passes of one layer."""
    layer = line(torch.eye(256))
    mpt_emu.initialize(layer, None, training_algo=algo)
    found = []
    for _ in range(passes):
        x = torch.zeros(256, 256, requires_grad=True)
        (layer(x) * value).sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    return found


@both
@pytest.mark.parametrize("fraction", [0.125, 0.5, 0.75])
def test_stochastic_rounding_is_unbiased(algo: str, fraction: float) -> None:
    """There, P(up) at one half was 0.36."""
    (found,) = gradients(-(1 + fraction / 4), 1, algo)
    ups, count = int((found == -1.25).sum()), found.numel()
    assert ups + int((found == -1).sum()) == count
    assert abs(ups / count - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / count)


@both
def test_stochastic_rounding_draws_anew_in_each_pass_and_alike_in_each_run(algo: str) -> None:
    """There, each call used the same bits again."""
    one, other = gradients(1.125, 2, algo)
    alike = (one == other).double().mean().item()
    assert abs(alike - 0.5) < 5 * 0.5 / 256
    again, _ = gradients(1.125, 2, algo)
    assert one.equal(again)


def test_master_weights_are_rounded_without_bias_and_with_new_draws() -> None:
    layer = line(torch.zeros(256, 256))
    optimizer = sgd(layer, lr=0.0)
    _, emulator = mpt_emu.initialize(layer, optimizer)
    ups = []
    for _ in range(2):
        layer.weight.data.fill_(1 + 2.0**-12)  # a quarter of the way to the next float16
        layer(torch.ones(1, 256)).sum().backward()
        emulator.optimizer_step(optimizer)
        assert set(layer.weight.unique().tolist()) == {1.0, 1 + 2.0**-10}
        ups.append(layer.weight.detach() > 1)
    for up in ups:
        assert abs(up.double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75) / 256
    assert abs((ups[0] == ups[1]).double().mean().item() - 0.625) < 5 * math.sqrt(0.625 * 0.375) / 256


def as_input(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """What a layer reads for each value, unscaled: the tensor holds the format's largest value too.

    kind: a training method, or "e3m4".
    """
    largest = {"direct": 1.0, "hybrid": 448.0, "e3m4": 30.0}[kind]
    x = np.append(values, largest).astype(np.float32)
    model = nn.Sequential(line([[largest]]))
    if kind == "e3m4":
        mpt_emu.quantize_model(model, dtype=kind)
    else:
        mpt_emu.initialize(model, None, training_algo=kind, list_layers_output_fused=["0"])
    out: np.ndarray[Any, Any] = model(torch.from_numpy(x[:, None])).detach().double().numpy()[:-1, 0]
    return out / largest


@pytest.mark.parametrize(("kind", "dtype", "unit"), [("direct", E5M2, 2.0**-16), ("hybrid", E4M3, 2.0**-9)])
def test_subnormals_are_on_the_formats_grid(kind: str, dtype: Any, unit: float) -> None:
    """There, they kept all mantissa bits, and those below the smallest one became 0."""
    values = np.arange(-320, 321, dtype=np.float32) * np.float32(unit / 32)
    found = as_input(values, kind)
    np.testing.assert_array_equal(found, cast(values, dtype))
    small = np.abs(values) < 4 * unit
    np.testing.assert_array_equal(found[small], np.rint(values[small].astype(np.float64) / unit) * unit)
    assert found[values == np.float32(0.75 * unit)] == unit


def test_subnormals_of_e3m4_are_on_its_grid() -> None:
    values = np.arange(-1024, 1025, dtype=np.float32) / 4096  # up to the smallest normal, 2^-2, 64 to a subnormal
    np.testing.assert_array_equal(as_input(values, "e3m4"), np.rint(values.astype(np.float64) * 64) / 64)


@pytest.mark.parametrize(("kind", "dtype"), [("direct", E5M2), ("hybrid", E4M3)])
def test_values_are_rounded_once(kind: str, dtype: Any) -> None:
    """There, they were rounded to float16 first."""
    known = {
        "direct": {1.1250001: 1.25, 61439.0: 57344.0, 5 * 2.0**-18: 2.0**-16},
        "hybrid": {17.000002: 18.0, 17.0: 16.0, 1.9 * 2.0**-10: 2.0**-9, 2.0**-10: 0.0},
    }[kind]
    np.testing.assert_array_equal(as_input(np.array(list(known)), kind), list(known.values()))
    # A hair to either side of each tie: float16 would see the tie.
    grid = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    grid = np.unique(grid[np.isfinite(grid)])
    ties = (grid[1:].astype(np.float64) + grid[:-1]) / 2
    values = np.concatenate(
        [ties * (1 - 2.0**-20), ties, ties * (1 + 2.0**-20), np.random.default_rng(0).normal(size=4096)]
    )
    values = values.astype(np.float32)
    np.testing.assert_array_equal(as_input(values, kind), cast(values, dtype))


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_named(algo: str, bad: float) -> None:
    """There, NaN became 448 in silence."""
    model, x = Net(), torch.randn(4, 1, 8, 8)
    x[2, 0, 3, 3] = bad
    mpt_emu.initialize(model, sgd(model), training_algo=algo)
    with pytest.raises(ValueError, match=rf"conv1\.input holds {'NaN' if math.isnan(bad) else 'Inf'} at step 0"):
        model(x)


@both
def test_under_a_loss_scale_nan_stays_nan_and_the_step_is_skipped(
    algo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layer, x = line(torch.eye(2)), torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    mpt_emu.initialize(layer, None, training_algo=algo, loss_scale="dynamic")
    assert bool(layer(x)[0].isnan().all())
    model, images = Net(), torch.randn(4, 1, 8, 8)
    images[2, 0, 3, 3] = math.nan
    optimizer = sgd(model)
    _, emulator = mpt_emu.initialize(model, optimizer, training_algo=algo, loss_scale="dynamic")
    before = bits(model)
    assert not step(model, emulator, optimizer, images)
    assert same_bits(before, bits(model))
    assert emulator.scale_loss(torch.ones(())).item() == 2.0**15
    assert "conv1.input holds NaN" in capsys.readouterr().out


@pytest.mark.parametrize(("algo", "largest"), [("direct", math.inf), ("hybrid", 448.0)])
def test_infinity_keeps_its_sign(algo: str, largest: float) -> None:
    """There, Inf under a scale gave -Inf and NaN."""
    x = torch.tensor([[math.inf], [-math.inf], [1.0]])
    model = nn.Sequential(line([[448.0]]))
    mpt_emu.initialize(model, None, training_algo=algo, list_layers_output_fused=["0"], loss_scale="dynamic")
    np.testing.assert_array_equal(model(x).detach()[:, 0] / 448, [largest, -largest, 1.0])


# The rest of the surface.


@both
def test_a_network_learns_digits(algo: str) -> None:
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images[:512]).float().div(16).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels[:512])
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model, emulator = mpt_emu.initialize(
        model,
        optimizer,
        training_algo=algo,
        list_exempt_layers=["conv1", "bn1", "fc2"],
        list_layers_output_fused=None,
        device="cpu",
        loss_scale="dynamic",
    )
    losses = []
    for epoch in range(4):
        emulator.update_global_steps(epoch * 8)
        for batch in torch.arange(512).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            emulator.scale_loss(loss).backward()
            assert emulator.optimizer_step(optimizer)
            losses.append(loss.item())
    assert sum(losses[-8:]) < 0.4 * sum(losses[:8])
    emulator.set_calibration_qconfig()
    with torch.no_grad():
        model.eval()(x)
    final = emulator.fuse_bnlayers_and_quantize_model(model)
    right = (final(x).argmax(1) == y).float().mean()
    assert right > 0.85
    assert isinstance(final.fc1, QuantizedLinear)
    assert isinstance(final.conv1, nn.Conv2d)


def test_exempt_layers_run_in_float32_and_fused_outputs_stay() -> None:
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), torch.randn(2, 5)
    plain = model[0](x).detach()
    _, emulator = mpt_emu.initialize(model, None, list_exempt_layers=["0"], list_layers_output_fused=["1"])
    assert model[0](x).equal(plain)
    weight, hidden = cast(model[1].weight, E5M2), torch.randn(2, 4)
    expected = cast(hidden, E5M2) @ weight.T + model[1].bias.detach().double().numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(model[1](hidden).detach(), expected, rtol=1e-6)
    assert "in high precision: 0" in emulator.describe()


@both
def test_a_fused_layer_does_not_cast_its_grad_output(algo: str) -> None:
    layer, x = nn.Sequential(line([[1.75], [1.75]])), torch.ones(64, 1, requires_grad=True)
    mpt_emu.initialize(layer, None, training_algo=algo, list_layers_output_fused=["0"])
    layer(x).backward(torch.tensor([[1.125, 0.875]]).repeat(64, 1))  # 1.125 would become 1 or 1.25
    assert x.grad is not None
    assert x.grad.equal(torch.full((64, 1), 3.5))


def test_blacklisted_types_run_in_float32_and_whitelisted_ones_again_in_8_bits() -> None:
    model, x = Net().eval(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        plain = model(x)
        _, emulator = mpt_emu.initialize(model, None)
        emulated = model(x)
        assert not emulated.equal(plain)
        emulator.blacklist_modules([nn.Conv2d, "Linear"])
        np.testing.assert_array_equal(model.conv1(x), F.conv2d(x, model.conv1.weight, model.conv1.bias))
        emulator.whitelist_modules(["Conv2d", nn.Linear])
        assert model(x).equal(emulated)
        norm = model.bn1(torch.randn(2, 8, 3, 3))
        assert not in_format(norm, E5M2)
        emulator.whitelist_modules([nn.BatchNorm2d])
        assert in_format(model.bn1(torch.randn(2, 8, 3, 3)), E5M2)


def test_the_innermost_rule_counts() -> None:
    model, x = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)), torch.randn(2, 4)
    plain = model(x).detach()
    _, emulator = mpt_emu.initialize(model, None)
    emulator.blacklist_modules(["Sequential"])
    assert model(x).equal(plain)
    emulator.whitelist_modules([nn.Linear])
    assert in_format(model[0][0](x), E5M2)  # type: ignore[index]


def test_a_change_of_settings_goes_on_with_scale_step_draws_and_observers() -> None:
    model, seen = Net(), Memory()
    optimizer, x = sgd(model), torch.randn(4, 1, 8, 8)
    _, emulator = mpt_emu.initialize(model, optimizer, loss_scale="dynamic")
    emulator.enable_tensor_stats(seen, every=1)
    assert step(model, emulator, optimizer, x)
    draws = emulator.emulation.sites["fc1"].draws.tolist()
    emulator.blacklist_modules(["Conv2d"])
    emulator.set_embedding_precision("fp32")
    assert emulator.emulation.global_step == 1
    assert emulator.emulation.sites["fc1"].draws.tolist() == draws
    assert "conv1" not in emulator.emulation.sites
    assert step(model, emulator, optimizer, x)
    assert {record.module for record in seen.records if record.step == 1} == {"fc1", "fc2"}
    emulator.whitelist_modules(["Conv2d"])
    assert emulator.emulation.sites["conv1"].draws.tolist()[1] == 1
    assert emulator.scale_loss(torch.ones(())).item() == 2.0**16
    emulator.update_global_steps(40)
    assert "step 40" in repr(emulator)


def test_master_weights_have_the_precision_asked_for() -> None:
    model, x = Net(), torch.randn(4, 1, 8, 8)
    optimizer = sgd(model, lr=0.125)
    _, emulator = mpt_emu.initialize(model, optimizer)
    step(model, emulator, optimizer, x)
    assert model.fc1.weight.equal(model.fc1.weight.half().float())
    emulator.set_master_param_precision("e5m2")
    step(model, emulator, optimizer, x)
    assert in_format(model.fc1.weight, E5M2)
    emulator.set_master_param_precision("fp32")
    before = model.fc1.weight.detach().clone()
    step(model, emulator, optimizer, x)
    assert model.fc1.weight.grad is not None
    assert model.fc1.weight.equal(before - 0.125 * model.fc1.weight.grad)


@pytest.mark.parametrize("bag", [False, True])
def test_embeddings_have_the_precision_asked_for(bag: bool) -> None:
    table = nn.EmbeddingBag(9, 6) if bag else nn.Embedding(9, 6)
    model, index = nn.Sequential(table), torch.arange(9)[:, None] if bag else torch.arange(9)
    model, emulator = mpt_emu.initialize(model, sgd(model), training_algo="hybrid")
    rows = table.weight.detach().numpy()
    np.testing.assert_array_equal(model(index).detach(), rows)
    emulator.set_embedding_precision("e5m2")
    np.testing.assert_array_equal(model(index).detach(), cast(rows, E5M2))
    emulator.set_embedding_precision("E4M3", emb_norm=True)
    scales = np.float32(448) / np.abs(rows).max(1, keepdims=True)
    np.testing.assert_allclose(model(index).detach(), cast(rows * scales, E4M3) / scales, rtol=1e-6)
    model(index).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.equal(torch.ones(9, 6))
    emulator.set_embedding_precision("fp32")
    np.testing.assert_array_equal(model(index).detach(), rows)


def test_tensorboard_has_the_statistics(tmp_path: Path) -> None:
    model = Net()
    _, emulator = mpt_emu.initialize(model, None)
    with SummaryWriter(tmp_path / "one") as writer:
        emulator.enable_tensorboard_logging(writer, every=1)
        x = torch.randn(3, 1, 8, 8)
        model(x)
    (event,) = EventAccumulator(str(tmp_path / "one")).Reload().Scalars("conv1/input/amax")
    assert event.step == 0
    assert event.value == x.abs().max().item()


def test_without_a_writer_statistics_go_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Net()
    _, emulator = mpt_emu.initialize(model, None)
    writer = emulator.enable_tensor_stats()
    model(torch.randn(3, 1, 8, 8))
    writer.close()
    assert [folder.name[:4] for folder in (tmp_path / "emulator_logs").iterdir()] == ["Net_"]


def test_tensors_are_dumped_in_the_steps_asked_for(tmp_path: Path) -> None:
    model = Net()
    optimizer = sgd(model)
    _, emulator = mpt_emu.initialize(model, optimizer)
    emulator.set_tensor_bindump_schedule(
        [1, (3, 5), range(6, 7)], directory=tmp_path, patterns=("fc1.*", "conv1.input")
    )
    inputs = [torch.randn(2, 1, 8, 8) for _ in range(8)]
    for x in inputs:
        step(model, emulator, optimizer, x)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [f"step-0000000{number}" for number in (1, 3, 4, 6)]
    np.testing.assert_array_equal(np.load(tmp_path / "step-00000003" / "conv1.input.npy"), inputs[3])
    assert (tmp_path / "step-00000003" / "fc1.grad_output.npy").exists()
    emulator.set_tensor_bindump_schedule(None)
    emulator.update_global_steps(3)
    (tmp_path / "step-00000003" / "conv1.input.npy").unlink()
    model(inputs[0])
    assert not (tmp_path / "step-00000003" / "conv1.input.npy").exists()


# Inference.


def warm(model: nn.Module) -> nn.Module:
    """The model in eval mode, its batch norms with statistics of their own."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(2 * torch.randn(16, 1, 8, 8) + 1)
    return model.eval()


@pytest.mark.parametrize("dtype", ["e5m2", "e4m3", "e3m4", "hybrid"])
@pytest.mark.parametrize("calibrate", ["passes", "batches", "nothing"])
def test_a_model_is_quantised_for_inference(dtype: str, calibrate: str) -> None:
    model, x = warm(Net()), torch.randn(64, 1, 8, 8)
    weights, exact = bits(model), model.double()(x.double()).detach()
    model.float()
    how: Any = {"passes": True, "batches": [x], "nothing": False}[calibrate]
    same, emulator = mpt_emu.quantize_model(model, dtype=dtype, calibrate=how, list_exempt_layers=["fc2", "bn1"])
    assert same is model
    with torch.no_grad():
        emulated = model(x)
        final = emulator.fuse_bnlayers_and_quantize_model(model)
        out = final(x)
        assert model(x).equal(emulated)
    assert same_bits(weights, bits(model))
    for found in (emulated, out):
        error = (found - exact).norm() / exact.norm()
        assert 1e-4 < error < (0.2 if dtype == "e5m2" else 0.1)
    assert not final.training
    assert type(final.fc2) is nn.Linear
    if calibrate == "nothing":
        assert out.equal(emulated)
    else:
        assert isinstance(final.conv1, QuantizedConv)
        assert isinstance(final.bn1, nn.Identity)
        assert final.conv1.input_scale == scale_of(x, {"e5m2": 57344, "e3m4": 30}.get(dtype, 448))
    emulator.remove()
    assert (model(x) - exact).abs().max() < 1e-5


def test_batch_norms_may_be_calibrated_in_training_mode_first() -> None:
    model, x = Net(), torch.randn(64, 1, 8, 8)
    mean = model.bn1.running_mean.clone()  # type: ignore[union-attr,operator]
    model, emulator = mpt_emu.quantize_model(model, dtype="e4m3", calibrate=True, calibration_batches=1)
    with torch.no_grad():
        model.train()(x)
        model(100 * x)  # not kept: one batch was asked for
    final = emulator.fuse_bnlayers_and_quantize_model(model.eval())
    assert not model.bn1.running_mean.equal(mean)
    assert final.conv1.input_scale == scale_of(x, 448)


def test_a_quantised_model_may_be_fine_tuned() -> None:
    model, x = Net(), torch.randn(16, 1, 8, 8)
    optimizer = sgd(model)
    model, emulator = mpt_emu.quantize_model(model, optimizer, "e4m3")
    emulator.set_default_inference_qconfig()
    first = model.eval()(x).detach()
    before = bits(model.train())
    assert step(model, emulator, optimizer, x)
    assert not same_bits(before, bits(model))
    final = emulator.fuse_bnlayers_and_quantize_model(model)
    assert not final(x).equal(first)
    assert all(not parameter.requires_grad for parameter in final.parameters())
    assert step(model, emulator, optimizer, x)


def test_after_training_the_model_may_be_cast_as_in_inference() -> None:
    layer, x = line(torch.randn(3, 4)), torch.randn(2, 4, requires_grad=True)
    _, emulator = mpt_emu.initialize(layer, None, training_algo="direct")
    emulator.set_default_inference_qconfig()
    layer(x).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, np.ones((2, 3)) @ layer.weight.detach().double().numpy(), rtol=1e-6)
    emulator.set_calibration_qconfig()
    with pytest.raises(ValueError, match="no batch has passed"):
        emulator.fuse_bnlayers_and_quantize_model(layer)
    layer(2 * x.detach())
    final = emulator.fuse_bnlayers_and_quantize_model(layer)
    assert final.input_scale == scale_of(2 * x, 57344)
    emulator.set_default_inference_qconfig()
    layer(4 * x.detach())
    assert emulator.fuse_bnlayers_and_quantize_model(layer).input_scale == final.input_scale


def test_a_model_is_fused_at_once_where_asked() -> None:
    model, x = warm(Net()), torch.randn(4, 1, 8, 8)
    final, emulator = mpt_emu.quantize_model(model, dtype="hybrid", calibrate=[x], fuse_bn=True)
    assert isinstance(final.conv1, QuantizedConv)
    with pytest.raises(ValueError, match="the model it was made for"):
        emulator.fuse_bnlayers_and_quantize_model(final)


# Words.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: mpt_emu.initialize(m, None, "hybird"), "training_algo is one of direct, hybrid.*mean 'hybrid'"),
        (lambda m: mpt_emu.initialize(m, None, device="cdua"), "device is one of cpu, cuda; got 'cdua'.*mean 'cuda'"),
        (lambda m: mpt_emu.initialize(m, None, device="cuda"), r"device is where the model is, cpu; got cuda"),
        (lambda m: mpt_emu.initialize(m, None, loss_scale="dynamc"), "mean 'dynamic'"),
        (lambda m: mpt_emu.initialize(m, None, hw_patch="simple"), 'hw_patch is "none"'),
        (lambda m: mpt_emu.initialize(m, None, pruning_algo="adaptive"), 'pruning_algo is "none"'),
        (lambda m: mpt_emu.initialize(None, None), "a model is a torch.nn.Module; got NoneType"),
        (lambda m: mpt_emu.initialize(m, sgd(nn.Linear(2, 2))), "not of this model"),
        (lambda m: mpt_emu.initialize(m, None, list_exempt_layers=["conv11"]), "fits no module.*mean 'conv1'"),
        (
            lambda m: mpt_emu.initialize(m, None, list_exempt_layers="conv1"),
            r"takes a list; got 'conv1': write \['conv1'\]",
        ),
        (
            lambda m: mpt_emu.initialize(m, None, list_layers_output_fused=["fc9"]),
            "list_layers_output_fused 'fc9' fits",
        ),
        (lambda m: mpt_emu.quantize_model(m, dtype="e4m4"), "dtype is one of e5m2, e4m3, e3m4, hybrid; got 'e4m4'"),
        (lambda m: mpt_emu.quantize_model(m, calibrate=True, fuse_bn=True), "no batch has passed"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_start(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Net())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.set_master_param_precision("fp61"), "master_params is one of fp32, fp16.*mean 'fp16'"),
        (lambda e: e.set_embedding_precision("e4m4"), "emb_precision is one of.*mean 'e4m3'"),
        (
            lambda e: e.blacklist_modules(["Conv3d"]),
            "Conv3d is the type of no module of the model; did you mean 'Conv2d'",
        ),
        (lambda e: e.whitelist_modules([nn.LSTM]), "LSTM is the type of no module"),
        (lambda e: e.blacklist_modules(nn.Conv2d), "takes a list"),
        (lambda e: e.blacklist_modules([nn.Conv2d(1, 1, 1)]), "takes types of modules and their names"),
        (lambda e: e.update_global_steps(-1), "global_steps is an integer from 0"),
        (lambda e: e.set_tensor_bindump_schedule([(1, 2, 3)]), r"a schedule has steps.*got \(1, 2, 3\)"),
        (lambda e: e.enable_tensor_stats(object()), "SummaryWriter"),
    ],
)
def test_a_wrong_setting_is_refused_and_changes_nothing(call: Any, message: str) -> None:
    model, x = Net().eval(), torch.randn(2, 1, 8, 8)
    _, emulator = mpt_emu.initialize(model, None)
    before = model(x)
    with pytest.raises(ValueError, match=message):
        call(emulator)
    assert model(x).equal(before)


def test_verbose_says_what_runs_how(capsys: pytest.CaptureFixture[str]) -> None:
    mpt_emu.initialize(Net(), None, list_exempt_layers=["fc2"], list_layers_output_fused=["fc1"], verbose=True)
    out = capsys.readouterr().out
    assert "in high precision: bn1, fc2" in out
    assert "output not cast: fc1" in out
    mpt_emu.initialize(Net(), None)
    assert capsys.readouterr().out == ""
