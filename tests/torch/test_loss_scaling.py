"""The loss scale on real models and optimizers, against what the rule says step by step in Python integers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import octavo.torch as ot
from octavo import Overflow, Recipe, TensorSpec
from octavo.formats import E5M2
from octavo.scaling import Unscaled
from octavo.torch.loss_scaling import PATIENCE, LossScaleError, LossScaler

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "fused adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


def backward(scaler: LossScaler, model: nn.Module, *, overflow: bool = False, step: int = 0) -> None:
    """A scaled backward pass, with Inf in one gradient where it is to overflow."""
    model.zero_grad()
    scaler.scale(loss_of(model, step)).backward()
    if overflow:
        next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[3] = torch.inf


def frozen(*parts: Any) -> bytes:
    """Every bit of the state of models and optimizers."""
    file = io.BytesIO()
    torch.save([copy.deepcopy(part.state_dict()) for part in parts], file)
    return file.getvalue()


def silent(line: str) -> None:
    """Report nothing."""


@every_optimizer
def test_clean_steps_are_those_without_scaling(make: Make) -> None:
    model = network()
    plain = copy.deepcopy(model)
    optimizer, other, scaler = make(model.parameters()), make(plain.parameters()), LossScaler()
    for step in range(5):
        backward(scaler, model, step=step)
        assert scaler.step(optimizer, step)
        other.zero_grad()
        loss_of(plain, step).backward()
        other.step()
    # A scale that is a power of two changes no bit.
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (scaler.value, scaler.skipped) == (2.0**16, 0)


@every_optimizer
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_skips_the_step_and_halves_the_scale(make: Make, bad: float) -> None:
    lines: list[str] = []
    model, scaler = network(), LossScaler(report=lines.append)
    optimizer = make(model.parameters())
    backward(scaler, model)
    assert scaler.step(optimizer, 11)
    before = frozen(model, optimizer)
    backward(scaler, model)
    model[2].bias.grad[1] = bad
    assert not scaler.step(optimizer, 12)
    assert frozen(model, optimizer) == before
    assert (scaler.value, scaler.skipped) == (2.0**15, 1)
    assert lines == ["step 12: gradient overflow; step skipped, loss scale 65536 -> 32768"]
    backward(scaler, model)
    assert scaler.step(optimizer, 13)
    assert frozen(model, optimizer) != before


def test_blame_is_added_to_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    model, scaler = network(), LossScaler(start=2.0**24)
    backward(scaler, model, overflow=True)
    scaler.step(torch.optim.SGD(model.parameters()), 3, blame="fc1 grad_output")
    expected = "loss scale 16777216 -> 8388608; first bad tensor: fc1 grad_output"
    assert capsys.readouterr().out == f"step 3: gradient overflow; step skipped, {expected}\n"


def test_the_scale_follows_the_rule() -> None:
    """Sixty steps, overflows among them, between a floor and a ceiling."""
    model, scaler = network(), LossScaler(start=8.0, growth_interval=3, ceiling=64.0, floor=4.0, report=silent)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    overflows = {0, 7, 8, 20, 21, 23, 40}
    scale, clean, seen = 8, 0, set()
    for step in range(60):
        backward(scaler, model, overflow=step in overflows, step=step)
        assert scaler.step(optimizer, step) == (step not in overflows)
        if step in overflows:
            scale, clean = max(scale // 2, 4), 0
        elif (clean := clean + 1) == 3:
            scale, clean = min(scale * 2, 64), 0
        assert scaler.value == scale
        assert scaler.state_dict()["clean_steps"] == clean
        seen.add(scale)
    assert seen == {4, 8, 16, 32, 64}
    assert scaler.skipped == len(overflows)


def test_bounds_that_are_no_powers_of_two_hold() -> None:
    model, scaler = network(), LossScaler(start=3.0, growth_interval=1, ceiling=5.0, floor=2.0, report=silent)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for overflow in (False, False, True, True):
        backward(scaler, model, overflow=overflow)
        scaler.step(optimizer, 0)
        found.append(scaler.value)
    assert found == [5, 5, 2.5, 2]


@every_optimizer
def test_an_overflow_at_the_floor_is_an_error_and_changes_nothing(make: Make) -> None:
    model, scaler = network(), LossScaler(start=2.0, report=silent)
    optimizer = make(model.parameters())
    backward(scaler, model)
    scaler.step(optimizer, 1)
    before = frozen(model, optimizer)
    backward(scaler, model, overflow=True)
    assert not scaler.step(optimizer, 2)  # which arrives at the floor
    for step in (3, 4):
        backward(scaler, model, overflow=True)
        with pytest.raises(
            LossScaleError, match=f"^step {step}: .* at loss scale 1, which is the floor; look for .*: fc2"
        ) as e:
            scaler.step(optimizer, step, blame="fc2 weight")
        assert "\n" not in str(e.value)
        assert frozen(model, optimizer) == before
    assert (scaler.value, scaler.skipped) == (1, 3)
    backward(scaler, model)
    assert scaler.step(optimizer, 5)


def test_a_floor_that_float32_does_not_hold_is_still_found() -> None:
    model, scaler = network(), LossScaler(start=0.1, floor=0.1)
    backward(scaler, model, overflow=True)
    with pytest.raises(LossScaleError):
        scaler.step(torch.optim.SGD(model.parameters()), 1)


def test_a_fixed_scale_stays_and_gives_up_at_last() -> None:
    lines: list[str] = []
    model = network()
    scaler = LossScaler(start=1000.0, growth_interval=2, dynamic=False, report=lines.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(5):
        backward(scaler, model, overflow=step == 4)
        assert scaler.step(optimizer, step) == (step != 4)
        assert scaler.value == 1000
    assert lines == ["step 4: gradient overflow; step skipped, loss scale stays 1000"]
    backward(scaler, model)
    scaler.step(optimizer, 5)  # which ends the row
    before = frozen(model, optimizer)
    for step in range(PATIENCE - 1):
        backward(scaler, model, overflow=True)
        assert not scaler.step(optimizer, step)
    backward(scaler, model, overflow=True)
    with pytest.raises(
        LossScaleError, match="step 7: gradient overflow 100 steps in a row at the fixed loss scale 1000;"
    ):
        scaler.step(optimizer, 7)
    assert (scaler.value, scaler.skipped) == (1000, PATIENCE + 1)
    assert frozen(model, optimizer) == before


@every_optimizer
@pytest.mark.parametrize("unscaled", [(), (0,), (0, 1)], ids=str)
def test_several_optimizers_step_together_or_not_at_all(make: Make, unscaled: tuple[int, ...]) -> None:
    model, scaler = network(), LossScaler(report=silent)
    optimizers = [make(model[0].parameters()), make(model[2].parameters())]
    for step, overflow in enumerate((False, True, False)):
        before = frozen(model, *optimizers)
        backward(scaler, model, overflow=overflow)
        for i in unscaled:
            scaler.unscale(optimizers[i])
        assert scaler.step(optimizers, step) == (not overflow)
        assert (frozen(model, *optimizers) == before) == overflow
    assert (scaler.value, scaler.skipped) == (2.0**15, 1)


def test_gradients_are_clipped_in_their_own_units() -> None:
    model, scaler = network(), LossScaler(start=2.0**10)
    plain = copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    backward(scaler, model)
    scaler.unscale(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert scaler.step(optimizer, 0)
    loss_of(plain).backward()
    assert nn.utils.clip_grad_norm_(plain.parameters(), 0.01) == norm
    assert norm > 0.01
    other.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_overflow_is_found_though_clipping_follows() -> None:
    model, scaler = network(), LossScaler(report=silent)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = frozen(model)
    backward(scaler, model, overflow=True)
    scaler.unscale(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert not scaler.step(optimizer, 0)
    assert frozen(model) == before


def test_accumulated_batches_share_a_scale() -> None:
    model, scaler = network(), LossScaler()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for part in range(3):
        scaler.scale(loss_of(model, part) / 4).backward()
    scaler.unscale(optimizer)
    whole = torch.autograd.grad(sum(loss_of(model, part) / 4 for part in range(3)), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_resumed_run_goes_on_as_it_would_have(used: bool) -> None:
    def run(scaler: LossScaler, steps: range) -> list[float]:
        found = []
        for step in steps:
            backward(scaler, model, overflow=step in (4, 11, 12), step=step)
            scaler.step(optimizer, step)
            found.append(scaler.value)
        return found

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings: dict[str, Any] = {"growth_interval": 3, "report": silent}
    whole = run(LossScaler(**settings), range(16))
    first, second = LossScaler(**settings), LossScaler(**settings)
    values = run(first, range(9))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    if used:
        run(second, range(2))
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.state_dict() == first.state_dict()
    assert values + run(second, range(9, 16)) == whole
    assert second.skipped == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"growth": 2}, "keys scale, clean_steps, skipped, skipped_in_a_row; got .*growth"),
        ({"scale": 2.0**30}, "scale is a float32 from 1 to 16777216"),
        ({"scale": 0.5}, "scale is a float32"),
        ({"scale": float("nan")}, "scale is a float32"),
        ({"scale": 16}, "scale is a float32"),
        ({"scale": 1.1}, "scale is a float32"),
        ({"clean_steps": 2000}, "clean_steps is an integer from 0 to 1999"),
        ({"skipped": -1}, "skipped is an integer"),
        ({"skipped_in_a_row": 2}, "skipped_in_a_row is an integer from 0 to 1"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, Any], message: str) -> None:
    scaler = LossScaler()
    good = {"scale": 4.0, "clean_steps": 7, "skipped": 1, "skipped_in_a_row": 0}
    scaler.load_state_dict(good)
    with pytest.raises(ValueError, match=message):
        scaler.load_state_dict({**good, **change})
    assert scaler.state_dict() == good
    for key in good:
        with pytest.raises(ValueError, match="keys scale"):
            scaler.load_state_dict({k: v for k, v in good.items() if k != key})


@pytest.mark.parametrize(
    "settings",
    [
        {"start": 0.5},
        {"start": 2.0**25},
        {"floor": 0.0},
        {"floor": -1.0},
        {"start": torch.nan},
        {"ceiling": torch.inf},
        {"start": 0.0, "dynamic": False},
        {"start": torch.inf, "dynamic": False},
    ],
    ids=str,
)
def test_scales_out_of_order_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="0 < floor <= start <= ceiling"):
        LossScaler(**settings)


@pytest.mark.parametrize("interval", [0, -1, 2.5])
def test_an_impossible_growth_interval_is_refused(interval: Any) -> None:
    with pytest.raises(ValueError, match="growth_interval is"):
        LossScaler(growth_interval=interval)


@pytest.mark.parametrize("device", ["cpu:0", "mps", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"where there is a CUDA device; got '{device}'"):
        LossScaler(device)


@pytest.mark.parametrize("loss", [torch.tensor(3), torch.tensor(True), torch.tensor(1j), 2.5, None], ids=str)
def test_a_loss_is_a_float(loss: Any) -> None:
    with pytest.raises(ValueError, match="a loss is a floating-point tensor"):
        LossScaler().scale(loss)


def test_steps_out_of_order_are_refused() -> None:
    model, scaler = network(), LossScaler()
    one, two = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[2]))
    before = frozen(model)
    with pytest.raises(ValueError, match="has a gradient; call"):
        scaler.step(one, 0)
    loss_of(model).backward()
    for refused in (scaler.unscale, lambda o: scaler.step(o, 0)):
        with pytest.raises(ValueError, match="no loss was scaled in this step"):
            refused(one)
    backward(scaler, model)
    scaler.unscale(one)
    with pytest.raises(ValueError, match="drop the second unscale"):
        scaler.unscale(one)
    for optimizers in ([two], [one, one]):
        with pytest.raises(ValueError, match="each optimizer once, and all that were unscaled"):
            scaler.step(optimizers, 0)
    assert frozen(model) == before
    assert scaler.step([one, two], 0)
    with pytest.raises(ValueError, match="no loss was scaled in this step"):
        scaler.step([one, two], 1)


def e5m2_gradients() -> Recipe:
    """grad_output in unscaled E5M2, to nearest even, Inf kept; the rest in high precision."""
    return Recipe.from_tensors("gradients", grad_output=TensorSpec(E5M2, Unscaled(), overflow=Overflow.NONE))


def test_a_small_gradient_vanishes_in_e5m2_and_survives_scaled() -> None:
    layer = ot.convert(nn.Linear(16, 16, bias=False), e5m2_gradients())
    x = torch.eye(16)
    tiny = 2.0**-20
    (layer(x).sum() * tiny).backward()
    assert torch.count_nonzero(layer.weight.grad) == 0
    layer.zero_grad()
    scaler, optimizer = LossScaler(), torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    scaler.scale(layer(x).sum() * tiny).backward()
    scaler.unscale(optimizer)
    assert torch.equal(layer.weight.grad, torch.full((16, 16), tiny))
    assert scaler.step(optimizer, 0)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), before.numpy() - np.float32(tiny))


def test_a_large_gradient_has_the_scale_back_off_until_e5m2_holds_it() -> None:
    layer = ot.convert(nn.Linear(16, 16, bias=False), e5m2_gradients())
    scaler, optimizer = LossScaler(report=silent), torch.optim.SGD(layer.parameters(), lr=1.0)
    taken = []
    for step in range(8):
        layer.zero_grad()
        scaler.scale(layer(torch.eye(16)).sum() * 12).backward()
        taken.append(scaler.step(optimizer, step))
    assert taken == [False] * 4 + [True] * 4
    # 12 * 2**13 is beyond 57344 and rounds to Inf, 12 * 2**12 = 49152 is held.
    assert scaler.value == 2.0**12
