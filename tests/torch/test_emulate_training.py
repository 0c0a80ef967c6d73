"""Training by emulation on real images: accuracy, loss scaling, underflow, what is watched, and the order of a step."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from octavo.diagnose.dumps import Dumps
from octavo.diagnose.records import Memory, worst
from octavo.formats import E5M2, FLOAT16, Format
from octavo.recipes import NAMED
from octavo.torch import Emulation, LossScaleError, LossScaler, emulate, round_masters

METHODS = ["direct", "hybrid"]
GRIDS: dict[Format, Any] = {FLOAT16: np.float16, E5M2: ml_dtypes.float8_e5m2}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits [1797, 1, 8, 8] of about zero mean, shuffled, and their labels."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 - 0.3
    return x[order], torch.tensor(labels)[order]


def batch(step: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """One of the first 1200 digits' batches."""
    x, y = digits()
    chosen = torch.randint(0, 1200, (size,), generator=torch.Generator().manual_seed(step))
    return x[chosen], y[chosen]


class Cnn(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(32 * width, 10)

    def forward(self, x: Tensor) -> Any:
        return self.fc(F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2).flatten(1))


class Block(nn.Module):
    """Two normed convolutions and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Any:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += x
        return F.relu(out)


def resnet() -> nn.Module:
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, Block(16), Block(16), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 10))


def seeded(make: Any, *arguments: Any) -> Any:
    torch.manual_seed(2)
    return make(*arguments)


def quiet(**settings: Any) -> LossScaler:
    return LossScaler(report=lambda line: None, **settings)


def sgd(model: nn.Module, rate: float = 0.1, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)


def backward(emulation: Emulation, step: int, factor: float = 1.0) -> float:
    """The loss of one batch, whose gradients are taken, times factor."""
    x, y = batch(step)
    emulation.model.zero_grad()
    loss = F.cross_entropy(emulation.model(x), y) * factor
    emulation.scale(loss).backward()
    return loss.item() / factor


def train(emulation: Emulation, steps: int, factor: float = 1.0, **clip: float) -> list[float]:
    optimizer, losses = sgd(emulation.model), []
    for step in range(steps):
        losses.append(backward(emulation, step, factor))
        emulation.step(optimizer, **clip)
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@functools.cache
def accuracy(recipe: str | None) -> float:
    """Of 597 digits never trained on, in per cent, after 250 steps."""
    model, steps = seeded(Cnn), 250
    emulation = emulate(model, recipe, loss_scale=quiet(), master=FLOAT16) if recipe else None
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if emulation is not None:
            backward(emulation, step)
            emulation.step(optimizer)
        else:
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    x, y = digits()
    with torch.no_grad():
        return float(100 * (model.eval()(x[1200:]).argmax(1) == y[1200:]).float().mean())


@pytest.mark.parametrize("method", METHODS)
def test_accuracy_is_that_of_float32(method: str) -> None:
    assert accuracy(None) > 96
    assert accuracy(method) > accuracy(None) - 1.5


@pytest.mark.parametrize("method", METHODS)
def test_a_residual_network_trains(method: str) -> None:
    emulation = emulate(seeded(resnet), method, loss_scale=quiet(), master=FLOAT16, exempt=["0", "1", "7"])
    losses = train(emulation, 40)
    assert sum(losses[-5:]) < sum(losses[:5]) / 2


@pytest.mark.parametrize(
    ("recipe", "factor"),
    [("direct", 1e30), *((name, bad) for name in NAMED for bad in (float("inf"), float("nan")))],
)
def test_an_overflow_is_skipped_reported_and_survived(recipe: str, factor: float) -> None:
    lines: list[str] = []
    model = seeded(Cnn, 4)
    emulation = emulate(model, recipe, loss_scale=LossScaler(report=lines.append))
    optimizer = sgd(model, 0.02)
    for step in range(4):
        before = weights(model)
        loss = backward(emulation, step, factor if step == 2 else 1.0)
        assert emulation.step(optimizer) == (step != 2)
        if step == 2:
            same(before, weights(model))
        else:
            assert loss < 3
    (line,) = lines
    report, _, blame = line.partition("; first bad tensor: ")
    assert report == "step 2: gradient overflow; step skipped, loss scale 65536 -> 32768"
    module, _, found = blame.partition(".")
    assert module == "fc"
    assert found.split(" holds ")[0] in ("grad_output", "grad_input")
    assert found.split(" holds ")[1] in ("Inf at step 2", "NaN at step 2")


def test_small_gradients_vanish_in_direct_unless_the_loss_is_scaled() -> None:
    """The statistics name the tensors."""
    found = {}
    for scale in (None, "dynamic"):
        emulation, memory = emulate(seeded(Cnn, 8), "direct", loss_scale=scale), Memory()
        emulation.observe(memory, every=1)
        backward(emulation, 0, 2.0**-12)
        gradients = [record for record in memory.records if record.tensor.startswith("grad")]
        assert {record.step for record in gradients} == {0}
        found[scale] = {(record.module, record.tensor): record.statistics.underflow for record in gradients}
        first = worst(gradients, 1)[0]
        assert (first.statistics.underflow > 0.5) == (scale is None)
    assert found[None].keys() == found["dynamic"].keys()
    # A conv's grad_output is the next layer's grad_input, and on the grid already.
    for place in [
        ("fc", "grad_output"),
        *((name, f"grad_{x}") for name in ("fc", "conv2") for x in ("input", "weight")),
    ]:
        assert found[None][place] > 0.5
        assert found["dynamic"][place] < 0.05


def watched(emulation: Emulation, name: str) -> list[Tensor]:
    """The inputs of a module from now on, as they come."""
    seen: list[Tensor] = []
    module = emulation.model.get_submodule(name)
    module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
    return seen


@pytest.mark.parametrize(("name", "tensor"), [("fc", "input"), ("conv2", "weight"), ("conv2", "input")])
def test_statistics_are_those_counted_by_hand(name: str, tensor: str) -> None:
    """E4M3 with a scale from its own amax, by ml_dtypes."""
    emulation, memory = emulate(seeded(Cnn, 8), "hybrid"), Memory()
    emulation.observe(memory, every=1)
    seen = watched(emulation, name)
    module: Any = emulation.model.get_submodule(name)
    with torch.no_grad():  # a few that underflow
        module.weight[:3] *= 1e-4
    backward(emulation, 0)
    x = (seen[0] if tensor == "input" else module.weight).detach().numpy().ravel()
    amax = np.abs(x).max()
    scale = np.float32(448) / amax
    y = np.clip(x * scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / np.float64(scale)
    (record,) = [r for r in memory.records if (r.module, r.tensor) == (name, tensor)]
    found, nonzero = record.statistics, x[x != 0]
    assert (found.count, found.nan, found.inf, found.zeros) == (x.size, 0, 0, int((x == 0).sum()))
    assert (found.amax, found.scale, found.format) == (float(amax), float(scale), "float8_e4m3fn")
    assert found.underflow == np.count_nonzero((y == 0) & (x != 0)) / nonzero.size
    assert found.overflow == 0
    signal, noise = (x.astype(np.float64) ** 2).sum(), ((x - y) ** 2).sum()
    assert found.sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)
    assert dict(found.exponents) == Counter((np.frexp(nonzero)[1] - 1).tolist())
    if tensor == "weight":
        assert found.underflow > 0


@pytest.mark.parametrize("recipe", ["direct", "hybrid", "delayed_scaling", "mxfp8", "nvfp4", "rowwise"])
def test_observing_changes_no_bit(recipe: str, tmp_path: Path) -> None:
    results = []
    for watching in (False, True):
        emulation, memory = emulate(seeded(resnet), recipe, master=FLOAT16), Memory()
        if watching:
            emulation.observe(memory, every=2, dumps=Dumps(tmp_path, every=3))
        losses = train(emulation, 4)
        held = emulation.state_dict()["sites"]
        scales = {f"{site} {name}": value for site, state in held.items() for name, value in state.items()}
        results.append((losses, weights(emulation.model) | scales))
        assert sorted({record.step for record in memory.records}) == ([0, 2] if watching else [])
        written = [path.name for path in sorted(tmp_path.iterdir())]
        assert written == (["step-00000000", "step-00000003"] if watching else [])
    assert results[0][0] == results[1][0]
    same(results[0][1], results[1][1])


def test_dumps_hold_the_tensors_as_they_were_before_the_cast(tmp_path: Path) -> None:
    emulation = emulate(seeded(Cnn, 4), "hybrid", loss_scale=2.0**6)
    emulation.observe(dumps=Dumps(tmp_path, patterns=("fc.input", "conv1.weight", "fc.grad_output"), steps=[1, 3]))
    model: Any = emulation.model
    seen, gradients, before = watched(emulation, "fc"), [], []
    model.fc.register_full_backward_hook(lambda _, __, given: gradients.append(given[0].clone()))
    optimizer = sgd(emulation.model)
    for step in range(4):
        before.append(model.conv1.weight.detach().clone())
        backward(emulation, step)
        emulation.step(optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    for step in (1, 3):
        folder = tmp_path / f"step-{step:08d}"
        expected = {"fc.input": seen[step], "conv1.weight": before[step], "fc.grad_output": gradients[step]}
        assert sorted(path.stem for path in folder.iterdir()) == sorted(expected)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(np.load(folder / f"{name}.npy"), tensor.numpy())


@pytest.mark.parametrize("master", [None, FLOAT16, E5M2], ids=["float32", "float16", "e5m2"])
@pytest.mark.parametrize("clip", [{}, {"max_norm": 0.01}, {"max_value": 1e-3}], ids=["free", "norm", "value"])
@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_a_step_unscales_clips_steps_and_rounds_in_this_order(
    scale: float | None, clip: dict[str, float], master: Format | None
) -> None:
    emulation = emulate(seeded(Cnn, 4), "hybrid", loss_scale=scale, master=master, seed=5)
    model: Any = emulation.model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    emulation.global_step = 17
    for step in range(17, 20):
        # By hand, on the gradients that are there.
        backward(emulation, step)
        twin, copied = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
        other = torch.optim.Adam(twin, lr=0.05)
        other.load_state_dict(copied)
        for theirs, ours in zip(twin, model.parameters(), strict=True):
            theirs.grad = ours.grad / (scale or 1)
        if "max_norm" in clip:
            assert nn.utils.clip_grad_norm_(twin, clip["max_norm"]) > clip["max_norm"]
        if "max_value" in clip:
            nn.utils.clip_grad_value_(twin, clip["max_value"])
        other.step()
        if master is not None:
            round_masters(twin, master, seed=5, step=step)
        assert emulation.step(optimizer, **clip)
        assert emulation.global_step == step + 1
        for theirs, ours in zip(twin, model.parameters(), strict=True):
            assert torch.equal(theirs, ours)
            assert torch.equal(theirs.grad, ours.grad)
        if "max_norm" in clip:
            grads = [parameter.grad for parameter in model.parameters()]
            assert nn.utils.get_total_norm(grads).item() == pytest.approx(clip["max_norm"], rel=1e-3)


@pytest.mark.parametrize("master", GRIDS, ids=lambda format: format.name)
def test_masters_lie_on_their_grid_and_move(master: Format) -> None:
    emulation = emulate(seeded(Cnn, 4), "direct", loss_scale=quiet(), master=master)
    emulation.round_masters()
    before = weights(emulation.model)
    train(emulation, 3)
    for name, value in weights(emulation.model).items():
        x = value.numpy()
        np.testing.assert_array_equal(x, x.astype(GRIDS[master]).astype(np.float32))
        assert value.numel() < 100 or not value.equal(before[name])


def test_the_draws_of_masters_go_by_seed_and_step() -> None:
    def rounded(seed: int, step: int) -> Tensor:
        model = seeded(Cnn, 4)
        emulation = emulate(model, "hybrid", master=E5M2, seed=seed)
        emulation.global_step = step
        emulation.round_masters()
        return torch.Tensor(model.fc.weight.detach())

    assert rounded(0, 3).equal(rounded(0, 3))
    assert not rounded(0, 3).equal(rounded(0, 4))
    assert not rounded(0, 3).equal(rounded(1, 3))


def test_masters_that_cannot_be_rounded_are_not_passed_over() -> None:
    emulation = emulate(seeded(Cnn, 4).bfloat16(), "hybrid", master=FLOAT16)
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        emulation.round_masters()


@pytest.mark.parametrize("adam", [False, True])
def test_an_overflow_at_the_floor_changes_nothing_and_names_the_step(adam: bool) -> None:
    model = seeded(Cnn, 4)
    emulation = emulate(model, "direct", loss_scale=quiet(start=2.0, floor=1.0), master=FLOAT16)
    optimizer = torch.optim.Adam(model.parameters()) if adam else sgd(model)
    emulation.global_step = 40
    backward(emulation, 0)
    assert emulation.step(optimizer)
    before, moments = weights(model), copy.deepcopy(optimizer.state_dict())
    backward(emulation, 1, float("inf"))
    assert not emulation.step(optimizer)
    for _ in range(2):
        backward(emulation, 2, float("inf"))
        number = emulation.global_step
        with pytest.raises(
            LossScaleError, match=rf"^step {number}: gradient overflow at loss scale 1, which is the floor"
        ):
            emulation.step(optimizer)
        same(before, weights(model))
        assert str(optimizer.state_dict()) == str(moments)
    backward(emulation, 3)
    assert emulation.step(optimizer)


@pytest.mark.parametrize("recipe", ["mxfp8", "current_scaling"])
def test_a_fixed_loss_scale_stays_and_cancels(recipe: str) -> None:
    """A power of two passes through scales that are quotients, or powers of two themselves."""
    plain, scaled = emulate(seeded(Cnn, 4), recipe), emulate(seeded(Cnn, 4), recipe, loss_scale=1024)
    assert train(plain, 5) == train(scaled, 5)
    same(weights(plain.model), weights(scaled.model))
    assert scaled.scaler is not None
    assert (scaled.scaler.value, scaled.scaler.skipped) == (1024, 0)
    backward(scaled, 5, float("inf"))
    assert not scaled.step(sgd(scaled.model))
    assert scaled.scaler.value == 1024


def test_delayed_scales_go_on_following_gradients_after_a_skip() -> None:
    """The Inf of a step that was not taken must not hold the scale for as long as the history is."""
    emulation = emulate(seeded(Cnn, 4), "delayed_scaling", loss_scale=quiet())
    optimizer, site = sgd(emulation.model, 0.0), emulation.sites["fc"]
    for step, factor in enumerate([1.0, float("inf"), 1.0, 100.0, 100.0]):
        backward(emulation, step, factor)
        assert emulation.step(optimizer) == (step != 1)
    amax = site.amax_history_backward[-1, 0].item()
    # Of the largest of two like steps.
    assert 57344 / site.scale_backward[0].item() == pytest.approx(amax, rel=0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", list(NAMED))
def test_bad_data_is_an_error_that_names_the_place(recipe: str, bad: float) -> None:
    emulation = emulate(seeded(Cnn, 4), recipe)
    emulation.global_step = 6
    x = batch(0)[0]
    x[3, 0, 2, 2] = bad
    with pytest.raises(ValueError, match=r"^conv1\.input holds (NaN|Inf) at step 6; look at the data") as error:
        emulation.model(x)
    assert "\n" not in str(error.value)


def test_bad_gradients_are_an_error_without_a_loss_scale() -> None:
    model = seeded(Cnn, 4)
    emulation, optimizer, before = emulate(model, "hybrid"), sgd(model), weights(model)
    with pytest.raises(ValueError, match=r"^conv1\.input holds NaN at step 0"):
        model(torch.full((2, 1, 8, 8), float("nan")))  # which the next step has nothing to do with
    for _ in range(2):
        backward(emulation, 0, float("inf"))
        with pytest.raises(
            ValueError, match=r"^step 0: gradients hold Inf or NaN: fc\.grad_output holds (Inf|NaN)"
        ) as error:
            emulation.step(optimizer)
        assert "\n" not in str(error.value)
        same(before, weights(model))
        assert emulation.global_step == 0
    backward(emulation, 0)
    assert emulation.step(optimizer)


def test_what_evaluation_met_is_not_blamed_on_the_next_step() -> None:
    emulation = emulate(seeded(Cnn, 4), "hybrid", loss_scale=quiet())
    with torch.no_grad():
        emulation.model(torch.full((2, 1, 8, 8), float("inf")))
    backward(emulation, 0)
    assert emulation.step(sgd(emulation.model))
